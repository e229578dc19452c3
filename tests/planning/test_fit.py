"""Searching for changes that fit: on plans with invented memory and time, so that no test waits for a compiler."""

from types import SimpleNamespace

import jax
import pytest

from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS, GIB
from gpt2_jax.planning import fit, micro_batch
from gpt2_jax.planning.estimate import Estimate, Memory, TooLargeError

PRESET = read_config("gpt2-124m")  # 512 sequences, 64 for each of 8 devices
CONFIG = fit.Change(64, "none").apply(PRESET)


@pytest.fixture
def invented(monkeypatch):
    """Replaces the compiler by functions of (micro-batch size, remat, fsdp)."""
    monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v5 lite"])
    tried = []

    def give(memory, seconds, available):
        def compile_step(config, devices, limit=available):
            fsdp = config.mesh.fsdp if config.mesh.fsdp > 0 else len(devices)
            choice = (config.micro_batch_limit, config.model.remat, fsdp)
            tried.append(choice)
            required = Memory(memory(*choice), limit)
            if not required.fits:
                raise TooLargeError(required)
            estimate = Estimate(compute=seconds(*choice), memory=0.0, communication=0.0, compiler_estimate=None)
            return SimpleNamespace(memory=required, estimate=estimate)

        monkeypatch.setattr(micro_batch, "compile_step", compile_step)
        monkeypatch.setattr(fit, "make_plan", lambda config, devices, where: compile_step(config, devices))
        return tried

    return give


def memory_of_state_and_sequences(micro, remat, fsdp):
    """GiB: 4 for the state, and 1 for each sequence; a half of that with recomputation."""
    return int((4 / fsdp + micro * {"none": 1, "dots": 0.75, "full": 0.5}[remat]) * GIB)


@pytest.mark.parametrize(
    ("available", "flags"),
    [
        (13, "--micro_batch_size 8"),  # 12 of 12.35 GiB, which are 95% of them
        (5.1, "--micro_batch_size 1 --model.remat dots"),
        (4.75, "--micro_batch_size 1 --model.remat full"),
        (4.4, "--micro_batch_size 2 --mesh.data -1 --mesh.fsdp 2"),
        (1.1, "--micro_batch_size 1 --model.remat full --mesh.data -1 --mesh.fsdp 8"),
        (0.5, None),
    ],
)
def test_the_smallest_change_that_fits(invented, available, flags):
    invented(memory_of_state_and_sequences, lambda *_: 1.0, 0)
    memory = Memory(memory_of_state_and_sequences(64, "none", 1), int(available * GIB))
    change = fit.smallest_change(CONFIG, jax.devices(), memory)
    assert (change and str(change)) == flags


def test_open_keys_stay_open_when_nothing_fits_on_one_device(invented):
    invented(memory_of_state_and_sequences, lambda *_: 1.0, 0)
    memory = Memory(memory_of_state_and_sequences(1, "full", 1), int(4.4 * GIB))
    assert str(fit.smallest_change(PRESET, jax.devices(), memory)) == "--mesh.data -1 --mesh.fsdp 2"


def test_sizes_of_fsdp_that_the_devices_do_not_allow_are_passed_over(invented, monkeypatch):
    invented(memory_of_state_and_sequences, lambda *_: 1.0, 0)
    compile_step = micro_batch.compile_step

    def only_whole_dimensions(config, devices, limit):
        if config.mesh.fsdp == 2:
            raise UserError("mesh.fsdp = 2 does not map onto the slice")
        return compile_step(config, devices, limit)

    monkeypatch.setattr(micro_batch, "compile_step", only_whole_dimensions)
    memory = Memory(memory_of_state_and_sequences(64, "none", 1), int(4.4 * GIB))
    change = fit.smallest_change(CONFIG, jax.devices(), memory)
    assert change.fsdp == 4


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
