"""What the protection costs in an update, piece by piece, in one process. A part of bench/faults.py.

- The step computes the norm of the new parameters, which shows whether all are finite. Programs with and without it
  take turns on two states, which they exchange now and then, so that neither keeps the better memory.
- The host fetches this norm with the other metrics, compares it and writes it into the row.
- A fingerprint of the state is computed at each evaluation and save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from record import Figures, mean_and_interval

from gpt2_jax.config import MeshConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.fingerprint import make_state_fingerprint
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import make_mesh
from gpt2_jax.step import abstract_state, init_state, make_train_step

BYTES = ["--model.vocab_size", "257"]
CASES = {
    "quickstart": ["--config", "quickstart", *BYTES],
    "124M": ["--config", "gpt2-124m", "--batch_size", "2", "--micro_batch_size", "2", "--model.block_size", "128",
             "--model.remat", "none"],
}  # fmt: skip
EXCHANGE_EVERY = 25  # pairs
BLOCKS = 20
REPEAT = 30  # of what is not a whole update


@contextlib.contextmanager
def _without_the_norm_of_parameters() -> Iterator[None]:
    """The second norm of an update is a constant. The first is that of the gradient."""
    real, calls = optax.tree.norm, itertools.count()

    def norm(tree: object) -> jax.Array:
        return jnp.zeros(()) if next(calls) == 1 else real(tree)

    with mock.patch.object(optax.tree, "norm", norm):
        yield


def overhead(pairs: dict[str, int]) -> Figures:
    """The shares of an update, for each case with so many pairs of updates."""
    return {name: _case(CASES[name], count) for name, count in pairs.items()}


def _case(flags: list[str], pairs: int) -> Figures:
    config = parse_args("bench", "", flags)
    model = GPT2(dataclasses.replace(config.model, attention="xla"))
    optimizer = dataclasses.replace(config.optimizer, decay_steps=config.steps)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shape = 1, config.batch_size, model.config.block_size + 1
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, shape), jnp.int32)
    programs, states = {}, {}
    for name, change in (("with", contextlib.nullcontext()), ("without", _without_the_norm_of_parameters())):
        states[name] = init_state(model, optimizer, mesh, 0)
        with change:
            programs[name] = make_train_step(model, optimizer, mesh, 0).lower(states[name], tokens).compile()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    metrics = None
    for pair in range(pairs):
        for name in programs if pair % 2 else reversed(programs):
            start = time.perf_counter()
            states[name], metrics = jax.block_until_ready(programs[name](states[name], tokens))
            seconds[name].append(time.perf_counter() - start)
        if pair % EXCHANGE_EVERY == EXCHANGE_EVERY - 1:
            states["with"], states["without"] = states["without"], states["with"]
    logs = np.log(seconds["with"]) - np.log(seconds["without"])
    blocks = [float(np.median(block)) for block in np.array_split(logs, BLOCKS)]
    share, interval = mean_and_interval(blocks)
    fingerprint = make_state_fingerprint(mesh, abstract_state(model, optimizer, mesh))
    norms = iter([metrics.param_norm + number for number in range(REPEAT + 1)])  # a fetched array stays on the host
    update = statistics.median(seconds["with"])
    return {
        "pairs": pairs,
        "update_seconds": update,
        "norm_share": share,
        "norm_interval_95": [*interval],
        "host_share": _median(lambda: _host_work(next(norms))) / update,
        "fingerprint_share": _median(lambda: fingerprint(states["with"])) / update / config.eval.every,
        "evaluations_every": config.eval.every,
    }


def _host_work(param_norm: jax.Array) -> str:
    value = float(jax.device_get(param_norm))
    return json.dumps({"param_norm": value}) if math.isfinite(value) else ""


def _median(action: Callable[[], object]) -> float:
    action()
    times = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def describe(case: Figures) -> tuple[float, str]:
    """The share of an update in percent, and the details."""
    low, high = (100 * value for value in case["norm_interval_95"])
    parts = {key: 100 * case[f"{key}_share"] for key in ("norm", "host", "fingerprint")}
    details = (
        f"norm of the parameters {parts['norm']:.2f}% (median of {case['pairs']:,} pairs of updates, 95% interval "
        f"{low:.2f} to {high:.2f}), its work on the host {parts['host']:.3f}%, a fingerprint every "
        f"{case['evaluations_every']} updates {parts['fingerprint']:.3f}%; an update takes "
        f"{1000 * case['update_seconds']:.1f} ms"
    )
    return math.fsum(parts.values()), details  # Python 3.12 changed `sum`
