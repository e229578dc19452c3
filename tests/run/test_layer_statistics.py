"""Statistics of layers: activations against `transformers`, norms against plain gradients, and rows of a run."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch_gpt2 import as_params, torch_gpt2

from gpt2_jax import report
from gpt2_jax import train as training
from gpt2_jax.config import GPT2Config, MeshConfig, OptimizerConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.layers import layer_names, norms_by_layer, stack_layers
from gpt2_jax.metrics import read_rows
from gpt2_jax.model import GPT2
from gpt2_jax.reports.following import _values
from gpt2_jax.reports.records import read_run
from gpt2_jax.run.layer_statistics import SATURATED, make_add_activations, to_row
from gpt2_jax.sharding import batch_sharding, make_mesh, put_batch
from gpt2_jax.step import Metrics, init_state, make_train_step

SMALL = GPT2Config(vocab_size=300, block_size=32, n_layer=3, n_head=4, n_embd=64, attention="xla")
OPTIMIZER = OptimizerConfig(warmup_steps=2, decay_steps=20)
TINY = ["--config", "quickstart", "--steps", 6, "--batch_size", 4, "--log.every", 1, "--optimizer.warmup_steps", 2,
        "--model.n_layer", 2, "--model.n_embd", 16, "--model.n_head", 2, "--model.block_size", 16,
        "--eval.tokens", 16, "--eval.sample_tokens", 0]  # fmt: skip
NONE = Metrics(*[jnp.zeros(())] * 4)


def reference(config, tokens):
    """The model of transformers, and its statistics by hooks and `output_attentions`."""
    theirs = torch_gpt2(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "c_fc" in name or "c_attn" in name:  # GELUs that saturate, and attention that is not even
                parameter *= 15
    theirs.set_attn_implementation("eager")
    inputs = []
    residuals = []
    for block in theirs.transformer.h:
        block.mlp.c_fc.register_forward_hook(lambda module, args, output: inputs.append(output))
        block.register_forward_hook(
            lambda module, args, output: residuals.append(output[0] if isinstance(output, tuple) else output)
        )
    attentions = theirs(torch.from_numpy(tokens).long(), output_attentions=True).attentions
    derivatives = []
    for x in inputs:
        x = x.detach().requires_grad_()
        torch.nn.functional.gelu(x, approximate="tanh").sum().backward()
        derivatives.append(x.grad)
    return theirs, {
        "residual_rms": [x.square().mean().sqrt().item() for x in residuals],
        "saturated_gelu": [(x.abs() < SATURATED).double().mean().item() for x in derivatives],
        "attention_entropy": [-torch.special.xlogy(x, x).sum(-1).mean().item() for x in attentions],
    }


@pytest.mark.parametrize("scan_layers", [False, True])
def test_activations_are_those_of_transformers(scan_layers):
    tokens = np.random.default_rng(0).integers(0, 300, (1, 8, 33), dtype=np.int32)
    theirs, expected = reference(SMALL, tokens[0, ::4, :-1])  # one sequence of each of two devices
    config = dataclasses.replace(SMALL, scan_layers=scan_layers, remat="full" if scan_layers else "none")
    params = as_params(theirs.state_dict(), SMALL)
    params = stack_layers(params) if scan_layers else params
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    add = make_add_activations(GPT2(config), mesh)
    metrics = add(NONE, params, put_batch(tokens, batch_sharding(mesh, leading_axis=True)))
    assert min(expected["saturated_gelu"]) > 0.05
    assert max(expected["attention_entropy"]) < 2.0  # even attention would have 2.6
    for name, values in expected.items():
        # float32, summed in another order; one GELU beside the limit may fall on the other side
        tolerance = {"rel": 1e-4, "abs": 2 / (2 * 32 * 256) if name == "saturated_gelu" else 0.0}
        assert metrics.layers[name].tolist() == pytest.approx(values, **tolerance), name


@pytest.mark.parametrize(
    ("data", "fsdp", "scan_layers"),
    [(1, 2, True)] + [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(2, 2, True), (1, 1, False)]],
)
def test_norms_are_those_of_plain_gradients_and_of_the_change_of_the_weights(data, fsdp, scan_layers):
    mesh = make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    model = GPT2(dataclasses.replace(SMALL, scan_layers=scan_layers))
    batch = np.random.default_rng(0).integers(0, 300, (2, 4, 33), dtype=np.int32)
    state = init_state(model, OPTIMIZER, mesh, seed=0)
    before = jax.device_get(state.params)
    step = make_train_step(model, OPTIMIZER, mesh, 0, layers=True)
    state, metrics = step(state, put_batch(batch, batch_sharding(mesh, leading_axis=True)))

    def loss(params):
        logits = model.apply({"params": params}, batch.reshape(8, 33)[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.reshape(8, 33)[:, 1:]).mean()

    def norms(tree):
        return {name: float(optax.tree.norm(tree[name])) for name in layer_names(3) if name in tree}

    grads = jax.device_get(jax.jit(jax.grad(loss))(before))
    change = jax.tree.map(lambda new, old: new - old, jax.device_get(state.params), before)
    if scan_layers:
        grads, change, before = (
            {**tree, **{f"h_{layer}": jax.tree.map(lambda x, layer=layer: x[layer], tree["h"]) for layer in range(3)}}
            for tree in (grads, change, before)
        )
    found = to_row(jax.device_get(metrics.layers))
    assert list(found["grad_norm"]) == layer_names(3)
    # Two gradients that agree to 1e-5; the difference of two weights has lost some of its digits.
    assert found["grad_norm"] == pytest.approx(norms(grads), rel=5e-5)
    old = norms(before)
    assert found["update_ratio"] == pytest.approx({name: x / old[name] for name, x in norms(change).items()}, rel=1e-3)
    assert float(metrics.grad_norm) == pytest.approx(np.linalg.norm([*found["grad_norm"].values()]), rel=1e-5)


def test_stacked_layers_have_the_same_norms():
    named = {name: {"a": jnp.arange(4.0) + number} for number, name in enumerate(layer_names(12))}
    params = jax.tree.map(lambda leaf: leaf, named)  # as in a program: sorted by name, h_10 before h_2
    expected = [np.linalg.norm(np.arange(4.0) + number) for number in range(15)]
    np.testing.assert_allclose(norms_by_layer(params), expected, rtol=1e-6)
    np.testing.assert_allclose(norms_by_layer(stack_layers(params)), expected, rtol=1e-6)


def test_a_value_that_is_not_finite_is_null():
    assert to_row({"residual_rms": np.array([1.23456789, np.inf])}) == {"residual_rms": {"h_0": 1.23457, "h_1": None}}


@pytest.fixture
def run(tmp_path):
    """Trains and returns the losses, and the rows about layers."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(200)))

    def run(name, *flags):
        args = [*TINY, "--data.text", text, "--out", tmp_path / name, *flags]
        assert training.train(parse_args("train", "", [str(arg) for arg in args]), jax.devices()[:2]) == 0
        rows = list(read_rows(tmp_path / name / "metrics.jsonl"))
        return [row["loss"] for row in rows if "loss" in row], [row for row in rows if "layers" in row]

    return run


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ((), [(False, False)]),
        (("--log.layers", 3), [(False, True), "activations"]),
        (("--log.noise_scale", "true", "--micro_batch_size", 1), [(True, False)]),
    ],
)
def test_a_run_makes_no_program_that_its_log_does_not_ask_for(run, monkeypatch, flags, asked):
    class MadeError(Exception):
        """Stops the run when its programs for training are made."""

    def stop(*args):
        raise MadeError

    made = []
    monkeypatch.setattr(training, "make_train_step", lambda *args: made.append(args[5:]))
    monkeypatch.setattr(training, "make_add_activations", lambda *args: made.append("activations"))
    monkeypatch.setattr(training, "make_eval_step", stop)
    with pytest.raises(MadeError):
        run("run", *flags)
    assert made == asked


@pytest.mark.slow
def test_they_do_not_change_what_is_trained(run):
    plain, none = run("plain")
    assert none == []
    # The same mathematics in a program that is fused in another way.
    assert run("layers", "--log.layers", 3)[0] == pytest.approx(plain, rel=1e-6)


def test_rows_of_a_run_and_what_is_shown_of_them(run, tmp_path):
    _, rows = run("layers", "--log.layers", 3)
    assert [row["step"] for row in rows] == [3, 6]
    assert {*rows[0]["layers"]} == {"grad_norm", "update_ratio", "residual_rms", "saturated_gelu", "attention_entropy"}
    assert list(rows[0]["layers"]["attention_entropy"]) == ["h_0", "h_1"]
    assert 0 < rows[0]["layers"]["attention_entropy"]["h_0"] < np.log(16)
    assert _values(rows[1])["grad_norm/h_1"] == rows[1]["layers"]["grad_norm"]["h_1"]
    tokens, names, values = read_run(tmp_path / "layers", "layers").layers["update_ratio"]
    assert tokens.tolist() == [3 * 64, 6 * 64]
    assert (names, values.shape) == (layer_names(2), (5, 2))
    shutil.copytree(tmp_path / "layers", tmp_path / "plain")
    lines = (tmp_path / "layers" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "plain" / "metrics.jsonl").write_text("".join(line for line in lines if '"layers"' not in line))
    out = tmp_path / "report.html"
    assert report.main([str(tmp_path / "layers"), str(tmp_path / "plain"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count("<h2>Layers of layers</h2>") == 1
    assert "Layers of plain" not in page
    assert json.dumps("attention entropy (nats)") in page
