"""Plans: what they say of a program against the program, for chips that are not there, and of what does not fit."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from gpt2_jax import cost, plan
from gpt2_jax.chips import CHIPS, Chip, devices_of
from gpt2_jax.config import MeshConfig, UserError
from gpt2_jax.config_file import read_config
from gpt2_jax.metrics import flops_per_token
from gpt2_jax.sharding import make_mesh

RECORDED = json.loads((Path(__file__).parents[1] / "bench" / "results" / "scaling.json").read_text())
TINY = ["--config", "quickstart", "--batch_size", "16", "--model.n_layer", "1"]


def plan_of(capsys, *args):
    assert plan.main([*TINY, *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_for_simulated_devices(capsys):
    table = plan_of(capsys, "--topology", "cpu:8", "--mesh.fsdp", "2", "--micro_batch_size", "1")
    assert (table["devices"], table["mesh"], table["micro_batches"]) == (8, {"data": 4, "fsdp": 2}, 2)
    assert table["tokens"] == 16 * 128
    shapes = {name: shape for name, shape, _ in table["parameters"]}
    size = sum(math.prod(shape) for shape in shapes.values())
    assert table["n_params"] == size - (384 - 257) * 192  # without the padding of the vocabulary
    assert table["model_flops"] == flops_per_token(table["n_params"] - 128 * 192, 1, 192, 128) * table["tokens"]
    places = {name: where for name, _, where in table["parameters"]}
    assert places["wte/embedding"] == "dimension 0 over fsdp"
    assert places["h_0/ln_1/scale"] == "whole on each device"
    # What 6 N + 12 L C T leaves out are only the products that recompute or that the padding adds.
    assert 1 <= table["hardware_flops"] / table["model_flops"] < 1.1
    reduced = [one for one in table["collectives"] if one["axes"] == ["data"]]
    assert sum(one["n_bytes"] for one in reduced) == pytest.approx(4 * size / 2, rel=0.02)  # each has half of most
    assert table["estimate"] is None  # nothing is known of a CPU's speed


def test_a_plan_for_this_machine_in_words(capsys):
    assert plan.main(TINY) == 0
    text = capsys.readouterr().out
    assert "this machine's 8 × cpu" in text
    assert "xla; not splash: needs tpu, found cpu" in text
    assert "all-reduce over data" in text
    assert "h_*/mlp/c_fc/kernel [192, 768]" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology", "v9:2x2"], "unknown topology 'v9:2x2'; known are v5e: 1x1, 2x2.*h200, cpu"),
        (["--topology", "h100"], "unknown topology 'h100'"),
        (["--topology"], "expected one argument; such as --topology v5e:4x4"),
        (["--topology", "cpu:9"], "more devices than the 8"),
        (["--topology", "cpu:8", "--mesh.data", "3"], "mesh.data = 3 × mesh.fsdp = 1 does not make the 8 devices"),
        (["--topology", "cpu:8", "--batch_size", "12"], "a batch of 12 sequences does not divide over 8 devices"),
        (["--topology", "cpu:8", "--find"], "--find compares estimates, and nothing is known of cpu:8"),
        (["--topology", "cpu:8", "--model.attention", "splash"], "model.attention = 'splash' needs tpu, found cpu"),
    ],
)
def test_mistakes_are_one_clear_line(args, message):
    with pytest.raises(UserError, match=message):
        plan.main([*TINY, *args])


@pytest.fixture
def small_chip(monkeypatch):
    """CPUs with a little memory, so that what does not fit can be seen without a chip."""

    def give(memory):
        chip = CHIPS["TPU v5 lite"]
        monkeypatch.setitem(CHIPS, "cpu", type(chip)(1e12, memory, 1e11, 1e10))

    return give


def test_what_does_not_fit_says_by_how_much_and_what_would(small_chip, capsys):
    args = [*TINY, "--topology", "cpu:8", "--batch_size", "512"]
    small_chip(10e9)
    assert plan.main([*args, "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["memory"]["needed"]
    small_chip(0.6 * needed)
    with pytest.raises(UserError, match=r"needs .* GiB too much; type --micro_batch_size (\d+)$") as error:
        plan.main(args)
    flags = str(error.value).rsplit("type ", 1)[1].split()
    assert plan.main([*args, *flags, "--json"]) == 0  # the change that it names does fit
    assert json.loads(capsys.readouterr().out)["memory"]["needed"] <= 0.6 * needed
    small_chip(1000)
    with pytest.raises(UserError, match="nothing smaller fits; take more chips"):
        plan.main([*args, "--model.n_layer", "1", "--batch_size", "8"])


def test_find_takes_the_least_time_of_what_fits(small_chip, capsys):
    small_chip(10e9)
    args = [*TINY, "--topology", "cpu:8", "--batch_size", "32"]
    assert plan.main([*args, "--find", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    flags = table["found"].split()
    assert plan.main([*args, *flags, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["estimate"] == table["estimate"]
    for other in ("1", "2", "4"):
        assert plan.main([*args, "--micro_batch_size", other, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["estimate"]["most"] >= table["estimate"]["most"]


# --- chips that are not there ----------------------------------------------------------------------------------

CASES = [("gpt2-124m", "v5e:2x4"), ("gpt2-124m", "v5p:2x2x4"), ("gpt2-124m", "v6e:2x4"), ("gpt2-1558m", "v5e:4x4")]


@pytest.fixture(scope="module")
def tpu_plans():
    """The plans of CASES, two compilers at a time: minutes."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, of the extra plan, is not installed")

    def run(case):
        size, topology = case
        flags = RECORDED["results"][f"{size} {topology}"]["flags"]
        command = [sys.executable, "-m", "gpt2_jax.plan", "--config", size, "--topology", topology, "--json", *flags]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_training_step_compiles_for_tpu(tpu_plans, case):
    size, topology = case
    table = tpu_plans[case]
    config = read_config(size)
    assert table["attention"]["backend"] == "splash"
    # Mosaic kernels: one forward and two backward per layer and micro-batch, and forward again where that is computed
    # again in the backward pass.
    forward = 2 if config.model.remat != "none" else 1
    assert table["attention_kernels"] == (forward + 2) * config.model.n_layer * table["micro_batches"]
    assert table["memory"]["needed"] <= CHIPS[table["kind"]].memory
    recorded = RECORDED["results"][f"{size} {topology}"]
    if RECORDED["jax"] == jax.__version__:  # another compiler makes another program
        assert table["memory"]["needed"] == pytest.approx(recorded["memory"]["needed"], rel=0.05)
        assert table["estimate"]["most"] == pytest.approx(recorded["estimate"]["most"], rel=0.05)
        for ours, theirs in zip(table["collectives"], recorded["collectives"], strict=True):
            assert (ours["kind"], ours["axes"]) == (theirs["kind"], theirs["axes"])
            assert ours["n_bytes"] == pytest.approx(theirs["n_bytes"], rel=0.01)


def test_data_parallel_gradients_cross_the_mesh_once(tpu_plans):
    table = tpu_plans["gpt2-124m", "v5e:2x4"]
    assert table["micro_batches"] > 1
    (reduction,) = table["collectives"]
    padded = table["n_params"] + (50304 - 50257) * 768
    assert (reduction["kind"], reduction["axes"]) == ("all-reduce", ["data"])
    assert reduction["n_bytes"] == 4 * (padded + 1)  # and the loss


def test_slices_that_do_not_exist():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, of the extra plan, is not installed")
    with pytest.raises(UserError, match="no such slice: v5e:3x3"):
        devices_of("v5e:3x3")


def test_devices_of_a_host_share_its_ports(monkeypatch):
    monkeypatch.setattr(cost, "host_of", lambda device: device.id // 4)
    mesh = make_mesh(MeshConfig(2, 4), jax.devices())  # two hosts, `fsdp` within each
    chip = Chip(flops=1e12, memory=1e9, bandwidth=1e11, link=450, network=50)
    assert cost._speed(chip, ("fsdp",), mesh) == 450
    assert cost._speed(chip, ("data",), mesh) == 50
    assert cost._speed(chip, ("data", "fsdp"), mesh) == 4 * 50
    assert cost._speed(dataclasses.replace(chip, network=0), ("data",), mesh) == 450  # a TPU's links go everywhere
