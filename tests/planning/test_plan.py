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
from types import SimpleNamespace

import jax
import pytest

from gpt2_jax import plan
from gpt2_jax.config import MeshConfig
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS, Chip
from gpt2_jax.planning import estimate as estimates
from gpt2_jax.planning.topologies import devices_of
from gpt2_jax.sharding import make_mesh

RECORDED = json.loads((Path(__file__).parents[2] / "bench" / "results" / "scaling.json").read_text())
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
    assert table["model_flops"] == (6 * (table["n_params"] - 128 * 192) + 12 * 192 * 128) * table["tokens"]
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


def test_what_does_not_fit_says_by_how_much_and_what_would(monkeypatch, capsys):
    """On CPUs with a little memory, so that it can be seen without a chip."""
    args = [*TINY, "--topology", "cpu:8", "--batch_size", "512"]
    assert plan.main([*args, "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["memory"]["needed"]
    small = Chip(flops=1e12, memory=0.8 * needed, bandwidth=1e11, link=1e10)
    monkeypatch.setitem(CHIPS, "cpu", small)
    with pytest.raises(UserError, match=r"needs .* GiB too much; type --micro_batch_size 32$"):
        plan.main(args)
    assert plan.main([*args, "--micro_batch_size", "32", "--json"]) == 0  # the change that it names does fit
    table = json.loads(capsys.readouterr().out)
    assert table["memory"]["needed"] <= small.memory
    estimate = table["estimate"]
    assert 0 < estimate["least"] == max(estimate["compute"], estimate["memory"], estimate["links"])
    assert estimate["most"] == estimate["compute"] + estimate["memory"] + estimate["links"]


@pytest.fixture
def invented(monkeypatch):
    """Plans of which memory and time are invented, so that searching among them takes no compiler."""
    monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v5 lite"])
    tried = []

    def give(memory, seconds, available):
        def make_plan(config, devices, where):
            fsdp = config.mesh.fsdp if config.mesh.fsdp > 0 else len(devices)
            choice = (config.micro_batch_size or config.batch_size // len(devices), config.model.remat, fsdp)
            tried.append(choice)
            needed = estimates.Memory(memory(*choice), available)
            if not needed.fits:
                raise estimates.TooLargeError(needed)
            estimate = estimates.Estimate(compute=seconds(*choice), memory=0.0, links=0.0, compiled=None)
            return SimpleNamespace(memory=needed, estimate=estimate)

        monkeypatch.setattr(plan, "make_plan", make_plan)
        return tried

    return give


CONFIG = dataclasses.replace(read_config("gpt2-124m"), batch_size=512)  # 64 sequences for each of 8 devices


@pytest.mark.parametrize(
    ("available", "flags"),
    [
        (900, "--micro_batch_size 8"),  # 100 for the state and 100 for each sequence
        (199, "--micro_batch_size 1 --model.remat full"),
        (101, "--micro_batch_size 1 --model.remat full --mesh.data -1 --mesh.fsdp 8"),
        (1, None),
    ],
)
def test_the_smallest_change_that_fits(invented, available, flags):
    def memory(micro, remat, fsdp):
        return 100 // fsdp + (100 if remat == "none" else 50) * micro

    invented(memory, lambda *_: 1.0, available)
    assert plan.smallest_change(CONFIG, jax.devices(), "here") == flags


def test_find_takes_the_least_time_of_what_fits(invented):
    def memory(micro, remat, fsdp):
        return {"none": 8, "dots": 4, "full": 1}[remat] * micro

    def seconds(micro, remat, fsdp):
        return {"none": 10.5, "dots": 11, "full": 13}[remat] + 8 / micro

    tried = invented(memory, seconds, 33)
    flags, found = plan.find(CONFIG, jax.devices(), "here")
    assert flags == "--micro_batch_size 8 --model.remat dots"  # 12 s; none takes 12.5 at 4, full 13.25 at 32
    assert found.estimate.most == 12.0
    assert len(tried) <= 3 * 3  # of seven sizes for each policy
    invented(memory, seconds, 0)
    with pytest.raises(UserError, match="nothing fits on here, not even micro-batches of one"):
        plan.find(CONFIG, jax.devices(), "here")


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
        assert table["attention_copies"] <= recorded["attention_copies"]
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
    monkeypatch.setattr(estimates, "host_of", lambda device: device.id // 4)
    mesh = make_mesh(MeshConfig(2, 4), jax.devices())  # two hosts, `fsdp` within each
    chip = Chip(flops=1e12, memory=1e9, bandwidth=1e11, link=450, network=50)
    assert estimates._speed(chip, ("fsdp",), mesh) == 450
    assert estimates._speed(chip, ("data",), mesh) == 50
    assert estimates._speed(chip, ("data", "fsdp"), mesh) == 4 * 50
    assert estimates._speed(dataclasses.replace(chip, network=0), ("data",), mesh) == 450  # a TPU's links go everywhere
