"""float16: an overflow anywhere is passed over everywhere, and a run resumes with the scale that it had."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax import loss_scale
from gpt2_jax import train as training
from gpt2_jax.checkpoint_info import read_info
from gpt2_jax.config import MeshConfig, OptimizerConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.loss_scale import skip_overflows
from gpt2_jax.metrics import read_rows
from gpt2_jax.model import GPT2
from gpt2_jax.outliers import pass_over, watch_outliers
from gpt2_jax.sharding import batch_sharding, make_mesh, put_batch
from gpt2_jax.step import abstract_state, init_state, make_train_step

FLOAT16 = jnp.dtype(jnp.float16)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2, decay_steps=20)


def mesh_of(data, fsdp=1):
    return make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])


def expected_scales(finite, interval):
    """The scale before each update and after the last: an overflow halves it, and after `interval` finite updates in a
    row the next finite one doubles it."""
    scales, in_a_row = [loss_scale.INITIAL_SCALE], 0
    for good in finite:
        grows = good and in_a_row == interval
        scales.append(scales[-1] * (2 if grows else 1 if good else 0.5))
        in_a_row = 0 if grows or not good else in_a_row + 1
    return scales


@pytest.mark.parametrize("watched", [False, True])
def test_an_overflow_halves_the_scale_and_is_passed_over(monkeypatch, watched):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    inner = optax.with_extra_args_support(optax.adamw(optax.constant_schedule(0.1)))
    optimizer = skip_overflows(watch_outliers(inner, 4, 1e9, skip=True) if watched else inner)
    params = {"w": jnp.ones(4), "b": jnp.zeros(2)}
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, value):
        grads = {"w": jnp.full(4, 0.5), "b": jnp.zeros(2).at[1].set(value)}
        updates, state = optimizer.update(grads, state, params, loss=value)
        return optax.apply_updates(params, updates), state

    values = [1, 1, np.inf, 1, 1, 1, 1, 1, np.nan, -np.inf, 1, 1, 1, 1]  # of one element of the gradient
    finite = np.isfinite(values)
    scales = expected_scales(finite, 3)
    assert min(scales) < scales[0] < max(scales[3:]) * 2
    for index, value in enumerate(values):
        assert float(state.scale.scale) == scales[index]
        before = jax.device_get((params, state))
        params, state = update(params, state, value)
        assert int(state.overflows) == np.sum(~finite[: index + 1])
        if watched:
            assert int(state.inner.seen) == np.sum(finite[: index + 1])
        inside = [(p, s.inner.inner if watched else s.inner) for p, s in (before, (params, state))]
        for old, new in zip(*map(jax.tree.leaves, inside), strict=True):
            if old.dtype == jnp.int32:  # the counts of Adam and of the schedule are the number of the update
                assert new == index + 1
            elif not finite[index]:
                np.testing.assert_array_equal(new, old)
        assert (params["w"] != before[0]["w"]).all() == finite[index]
    assert float(state.scale.scale) == scales[-1]


def test_passing_over_does_not_touch_the_scale():
    before = skip_overflows(optax.with_extra_args_support(optax.adam(0.1))).init({"w": jnp.ones(4)})
    after = pass_over(before)
    assert (after.scale, after.overflows) == (before.scale, before.overflows)
    assert int(optax.tree.get(after, "count")) == 1


def test_other_dtypes_have_no_scale(tiny_config):
    mesh, model = mesh_of(1), GPT2(dataclasses.replace(tiny_config, n_layer=1))
    tokens = jax.ShapeDtypeStruct((2, 2, 33), jnp.int32, sharding=batch_sharding(mesh, leading_axis=True))
    state, scaled = (abstract_state(model.clone(dtype=dtype), OPTIMIZER, mesh) for dtype in (model.dtype, FLOAT16))
    assert jax.tree.structure(scaled.opt_state.inner) == jax.tree.structure(state.opt_state)
    after, metrics = jax.eval_shape(make_train_step(model, OPTIMIZER, mesh, seed=0), state, tokens)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert (metrics.loss_scale, metrics.overflows) == (None, None)


# --- the step ------------------------------------------------------------------------------------------

# The gradients of a sequence that repeats one token all point the same way, and overflow at a scale of 52,000 if the
# sequence is a micro-batch. Those of one with random tokens overflow at 137,000.
SCALE = 80_000.0


@pytest.fixture(scope="module")
def batches(tiny_config):
    """Three batches of 16 sequences. In the second, one sequence repeats a token."""
    batches = np.random.default_rng(0).integers(0, tiny_config.vocab_size, (3, 16, 33), dtype=np.int32)
    batches[1, 5] = 7
    return batches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation", "change"),
    [(1, 1, 16, {}), (8, 1, 2, {}), (4, 2, 2, {"scan_layers": True, "remat": "dots"})],
)
def test_an_overflow_in_one_sequence_is_passed_over_on_all_devices(
    tiny_config, batches, data, fsdp, accumulation, change
):
    """One sequence per device and micro-batch, so the same one overflows however the batch is cut up."""
    mesh = mesh_of(data, fsdp)
    model = GPT2(dataclasses.replace(tiny_config, n_layer=1, **change), FLOAT16)
    state = init_state(model, OPTIMIZER, mesh, seed=0)
    scale = SCALE * fsdp  # a device's part of a micro-batch has 1/fsdp of its mean loss
    placed = jax.device_put(jnp.float32(scale), state.step.sharding)
    state = state._replace(opt_state=state.opt_state._replace(scale=state.opt_state.scale.replace(scale=placed)))
    step, sharding = make_train_step(model, OPTIMIZER, mesh, seed=0), batch_sharding(mesh, leading_axis=True)
    rows, params = [], [jax.device_get(state.params)]
    for batch in batches:
        state, metrics = step(state, put_batch(batch.reshape(accumulation, -1, 33), sharding))
        rows.append(jax.device_get(metrics))
        params.append(jax.device_get(state.params))
    assert [int(row.overflows) for row in rows] == [0, 1, 1]
    assert [float(row.loss_scale) for row in rows] == [scale, scale, scale / 2]
    assert [bool(np.isfinite(row.grad_norm)) for row in rows] == [True, False, True]
    assert all(np.isfinite(row.loss) and np.isfinite(row.param_norm) for row in rows)
    jax.tree.map(np.testing.assert_array_equal, params[1], params[2])
    for before, after in (params[:2], params[2:]):
        assert all((b != a).any() for b, a in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    for leaf in jax.tree.leaves((state.opt_state.scale, state.opt_state.overflows)):
        assert len({float(shard.data) for shard in leaf.addressable_shards}) == 1  # all devices agree
    assert int(state.step) == 3
    assert {int(count) for _, count in optax.tree.get_all_with_path(state.opt_state.inner, "count")} == {3}


# --- runs ----------------------------------------------------------------------------------------------

TINY = ["--config", "quickstart", "--dtype", "float16", "--steps", "12", "--batch_size", "8",
        "--micro_batch_size", "4", "--model.block_size", "16", "--model.n_layer", "1", "--model.n_head", "2",
        "--model.n_embd", "16", "--optimizer.learning_rate", "1e-2", "--optimizer.warmup_steps", "2",
        "--optimizer.decay_steps", "12",
        "--optimizer.on_outlier", "stop",  # an overflow is no outlier
        "--checkpoint.every", "4", "--checkpoint.keep", "9", "--eval.every", "0", "--eval.sample_tokens", "0",
        "--log.every", "1"]  # fmt: skip


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{number} squared is {number * number}\n" for number in range(100)))
    return [*TINY, "--data.text", str(tmp_path / "text.txt")]


def train(flags, out, *more):
    """Trains on one device, and returns the rows without times and the fingerprint of the last state."""
    config = parse_args("train", "", [*flags, "--out", str(out), *map(str, more)])
    assert training.train(config, jax.devices()[:1]) == 0
    rows = [row | {"tokens_per_second": None} for row in read_rows(out / "metrics.jsonl")]
    return rows, read_info(out / "checkpoints" / str(config.steps))["fingerprint"]["state"]


def test_a_run_passes_over_overflows_and_resumes_exactly(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**19)
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 1)  # the scale grows at every second update, until it overflows
    rows, fingerprint = train(flags, tmp_path / "whole")
    skipped = [row for row in rows if "skipped" in row]
    done = [row for row in rows if "loss" in row]
    assert [row["step"] for row in sorted(skipped + done, key=lambda row: row["step"])] == list(range(1, 13))
    assert len(skipped) > 1
    assert len(done) > 5
    assert rows[-1]["val_loss"] < 6
    for number, row in enumerate(skipped, start=1):
        assert re.fullmatch(r"overflow of float16: loss \d.*, gradient norm (inf|nan) at loss scale .*", row["skipped"])
        assert row["overflows"] == number
        assert row["tokens"] == row["step"] * 8 * 16
    output = capsys.readouterr().out
    assert f"float16   {len(skipped)} of 12 updates skipped, because a gradient overflowed\n" in output
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(step))
    assert train(flags, tmp_path / "killed") == (rows, fingerprint)


OVERFLOWS = (3, 40, 41, 90, 104, 107, 108, 171, 200)  # by update: in a row, before and after the kill, the last


def train_with_overflows(args, killed_after=0):
    """Trains with a loss scale so large in some updates that gradients overflow, and 2^64 times as large as it was."""
    loss_scale.INITIAL_SCALE, loss_scale.GROWTH_INTERVAL = 2.0**9, 30

    @jax.jit
    def scaled(state, factor):
        scale = state.opt_state.scale
        return state._replace(opt_state=state.opt_state._replace(scale=scale.replace(scale=scale.scale * factor)))

    def make(*args):
        step = make_train_step(*args)

        def update(state, tokens):
            number = int(jax.device_get(state.step)) + 1
            with jax.transfer_guard("allow"):
                state = scaled(state, 2.0**64) if number in OVERFLOWS else state
            state, metrics = step(state, tokens)
            with jax.transfer_guard("allow"):
                state = scaled(state, 2.0**-64) if number in OVERFLOWS else state
            if number == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return state, metrics

        update.lower = step.lower
        return update

    training.make_train_step = make
    return training.train(parse_args("train", "", args), jax.devices()[:1])


@pytest.mark.slow
def test_200_updates_on_real_text_with_overflows_killed_and_resumed(shared_data, tmp_path, monkeypatch, capsys):
    """The overflows are those of float16 itself, in updates that are known."""
    for module, name in ((loss_scale, "INITIAL_SCALE"), (loss_scale, "GROWTH_INTERVAL"), (training, "make_train_step")):
        monkeypatch.setattr(module, name, getattr(module, name))  # `train_with_overflows` sets them
    args = [*TINY, "--steps", "200", "--optimizer.decay_steps", "200", "--model.block_size", "32",
            "--model.n_embd", "32", "--checkpoint.every", "50", "--data.val_fraction", "0.01",
            "--data.text", str(shared_data / "tinyshakespeare.txt")]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    in_parts = [*args, "--out", str(parts)]
    code = f"import test_loss_scale; test_loss_scale.train_with_overflows({in_parts}, killed_after=149)"
    killed = subprocess.run([sys.executable, "-c", f"import conftest; {code}"], cwd=Path(__file__).parent, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert train_with_overflows(in_parts) == 0
    # The kill may come before the save of update 100 is complete.
    assert re.search(r" resumed after update (50|100)\n", capsys.readouterr().out)
    assert train_with_overflows([*args, "--out", str(whole)]) == 0

    def rows_of(out):
        return [row | {"tokens_per_second": None} for row in read_rows(out / "metrics.jsonl")]

    rows = rows_of(whole)
    assert rows_of(parts) == rows
    of_both = [read_info(out / "checkpoints" / "200")["fingerprint"] for out in (whole, parts)]
    assert of_both[0] == of_both[1]
    updates = {row["step"]: row for row in rows if "skipped" in row or "loss" in row}
    assert list(updates) == list(range(1, 201))
    assert [step for step, row in updates.items() if "skipped" in row] == list(OVERFLOWS)
    assert [row["overflows"] for row in updates.values() if "skipped" in row] == list(range(1, len(OVERFLOWS) + 1))
    scales = [row["loss_scale"] for row in updates.values()]
    finite = [step not in OVERFLOWS for step in updates]
    expected = expected_scales(finite, 30)
    assert scales == [scale * (1 if good else 2.0**64) for scale, good in zip(expected[:-1], finite, strict=True)]
    assert rows[-1]["val_loss"] < 3.5  # 5.6 at the start, a uniform guess; the frequencies of bytes alone give 3.3
