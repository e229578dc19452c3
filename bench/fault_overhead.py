"""What the protection costs in an update, piece by piece, in one process. A part of bench/faults.py.

- The step computes the norm of the new parameters, which shows whether all are finite. Updates with and without it take
  turns. In place of the model's gradients they have a thousandth of the parameters, because the time for the model
  varies by more than the norm takes. The difference is divided by the time of a whole update.
- The host fetches this norm with the other metrics, compares it and writes it into the row.
- A fingerprint of the state is computed at each evaluation and at each save. It counts twice where both fall on one
  update, although a run computes it once there. A save also seals what it records beside the arrays.
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
from jax.sharding import Mesh
from record import Figures, mean_and_interval

from gpt2_jax import runtime, step
from gpt2_jax.checkpoint_info import seal
from gpt2_jax.config import MeshConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.fingerprint import make_state_fingerprint
from gpt2_jax.model import GPT2, Params
from gpt2_jax.sharding import make_mesh
from gpt2_jax.step import TrainState, TrainStep, abstract_state, init_state, make_train_step

BYTES = ["--model.vocab_size", "257"]
CASES = {
    "quickstart": ["--config", "quickstart", *BYTES],
    "124M": ["--config", "gpt2-124m", "--batch_size", "2", "--micro_batch_size", "2", "--model.block_size", "128",
             "--model.remat", "none"],
}  # fmt: skip
WHOLE = 20  # updates with the gradients of the model
EXCHANGE_EVERY = 25  # pairs, so that neither side keeps the better memory
BLOCKS = 20
REPEAT = 30  # of what is not an update
SHARDS = 103  # token files of FineWeb's 10B tokens, whose digests a checkpoint records


@contextlib.contextmanager
def _without_the_norm_of_parameters() -> Iterator[None]:
    """The second norm of an update is a constant. The first is that of the gradient."""
    real, calls = optax.tree.norm, itertools.count()

    def norm(tree: object) -> jax.Array:
        return jnp.zeros(()) if next(calls) == 1 else real(tree)

    with mock.patch.object(optax.tree, "norm", norm):
        yield


def _free_gradients(model: GPT2, mesh: Mesh) -> Callable[..., tuple[jax.Array, Params]]:
    """A function in place of the one that computes the model's loss and gradients."""
    return lambda scale, params, tokens, key: (jnp.ones(1), jax.tree.map(lambda leaf: leaf / 1000, params))


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

    def compiled(state: TrainState) -> TrainStep:
        return make_train_step(model, optimizer, mesh, 0).lower(state, tokens).compile()

    state = init_state(model, optimizer, mesh, 0)
    whole, times = compiled(state), []
    runtime.keep_freed_memory(whole)
    for _ in range(WHOLE + 1):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(whole(state, tokens))
        times.append(time.perf_counter() - start)
    update = statistics.median(times[1:])
    fingerprint = make_state_fingerprint(mesh, abstract_state(model, optimizer, mesh))
    check = _median(lambda: fingerprint(state))
    sealing = _median(lambda: json.dumps(seal(1, {"val_loss": 1.0}, {"sha256": ["0" * 64] * SHARDS})))
    norms = iter([metrics.param_norm + number for number in range(REPEAT + 1)])  # a fetched array stays on the host

    states = {"with": state, "without": init_state(model, optimizer, mesh, 0)}
    with mock.patch.object(step, "_make_loss_and_grads", _free_gradients):
        programs = {"with": compiled(state)}
        with _without_the_norm_of_parameters():
            programs["without"] = compiled(state)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for pair in range(pairs):
        for name in programs if pair % 2 else reversed(programs):
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(programs[name](states[name], tokens))
            seconds[name].append(time.perf_counter() - start)
        if pair % EXCHANGE_EVERY == EXCHANGE_EVERY - 1:
            states["with"], states["without"] = states["without"], states["with"]
    differences = np.subtract(seconds["with"], seconds["without"])
    blocks = [float(np.median(block)) / update for block in np.array_split(differences, BLOCKS)]
    share, interval = mean_and_interval(blocks)
    return {
        "pairs": pairs,
        "update_seconds": update,
        "optimizer_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "norm_share": share,
        "norm_interval_95": [*interval],
        "host_share": _median(lambda: _host_work(next(norms))) / update,
        "evaluation_share": check / update / config.eval.every,
        "evaluations_every": config.eval.every,
        "save_share": (check + sealing) / update / config.checkpoint.every,
        "saves_every": config.checkpoint.every,
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
    parts = {key: 100 * case[f"{key}_share"] for key in ("norm", "host", "evaluation", "save")}
    total = math.fsum(parts.values())  # Python 3.12 changed `sum`
    margin = high - parts["norm"]
    details = (
        f"95% interval {total - margin:.2f} to {total + margin:.2f}: norm of the parameters {parts['norm']:.2f}% "
        f"({low:.2f} to {high:.2f}, {case['pairs']:,} pairs of updates without a model), its work on the host "
        f"{parts['host']:.3f}%, a fingerprint every {case['evaluations_every']} updates at evaluations "
        f"{parts['evaluation']:.3f}%, and every {case['saves_every']} at saves, with their seal, {parts['save']:.3f}%; "
        f"an update takes {1000 * case['update_seconds']:.1f} ms"
    )
    return total, details
