"""The command: JSON and text against arithmetic by hand, errors, and compiles for TPUs that are not attached."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gpt2_jax import plan
from gpt2_jax.config import MeshConfig
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS, Chip
from gpt2_jax.planning.fit import Change
from gpt2_jax.planning.topologies import devices_of
from gpt2_jax.sharding import make_mesh

RECORDED = json.loads((Path(__file__).parents[2] / "bench" / "results" / "scaling.json").read_text())
TINY = ["--config", "quickstart", "--batch_size", "16", "--model.n_layer", "1"]
SIMULATED = ["--topology", "cpu:8", "--mesh.fsdp", "2", "--micro_batch_size", "1"]
# Parameters of TINY by hand: wte, wpe, one block (two layer norms, c_attn, attn/c_proj, c_fc, mlp/c_proj), ln_f.
TINY_PARAMS = (
    257 * 192 + 128 * 192
    + 2 * 2 * 192 + (192 + 1) * 576 + (192 + 1) * 192 + (192 + 1) * 768 + (768 + 1) * 192
    + 2 * 192
)  # fmt: skip


def plan_of(capsys, *args):
    assert plan.main(["--json", *TINY, *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_for_simulated_devices(capsys):
    table = plan_of(capsys, *SIMULATED)
    assert (table["devices"], table["mesh"], table["micro_batches"]) == (8, {"data": 4, "fsdp": 2}, 2)
    assert table["tokens"] == 16 * 128
    assert table["n_params"] == TINY_PARAMS
    shapes = {name: shape for name, shape, _ in table["parameters"]}
    size = sum(math.prod(shape) for shape in shapes.values())
    assert size == TINY_PARAMS + (384 - 257) * 192  # the vocabulary is padded to a multiple of 128
    assert table["model_flops"] == (6 * (TINY_PARAMS - 128 * 192) + 12 * 192 * 128) * 16 * 128
    places = {name: where for name, _, where in table["parameters"]}
    assert places["wte/embedding"] == "dimension 0 over fsdp"
    assert places["h_0/ln_1/scale"] == "whole on each device"
    # 6 N + 12 L C T leaves out only the matmuls that recomputation and the padded vocabulary add.
    assert 1 <= table["hardware_flops"] / table["model_flops"] < 1.1
    reduced = [one for one in table["collectives"] if one["axes"] == ["data"]]
    assert sum(one["n_bytes"] for one in reduced) == pytest.approx(4 * size / 2, rel=0.02)  # matrices are halved
    assert table["memory"]["needed"] > 3 * 4 * size / 2  # parameters and two moments
    assert table["estimate"] is None  # the speed of a CPU is unknown


def test_find_with_too_few_sequences_says_so():
    with pytest.raises(UserError, match="4 sequences does not divide over 8 devices; set batch_size"):
        plan.main(["--config", "quickstart", "--find", "--topology", "v5e:2x4"])


def test_the_keys_of_the_json_stay(capsys, monkeypatch):
    """Programs read them: bench/results/scaling.json has the plans of earlier versions."""

    def fastest_change(config, devices, where):
        return Change(2, "none"), plan.make_plan(config, devices, where)

    monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v5 lite"])
    monkeypatch.setattr(plan, "fastest_change", fastest_change)
    table = plan_of(capsys, *SIMULATED, "--find")
    assert list(table) == [
        *("config", "where", "kind", "devices", "hosts", "mesh", "n_params", "attention", "attention_kernels"),
        *("attention_copies", "parameters", "micro_batches", "memory", "model_flops", "hardware_flops", "traffic"),
        *("cycles", "collectives", "estimate", "tokens", "found"),
    ]
    assert table["config"]["model"]["n_layer"] == 1
    assert table["attention"] == {
        "backend": "xla",
        "against": {"splash": "needs tpu, found cpu", "cudnn": "needs cuda, found cpu"},
    }
    assert list(table["memory"]) == ["needed", "available"]
    keys = ["kind", "axes", "devices", "times", "n_bytes", "slices", "overlapped_bytes",
            "matmul_overlapped_bytes", "sent"]  # fmt: skip
    assert list(table["collectives"][0]) == keys
    assert list(table["estimate"]) == ["compute", "memory", "links", "compiled", "least", "most", "mfu"]
    assert table["found"] == "--micro_batch_size 2 --model.remat none"


def test_a_plan_for_this_machine_as_text(capsys):
    assert plan.main(TINY) == 0
    text = capsys.readouterr().out
    assert "this machine's 8 × cpu" in text
    assert "xla; not splash: needs tpu, found cpu" in text
    assert "all-reduce over data" in text
    assert "0% of it beside matmuls, 0% beside other work only" in text
    assert "h_*/mlp/c_fc/kernel [192, 768]" in text


def test_the_help_names_every_flag(capsys):
    for args in (["--help"], ["--config", "quickstart", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            plan.main(args)
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert all(flag in text for flag in ("--topology", "--find", "--json", "--config"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology", "v9:2x2"], "unknown topology 'v9:2x2'; known are v2: 2x2, .*h200, .*cpu"),
        (["--topology", "h100"], "unknown topology 'h100'"),
        (["--topology", "cpu:" + "9" * 5000], "unknown topology 'cpu:9+'"),
        (["--topology", "cpu:99999"], "unknown topology 'cpu:99999'"),
        (["--topology", "cpu:²"], "unknown topology 'cpu:²'"),
        (["--topology", "v5e:2x" + "9" * 5000], "unknown topology 'v5e:2x9+'"),
        (["--topology", "2xh100:8"], "unknown topology '2xh100:8'"),
        (["--topology", "0xv5e:4x4"], "unknown topology '0xv5e:4x4'"),
        (["--topology"], "Missing value for argument '--topology'.*python -m gpt2_jax.plan --help"),
        (["--topology", "--json"], "Missing value for argument '--topology'"),
        (["--find", "yes"], "yes"),
        (["--topology", "cpu:9"], "cpu:9 needs 9 devices, and this process was started with 8; type --topology cpu:8"),
        (["--topology", "cpu:8", "--mesh.data", "3"], "mesh.data = 3 × mesh.fsdp = 1 does not make the 8 devices"),
        (["--topology", "cpu:8", "--batch_size", "12"], "a batch of 12 sequences does not divide over 8 devices"),
        (["--topology", "cpu:8", "--find"], "--find compares estimated times, and the speed of cpu:8 is unknown"),
        (["--topology", "cpu:8", "--model.attention", "splash"], "model.attention = 'splash' needs tpu, found cpu"),
    ],
)
def test_mistakes_are_one_clear_line(args, message):
    with pytest.raises(UserError, match=message):
        plan.main([*TINY, *args])


def test_a_config_that_does_not_fit_ends_with_the_excess_and_a_change_that_fits(monkeypatch, capsys):
    """On CPUs with little memory and invented speeds."""
    args = [*TINY, "--topology", "cpu:8", "--batch_size", "512"]
    assert plan.main([*args, "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["memory"]["needed"]
    small = Chip(flops=1e12, memory=0.8 * needed, bandwidth=1e11, link=1e10)
    monkeypatch.setitem(CHIPS, "cpu", small)
    with pytest.raises(UserError, match=r"needs .* GiB too much; type --micro_batch_size 32$"):
        plan.main(args)
    assert plan.main([*args, "--micro_batch_size", "32", "--json"]) == 0  # the change that the error names does fit
    table = json.loads(capsys.readouterr().out)
    assert table["memory"]["needed"] <= small.memory
    compute = table["hardware_flops"] / 8 / 1e12
    memory = table["traffic"] / 1e11
    links = sum(one["sent"] for one in table["collectives"]) / 1e10
    estimate = table["estimate"]
    assert [estimate[part] for part in ("compute", "memory", "links")] == pytest.approx([compute, memory, links])
    assert min(compute, memory, links) > 0
    assert estimate["least"] == pytest.approx(max(compute, memory, links))
    assert estimate["most"] == pytest.approx(compute + memory + links)
    peak = [table["model_flops"] / 8 / 1e12 / estimate[bound] for bound in ("most", "least")]
    assert estimate["mfu"] == pytest.approx(peak)


# --- TPUs that are not attached ------------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra plan, is not installed"
)
# As small as a step can be that runs the attention kernel: heads of 64, 256 tokens; bytes instead of 50,257 tokens.
SMALL = ["--model.n_head", "3", "--model.block_size", "256", "--batch_size", "64", "--micro_batch_size", "4"]
# Recorded plans. Two layers tell whether they lay out memory as they did, and compile in a third of the time. The third
# one is whole, and scans its layers.
CASES = {"gpt2-124m v5e:2x4": 2, "gpt2-124m v5p:2x2x4": 2, "gpt2-1558m v5e:4x4": 48}


@functools.cache
def tpu_plan(size, topology, *flags):
    """The JSON of the command, in a process of its own."""
    command = [sys.executable, "-m", "gpt2_jax.plan", "--config", size, "--topology", topology, "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kernel_calls(table):
    """One forward and one backward kernel per layer and micro-batch, and a second forward with rematerialization."""
    model = table["config"]["model"]
    forward = 2 if model["remat"] != "none" else 1
    return (forward + 1) * model["n_layer"] * table["micro_batches"]


def reduces_gradients_once(table, n_params):
    """Whether all that the devices send is one all-reduce over `data` of float32 gradients and the loss."""
    (reduction,) = table["collectives"]
    return (reduction["kind"], reduction["axes"], reduction["n_bytes"]) == ("all-reduce", ["data"], 4 * (n_params + 1))


@pytest.mark.slow
@needs_libtpu
def test_the_checker_of_silent_corruption_is_compiled_in():
    plain, checked = (tpu_plan("quickstart", "v5e:2x4", *SMALL, "--sdc_checker", word) for word in ("false", "true"))
    assert checked["memory"]["needed"] > plain["memory"]["needed"]  # of what it repeats and compares


@needs_libtpu
@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_a_small_training_step_compiles_for_tpu(remat):
    table = tpu_plan("quickstart", "v5e:2x4", *SMALL, "--model.remat", remat)
    assert table["attention"]["backend"] == "splash"
    assert (table["kind"], table["devices"], table["micro_batches"]) == ("TPU v5 lite", 8, 2)
    assert table["attention_kernels"] == kernel_calls(table)
    padded = table["n_params"] + (384 - 257) * 192
    assert reduces_gradients_once(table, padded)
    assert 3 * 4 * padded < table["memory"]["needed"] <= CHIPS[table["kind"]].memory
    estimate = table["estimate"]
    # The compiler's estimate cannot beat the chip's peak.
    assert table["hardware_flops"] / 8 / 197e12 < estimate["compiled"] <= estimate["least"] < estimate["most"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("case", CASES)
def test_the_training_step_compiles_for_tpu(case):
    recorded = RECORDED["results"][case]
    table = tpu_plan(*case.split(), *recorded["flags"], "--model.n_layer", str(CASES[case]))
    layers = read_config(case.split()[0]).model.n_layer
    assert table["attention"]["backend"] == "splash"
    assert table["attention_kernels"] == kernel_calls(table)
    assert table["memory"]["needed"] <= CHIPS[table["kind"]].memory
    assert table["micro_batches"] > 1
    if case.startswith("gpt2-124m"):  # data parallel
        assert reduces_gradients_once(table, table["n_params"] + (50304 - 50257) * 768)
    if RECORDED["jax"] != jax.__version__:  # another compiler makes another program
        return
    assert table["attention_copies"] / CASES[case] <= recorded["attention_copies"] / layers
    if CASES[case] == layers:
        assert table["n_params"] == recorded["n_params"]
        assert table["memory"]["needed"] == pytest.approx(recorded["memory"]["needed"], rel=0.05)
        assert table["estimate"]["most"] == pytest.approx(recorded["estimate"]["most"], rel=0.05)
        for ours, theirs in zip(table["collectives"], recorded["collectives"], strict=True):
            assert (ours["kind"], ours["axes"]) == (theirs["kind"], theirs["axes"])
            assert ours["n_bytes"] == pytest.approx(theirs["n_bytes"], rel=0.01)


@needs_libtpu
def test_a_mesh_that_does_not_map_onto_a_slice():
    message = "mesh.fsdp = 8 does not map onto a 4x4x1 slice; type --mesh.data -1 --mesh.fsdp 16"
    with pytest.raises(UserError, match=message):
        plan.main([*TINY, "--topology", "v6e:4x4", "--mesh.fsdp", "8"])
    sizes = {"v6e:4x4": [1, 4, 16], "v5p:2x2x4": [1, 2, 4, 8, 16], "v5e:4x4": [1, 2, 4, 8, 16]}
    for topology, fsdp in sizes.items():
        devices = devices_of(topology)
        assert [make_mesh(MeshConfig(-1, size), devices).shape["fsdp"] for size in fsdp] == fsdp


@needs_libtpu
def test_slices_that_do_not_exist():
    with pytest.raises(UserError, match="no such slice: v5e:3x3"):
        devices_of("v5e:3x3")
