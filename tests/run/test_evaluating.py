"""The validation loss of a run."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import IGNORE, MeshConfig, TrainConfig
from gpt2_jax.run import evaluating
from gpt2_jax.sharding import make_mesh


def test_two_batches_are_in_flight_at_most(monkeypatch):
    """More that wait can block several processes on CPUs, and hold memory everywhere."""
    batches = [np.full((2, 5), number, np.int32) for number in range(7)]
    started, finished = [], []

    def eval_step(params, batch):
        started.append(len(started))
        assert len(started) - len(finished) <= 2
        return jnp.sum(batch[:, 1:]).astype(jnp.float32), jnp.sum(batch[:, 1:] != IGNORE)

    def wait(sums):
        finished.extend(sums)

    monkeypatch.setattr(evaluating, "eval_batches", lambda *_: iter(batches))
    monkeypatch.setattr(evaluating.jax, "block_until_ready", wait)
    windows = SimpleNamespace(n_tokens=57, streams=[None], block_size=4)
    config = TrainConfig(out="", steps=1, batch_size=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loss = functools.partial(evaluating.validation_loss, eval_step, windows, config, mesh)
    assert loss({}, 0) == (8.0 * sum(range(7)), 8 * 7)
    assert len(started) == 7
