"""Schedule, mask and update against numbers computed by hand and against torch's AdamW."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from gpt2_jax.config import OptimizerConfig
from gpt2_jax.layers import stack_layers
from gpt2_jax.optimizer import decay_mask, learning_rate_schedule, make_optimizer

CONFIG = OptimizerConfig(learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=10, decay_steps=100)


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        (0, 6e-4 * 1 / 10),
        (4, 6e-4 * 5 / 10),
        (9, 6e-4),
        (9 + 91 / 2, (6e-4 + 6e-5) / 2),  # the middle of the cosine
        (9 + 91 / 3, 6e-5 + (6e-4 - 6e-5) * (1 + math.cos(math.pi / 3)) / 2),
        (100, 6e-5),
        (1000, 6e-5),
    ],
)
def test_schedule(update, rate):
    assert float(learning_rate_schedule(CONFIG)(jnp.asarray(update))) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 1])
def test_schedule_without_warm_up_starts_at_the_peak(warmup):
    schedule = learning_rate_schedule(dataclasses.replace(CONFIG, warmup_steps=warmup))
    assert float(schedule(jnp.asarray(0))) == pytest.approx(6e-4)


@pytest.mark.parametrize("stacked", [False, True])
def test_decay_falls_on_matrices_and_embeddings_only(tiny, stacked):
    _, params = tiny
    mask = decay_mask(stack_layers(params) if stacked else params)
    decayed = {tuple(key.key for key in path) for path, value in jax.tree_util.tree_leaves_with_path(mask) if value}
    blocks = ["h"] if stacked else ["h_0", "h_1"]
    matrices = [("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")]
    assert decayed == {("wte", "embedding"), ("wpe", "embedding")} | {
        (block, *matrix, "kernel") for block in blocks for matrix in matrices
    }


def test_three_updates_equal_torch_adamw():
    config = dataclasses.replace(CONFIG, learning_rate=0.1, final_learning_rate=0.1, warmup_steps=0, clip_norm=0.5)
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    start = {name: value.astype(np.float32) for name, value in start.items()}
    gradients = [{name: rng.normal(size=x.shape).astype(np.float32) for name, x in start.items()} for _ in range(3)]

    weights = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    groups = [
        {"params": [weights["kernel"]], "weight_decay": 0.1},
        {"params": [weights["bias"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(config)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for gradient in gradients:
        for name, weight in weights.items():
            weight.grad = torch.from_numpy(gradient[name].copy())
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 0.5)
        adamw.step()
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, updates)
    for name, weight in weights.items():
        # Three float32 updates of 0.1; torch's clipping divides by norm + 1e-6, ours by the norm.
        np.testing.assert_allclose(params[name], weight.detach().numpy(), atol=2e-6)


def test_clip_norm_of_zero_does_not_clip():
    optimizer = make_optimizer(dataclasses.replace(CONFIG, clip_norm=0.0))
    params = {"kernel": jnp.ones((2, 2))}
    _, state = optimizer.update({"kernel": jnp.full((2, 2), 100.0)}, optimizer.init(params), params)
    assert float(optax.tree.get(state, "mu")["kernel"][0, 0]) == pytest.approx(10.0)  # (1 − β₁) × 100
