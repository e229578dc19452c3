"""Searching for changes that fit: on plans with invented memory and time, so that no test waits for a compiler."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS
from gpt2_jax.planning import fit
from gpt2_jax.planning.estimate import Estimate, Memory, TooLargeError

CONFIG = dataclasses.replace(read_config("gpt2-124m"), batch_size=512)  # 64 sequences for each of 8 devices


@pytest.fixture
def invented(monkeypatch):
    """Replaces `make_plan` by functions of (micro-batch size, remat, fsdp)."""
    monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v5 lite"])
    tried = []

    def give(memory, seconds, available):
        def make_plan(config, devices, where):
            fsdp = config.mesh.fsdp if config.mesh.fsdp > 0 else len(devices)
            choice = (config.micro_batch_size or config.batch_size // len(devices), config.model.remat, fsdp)
            tried.append(choice)
            required = Memory(memory(*choice), available)
            if not required.fits:
                raise TooLargeError(required)
            estimate = Estimate(compute=seconds(*choice), memory=0.0, communication=0.0, compiler_estimate=None)
            return SimpleNamespace(memory=required, estimate=estimate)

        monkeypatch.setattr(fit, "make_plan", make_plan)
        return tried

    return give


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
    change = fit.smallest_change(CONFIG, jax.devices(), "here")
    assert (change and str(change)) == flags


def test_sizes_of_fsdp_that_the_devices_do_not_allow_are_passed_over(invented, monkeypatch):
    invented(lambda micro, remat, fsdp: 100 // fsdp + 50, lambda *_: 1.0, 101)
    make_plan = fit.make_plan

    def only_whole_dimensions(config, devices, where):
        if config.mesh.fsdp == 2:
            raise UserError("mesh.fsdp = 2 does not map onto the slice")
        return make_plan(config, devices, where)

    monkeypatch.setattr(fit, "make_plan", only_whole_dimensions)
    change = fit.smallest_change(CONFIG, jax.devices(), "here")
    assert str(change) == "--mesh.data -1 --mesh.fsdp 4"


def test_the_fastest_change_that_fits(invented):
    def memory(micro, remat, fsdp):
        return {"none": 8, "dots": 4, "full": 1}[remat] * micro

    def seconds(micro, remat, fsdp):
        return {"none": 10.5, "dots": 11, "full": 13}[remat] + 8 / micro

    tried = invented(memory, seconds, 33)
    change, plan = fit.fastest_change(CONFIG, jax.devices(), "here")
    # 12 s. "none" takes 12.5 s at its largest size, 4, and "full" 13.25 s at 32.
    assert str(change) == "--micro_batch_size 8 --model.remat dots"
    assert plan.estimate.upper_bound == 12.0
    assert len(tried) <= 3 * 3  # bisection of seven sizes for each policy
    invented(memory, seconds, 0)
    with pytest.raises(UserError, match="nothing fits on here, not even micro-batches of one"):
        fit.fastest_change(CONFIG, jax.devices(), "here")


def test_a_change_of_a_config():
    changed = fit.Change(4, "full", 8).apply(CONFIG)
    assert (changed.micro_batch_size, changed.model.remat, changed.mesh.data, changed.mesh.fsdp) == (4, "full", -1, 8)
    assert changed.batch_size == CONFIG.batch_size
    assert fit.Change().apply(CONFIG) == CONFIG
