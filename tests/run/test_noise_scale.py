"""The gradient noise scale: measured by the step, estimated without bias, and what it proposes."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from gpt2_jax import plan
from gpt2_jax import train as training
from gpt2_jax.config import LogConfig, MeshConfig, OptimizerConfig, TrainConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.errors import UserError
from gpt2_jax.metrics import read_rows
from gpt2_jax.model import GPT2
from gpt2_jax.reports.records import read_run
from gpt2_jax.run.noise_scale import NoiseScale, check_several_gradients, estimate, propose_ramp
from gpt2_jax.sharding import batch_sharding, make_mesh, put_batch
from gpt2_jax.step import init_state, make_train_step

OPTIMIZER = OptimizerConfig(warmup_steps=2, decay_steps=20)


def make_gradient_norm(model):
    """The norm of the gradient of the mean loss by Optax's cross-entropy, without the training step."""

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return jax.jit(lambda params, tokens: optax.tree.norm(jax.grad(loss)(params, tokens)))


@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation"),
    [(2, 2, 2)] + [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(1, 1, 4), (4, 1, 1), (1, 4, 2)]],
)
def test_the_norms_are_those_of_the_gradients_of_each_micro_batch(tiny_config, data, fsdp, accumulation):
    mesh = make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    model = GPT2(dataclasses.replace(tiny_config, n_layer=1))
    batch = np.random.default_rng(0).integers(0, 65, (accumulation, 16 // accumulation, 33), dtype=np.int32)
    state = init_state(model, OPTIMIZER, mesh, seed=0)
    params = jax.device_get(state.params)
    step = make_train_step(model, OPTIMIZER, mesh, 0, noise_scale=True)
    _, metrics = step(state, put_batch(batch, batch_sharding(mesh, leading_axis=True)))
    pieces = [piece for micro in batch for piece in np.split(micro, data)]
    gradient_norm = make_gradient_norm(model)
    norms = [float(gradient_norm(params, piece)) for piece in pieces]
    assert np.std(norms) > 0.005
    # Sums over devices and micro-batches in another order, of gradients that agree to 1e-5.
    assert float(metrics.micro_grad_norm) == pytest.approx(np.sqrt(np.mean(np.square(norms))), rel=2e-5)
    assert float(metrics.micro_grad_norm) > float(metrics.grad_norm)


def test_the_estimate_has_no_bias():
    """Gradients of 2,000 numbers: a true one of norm 0.5, and noise whose variances sum to 8. So the scale is 32."""
    rng = np.random.default_rng(0)
    sequences, micro, updates = 64, 8, 400
    true = np.full(2000, 0.5 / np.sqrt(2000))
    large, small = [], []
    for _ in range(updates):
        gradients = true + rng.normal(0, np.sqrt(8 / 2000 / micro), (sequences // micro, 2000))
        large.append(np.linalg.norm(gradients.mean(axis=0)))
        small.append(np.sqrt(np.mean(np.sum(gradients**2, axis=1))))
    columns = (np.arange(updates) * 100.0, np.array(large), np.array(small))
    found = estimate(*columns, np.full(updates, float(sequences)), np.full(updates, float(micro)))
    assert len(found.critical) == 20
    assert np.all(found.sequences == sequences)
    # Each of 20 estimates from 20 updates scatters by about 4%.
    assert found.critical.mean() == pytest.approx(32, rel=0.05)
    assert np.all(np.abs(found.critical / 32 - 1) < 0.25)
    assert estimate(*(column[:19] for column in columns), np.ones(19), np.ones(19)) is None


@pytest.mark.slow
def test_the_estimate_of_a_model_is_that_of_the_gradients_of_its_sequences(tiny_config):
    """tr(Σ)/|G|² directly, over the gradients of 64 sequences; the estimate, from updates on draws from them."""
    config = dataclasses.replace(tiny_config, n_layer=1, n_head=2, n_embd=32, block_size=16)
    mesh, model, updates = make_mesh(MeshConfig(2, 1), jax.devices()[:2]), GPT2(config), 200
    rng = np.random.default_rng(0)
    sequences = np.minimum(rng.geometric(0.1, (64, 17)), 64).astype(np.int32)
    still = dataclasses.replace(OPTIMIZER, learning_rate=0.0, final_learning_rate=0.0)
    state = init_state(model, still, mesh, seed=0)
    params = jax.device_get(state.params)

    def loss(params, sequence):
        logits = model.apply({"params": params}, sequence[None, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, sequence[None, 1:]).mean()

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, sequences)
    gradients = np.concatenate([np.float64(leaf).reshape(64, -1) for leaf in jax.tree.leaves(gradients)], axis=1)
    mean = gradients.mean(axis=0)
    direct = np.mean(np.sum((gradients - mean) ** 2, axis=1)) / np.sum(mean**2)

    step, sharding = make_train_step(model, still, mesh, 0, noise_scale=True), batch_sharding(mesh, leading_axis=True)
    rows = []
    for _ in range(updates):  # 2 micro-batches on 2 devices, of 4 sequences on each
        state, metrics = step(state, put_batch(sequences[rng.integers(0, 64, (2, 8))], sharding))
        rows.append((metrics.grad_norm, metrics.micro_grad_norm))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)
    large, small = np.float64(jax.device_get(rows)).T
    found = estimate(np.arange(updates) * 1.0, large, small, np.full(updates, 16.0), np.full(updates, 4.0)).critical
    # Ten estimates, each from 20 updates of their own. A ratio of means is biased by the square of its scatter, which
    # is below 0.1² and far inside of four standard errors of the mean of ten.
    assert len(found) == 10
    scatter = found.std(ddof=1)
    assert scatter < 0.1 * direct
    assert abs(found.mean() - direct) < 4 * scatter / np.sqrt(len(found))


def test_noise_that_hides_the_gradient_is_not_a_number():
    found = estimate(np.arange(20.0), np.full(20, 1.0), np.full(20, 4.0), np.full(20, 8.0), np.full(20, 1.0))
    assert np.isnan(found.critical).all()


@pytest.mark.parametrize(
    ("critical", "ramp"),
    [
        ([100, 100, 100, 100], []),  # worth it from the start
        ([5, 10, 20, 40], [(100, 4), (200, 8), (300, 16)]),
        ([5, 40, 20, 40], [(100, 4)]),  # it does not shrink again
        ([np.nan, 9, 9, 9], [(100, 1), (300, 8)]),  # never worth 16
    ],
)
def test_a_ramp_has_halves_of_the_batch_until_the_scale_reaches_them(critical, ramp):
    found = NoiseScale(np.array([0.0, 100, 200, 300]), np.full(4, 32.0), np.array(critical, float))
    assert propose_ramp(found, 32) == ramp


def test_an_update_with_one_gradient_is_refused():
    config = TrainConfig(out="run", steps=1, batch_size=32)
    check_several_gradients(config, {32: 1})
    config = dataclasses.replace(config, log=LogConfig(noise_scale=True))
    check_several_gradients(config, {8: 2, 32: 8})
    with pytest.raises(UserError, match=r"a batch of 8 sequences has one here; type --micro_batch_size 4 or less"):
        check_several_gradients(config, {8: 1, 32: 4})


@pytest.mark.slow
def test_a_run_and_the_ramp_that_it_proposes(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(400)))
    args = ["--config", "quickstart", "--steps", "60", "--batch_size", "16", "--micro_batch_size", "2", "--log.every",
            "1", "--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "2", "--model.block_size", "16",
            "--optimizer.warmup_steps", "2", "--eval.tokens", "16", "--eval.sample_tokens", "0",
            "--data.text", str(text), "--out", str(out), "--batch_ramp", "160", "8",
            "--log.noise_scale", "true"]  # fmt: skip
    assert training.train(parse_args("train", "", args), jax.devices()[:2]) == 0
    rows = [row for row in read_rows(out / "metrics.jsonl") if "loss" in row]
    assert [(row["sequences"], row["micro_sequences"]) for row in rows[:4]] == [(8, 2), (8, 2), (16, 2), (16, 2)]
    assert all(row["micro_grad_norm"] > row["grad_norm"] for row in rows)
    found = read_run(out, "run").noise_scale()
    assert len(found.critical) == 3
    capsys.readouterr()
    assert plan.main(["--ramp", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("noise       a scale of ")
    assert lines[1].startswith("ramp        ")
    with pytest.raises(UserError, match=r"--ramp goes without other flags"):
        plan.main(["--ramp", str(out), "--find"])
    for row in rows:
        del row["micro_grad_norm"]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"train it with --log.noise_scale true --log.every 1"):
        plan.main(["--ramp", str(out)])
