"""Estimates: bounds and link speeds by hand, and the TPU compiler's error for a program that is too large."""

import dataclasses
import importlib.util

import pytest

from gpt2_jax.config.toml import read_config
from gpt2_jax.hardware import Chip
from gpt2_jax.planning import estimate as estimates
from gpt2_jax.planning.collectives import Collective
from gpt2_jax.planning.topologies import devices_of


@pytest.mark.parametrize(
    ("seconds", "lower", "upper"),
    [
        ({"compute": 3, "memory": 2, "communication": 1, "compiler_estimate": None}, 3, 6),
        ({"compute": 1, "memory": 2, "communication": 4, "compiler_estimate": None}, 4, 7),
        ({"compute": 3, "memory": 2, "communication": 1, "compiler_estimate": 8}, 8, 9),
        ({"compute": 3, "memory": 2, "communication": 10, "compiler_estimate": 8}, 10, 18),
    ],
)
def test_the_bounds_are_full_overlap_and_none(seconds, lower, upper):
    estimate = estimates.Estimate(**seconds)
    assert (estimate.lower_bound, estimate.upper_bound) == (lower, upper)


@pytest.mark.parametrize(
    ("axes", "devices", "slices", "speed"),
    [(("fsdp",), 4, 1, 450), (("data",), 2, 2, 50), (("data", "fsdp"), 8, 2, 4 * 50), (("data", "fsdp"), 80, 2, 450)],
)
def test_devices_of_a_slice_share_its_ports(axes, devices, slices, speed):
    chip = Chip(flops=1e12, memory=1e9, bandwidth=1e11, link=450, network=50)
    collective = Collective("all-reduce", axes, devices, 1, 1000, slices)
    assert estimates._link_speed(chip, collective) == speed
    joined = dataclasses.replace(chip, network=0)  # the links connect everything
    assert estimates._link_speed(joined, collective) == 450


GIB = 2**30


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: HLO temporaries (20.5G) exceeds available HBM (15.75G).", (20.5 * GIB, 15.75 * GIB)),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 1.5T of 95.00G hbm.", (1536 * GIB, 95 * GIB)),
        ("INVALID_ARGUMENT: Used 20.5G of 15.75G hbm.", None),
        ("RESOURCE_EXHAUSTED: too many requests", None),
    ],
)
def test_out_of_memory_errors_are_parsed(message, expected):
    assert estimates.parse_out_of_memory(message) == expected


def test_a_program_too_large_for_a_tpu():
    """With the real compiler, which refuses the program before it does any work."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, of the extra plan, is not installed")
    config = read_config("quickstart")
    model = dataclasses.replace(config.model, n_head=3, block_size=256)
    config = dataclasses.replace(config, model=model, batch_size=8 * 32768)
    with pytest.raises(estimates.TooLargeError) as error:
        estimates.make_plan(config, devices_of("v5e:2x4"), "v5e:2x4")
    memory = error.value.memory
    assert memory.available is not None
    assert 15 * GIB < memory.available <= 16 * GIB
    # The hidden activations of two MLPs alone, bfloat16 [32768 sequences, 256, 4 × 192], take 24 GiB.
    assert memory.required > 24 * GIB
