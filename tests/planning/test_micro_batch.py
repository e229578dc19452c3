"""The search for the largest micro-batch: its rules with invented memory, and one search with the compiler."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import GIB
from gpt2_jax.planning import micro_batch
from gpt2_jax.planning.estimate import CompiledStep, Memory, TooLargeError, compile_step
from gpt2_jax.planning.micro_batch import fit

PRESETS = ("gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m")
PRESET = read_config(PRESETS[0])
RECORDED = json.loads((Path(__file__).parents[2] / "bench" / "results" / "scaling.json").read_text())["results"]
RECORDED = {name: row for name, row in RECORDED.items() if row["micro_batches"] > 1}


@pytest.fixture
def compiler(monkeypatch):
    """Replaces the compiler by a function of (micro-batch size, remat), in GiB. Lists its calls."""
    tried = []

    def give(memory):
        tried.clear()

        def compile_invented(config, devices, limit):
            key = (config.micro_batch_limit, config.model.remat)
            assert key not in tried
            tried.append(key)
            required = Memory(int(memory(*key) * GIB), limit)
            if not required.fits:
                raise TooLargeError(required)
            return CompiledStep(config, None, None, None, None, None, None, required)

        monkeypatch.setattr(micro_batch, "compile_step", compile_invented)
        return tried

    monkeypatch.setattr(micro_batch, "_ENOUGH_TOKENS_ON_CPU", micro_batch._ENOUGH_TOKENS)
    return give


def find(available, config=PRESET):
    found = fit(config, jax.devices()[:1], int(available * GIB), lambda line: None)
    return found.micro_batch_size, found.remat


@pytest.mark.parametrize("name", RECORDED)
def test_the_formula_is_close_to_what_compilers_say(name):
    """Plans of all sizes for TPUs and GPUs. The formula counts a sum over micro-batches, so it needs several."""
    row = RECORDED[name]
    size = row["batch_size"] // row["devices"] // row["micro_batches"]
    model = read_config(name.split()[0]).model
    remat = row["flags"][row["flags"].index("--model.remat") + 1]
    fixed, per_sequence = micro_batch.formula(model, remat, 2, row["mesh"]["fsdp"], False)
    assert fixed + size * per_sequence == pytest.approx(row["memory"]["needed"], rel=0.3)  # a first guess


def test_a_large_device_takes_one_compilation_and_no_more_than_enough_tokens(compiler):
    tried = compiler(lambda micro, remat: 2 + micro)
    assert find(2000) == (32, "none")
    assert tried == [(32, "none")]


@pytest.mark.parametrize("slope", [0.1, 0.3, 0.45, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("fixed", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("available", [15.0, 24.0, 80.0])
def test_the_largest_that_fits_is_found_in_three_compilations(compiler, slope, fixed, available):
    """However far the first guess is off, for memory that is linear in the micro-batch."""
    tried = compiler(lambda micro, remat: fixed + slope * micro)
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if fixed + slope * size <= micro_batch.USABLE * available]
    assert find(available) == (sizes[0], "none")
    assert len(tried) <= micro_batch.MAX_COMPILATIONS


def test_a_formula_that_is_off_costs_few_compilations(compiler):
    """All sizes on all cards, with memory up to 30% off the formula, and 10% more or less by rematerialization."""
    rng = np.random.default_rng(0)
    compilations, largest = [], []
    for preset, available in itertools.product(PRESETS, (6, 8, 11, 12, 15, 16, 22, 24, 32, 40, 48, 71, 79)):
        config = read_config(preset)
        for _ in range(5):
            off, slope = rng.uniform(0.7, 1.3, 2)
            factor = {remat: slope * rng.uniform(0.9, 1.1) for remat in micro_batch.REMATS}
            by_formula = {remat: micro_batch.formula(config.model, remat, 4, 1, True) for remat in factor}

            def required(micro, remat, off=off, factor=factor, by_formula=by_formula):
                fixed, per_sequence = by_formula[remat]
                return (off * fixed + factor[remat] * per_sequence * micro) / GIB

            tried = compiler(required)
            try:
                found, remat = find(available, config)
            except TooLargeError:
                assert required(1, "full") > micro_batch.USABLE * available
            else:
                assert required(found, remat) <= micro_batch.USABLE * available
                larger = required(2 * found, remat)
                largest.append(found == 32 or larger > micro_batch.USABLE * available)
            compilations.append(len(tried))
    assert max(compilations) <= micro_batch.MAX_COMPILATIONS
    assert np.mean(compilations) < 1.6
    assert np.mean(largest) > 0.95


def test_no_more_rematerialization_than_is_needed(compiler):
    compiler(lambda micro, remat: 5 + micro * {"none": 20, "dots": 3, "full": 1}[remat])
    assert find(19) == (4, "dots")
    compiler(lambda micro, remat: 5 + micro * {"none": 20, "dots": 15, "full": 3}[remat])
    assert find(19) == (4, "full")


def test_scanned_layers_take_dots_at_least(compiler):
    compiler(lambda micro, remat: 1 + micro)
    scanned = dataclasses.replace(PRESET, model=dataclasses.replace(PRESET.model, scan_layers=True))
    assert find(2000, scanned) == (32, "dots")


def test_what_the_user_sets_is_obeyed(compiler):
    model = dataclasses.replace(PRESET.model, remat="full")
    tried = compiler(lambda micro, remat: 2 + micro)
    assert find(2000, dataclasses.replace(PRESET, model=model)) == (32, "full")
    assert tried == [(32, "full")]
    compiler(lambda micro, remat: 2 + micro * {"none": 3, "dots": 2, "full": 1}[remat])
    assert find(36, dataclasses.replace(PRESET, micro_batch_size=16)) == (16, "dots")


def test_sizes_divide_the_share_of_every_batch(compiler):
    compiler(lambda micro, remat: 0.1 * micro)
    ramped = dataclasses.replace(PRESET, batch_size=48, batch_ramp=((10**6, 12), (10**7, 36)))
    assert find(2000, ramped) == (12, "none")
    with pytest.raises(UserError, match="a batch of 511 sequences does not divide over 8 devices"):
        fit(dataclasses.replace(PRESET, batch_size=511), jax.devices(), 10**9, lambda line: None)


def test_nothing_fits(compiler):
    compiler(lambda micro, remat: 20 + micro)
    with pytest.raises(TooLargeError) as error:
        find(16)
    assert error.value.memory.required == 21 * GIB


def test_without_a_limit_nothing_is_compiled(compiler):
    tried = compiler(lambda micro, remat: 1)
    found = fit(PRESET, jax.devices()[:1], None, lambda line: None)
    assert found[:2] == (32, "none")
    assert tried == []


def test_the_found_program_fits_and_the_next_larger_one_does_not():
    """With the compiler, for a device with 8 MiB."""
    model = GPT2Config(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=64)
    config = dataclasses.replace(PRESET, batch_size=32, model=model)
    lines = []
    available = 8 << 20
    found = fit(config, jax.devices()[:1], available, lines.append)
    assert 1 < found.micro_batch_size < 32
    assert found.compilations == len(lines) <= micro_batch.MAX_COMPILATIONS
    assert found.memory.required <= micro_batch.USABLE * available
    larger = dataclasses.replace(config, micro_batch_size=2 * found.micro_batch_size)
    assert compile_step(larger, jax.devices()[:1], 1 << 40).memory.required > micro_batch.USABLE * available
