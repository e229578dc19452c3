"""Chips that are not attached: what XLA is told about GPUs, and several slices of TPUs."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from gpt2_jax.attention import choose
from gpt2_jax.attention.backend import Problem
from gpt2_jax.config import MeshConfig
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS, Hardware, hardware_of, host_of, slice_of
from gpt2_jax.planning.topologies import _GENERATIONS, GPUS, devices_of
from gpt2_jax.sharding import make_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra plan, is not installed"
)
needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="no CUDA plugin, of the extras cuda12 and cuda13, is installed",
)


@pytest.mark.parametrize("name", GPUS)
def test_what_xla_is_told_about_a_gpu(name):
    gpu = GPUS[name]
    assert gpu.kind in CHIPS
    assert gpu.capability in _GENERATIONS
    # The matrix units of a core do a power of two of FLOPs per cycle: 512 on GeForce cards to 8,192 on B200. The peaks
    # are for clocks that differ from the highest one by up to 15%.
    per_cycle = CHIPS[gpu.kind].flops / gpu.cores / (gpu.clock_ghz * 1e9)
    assert min(abs(per_cycle / 2**power - 1) for power in range(9, 14)) < 0.15


@needs_cuda
@pytest.mark.parametrize("name", GPUS)
def test_gpus_that_are_not_attached(name):
    """XLA accepts the description, and the attention backend follows from the compute capability."""
    devices = devices_of(f"{name}:2")
    hardware = hardware_of(devices[0])
    major, minor = GPUS[name].capability
    assert hardware == Hardware("cuda", major + minor / 10, GPUS[name].kind)
    assert [device.device_kind for device in devices] == [GPUS[name].kind] * 2
    choice = choose("auto", Problem(hardware, jax.numpy.float16, 1024, 64, 0.0))
    assert choice.backend == ("cudnn" if major >= 8 else "xla")


@needs_cuda
def test_hosts_of_gpus_are_slices():
    devices = devices_of("a10g:16")
    assert [slice_of(device) for device in devices] == [0] * 8 + [1] * 8
    assert [host_of(device) for device in devices] == [0] * 8 + [1] * 8
    mesh = make_mesh(MeshConfig(-1, 4), devices)
    assert all(len({slice_of(device) for device in group}) == 1 for group in mesh.devices)
    rack = devices_of("gb200:72")
    assert ({slice_of(device) for device in rack}, len({host_of(device) for device in rack})) == ({0}, 18)
    with pytest.raises(UserError, match="12 GPUs do not fill whole hosts of 8; take 8 or 16"):
        devices_of("t4:12")


def plan(*flags):
    """The JSON of a small step, compiled in a process of its own."""
    small = ["--config", "quickstart", "--model.n_head", "3", "--model.n_layer", "2", "--model.block_size", "256"]
    command = [sys.executable, "-m", "gpt2_jax.plan", *small, "--batch_size", "64", "--micro_batch_size", "2", *flags]
    environment = {**os.environ, "XLA_FLAGS": "", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize(("topology", "backend"), [("t4:1", "xla"), ("rtx-3090:2", "cudnn"), ("rtx-5090:1", "cudnn")])
def test_a_small_step_compiles_for_gpus_of_each_generation(topology, backend):
    table = plan("--topology", topology)
    assert table["attention"]["backend"] == backend
    # One forward and one backward kernel per layer and micro-batch.
    calls = 2 * 2 * table["micro_batches"] if backend == "cudnn" else 0
    assert table["attention_kernels"] == calls
    assert table["memory"]["needed"] > 3 * 4 * table["n_params"]
    assert table["estimate"]["mfu"][0] > 0


# --- Several slices of TPUs -------------------------------------------------------------------------------


@needs_libtpu
def test_slices_of_tpus_that_are_not_attached():
    devices = devices_of("2xv5e:2x4")
    assert [slice_of(device) for device in devices] == [0] * 8 + [1] * 8
    assert sorted({host_of(device) for device in devices}) == [0, 1, 2, 3]
    for fsdp in (1, 2, 4, 8):
        mesh = make_mesh(MeshConfig(-1, fsdp), devices)
        assert all(len({slice_of(device) for device in group}) == 1 for group in mesh.devices)
    mesh = make_mesh(MeshConfig(1, -1), devices)  # across both, if asked for
    assert [slice_of(device) for device in mesh.devices.flat] == [0] * 8 + [1] * 8
    with pytest.raises(UserError, match=r"mesh\.fsdp = 8 does not map onto a 4x4x1 slice"):
        make_mesh(MeshConfig(-1, 8), devices_of("2xv6e:4x4"))


@needs_libtpu
@pytest.mark.parametrize(("shape", "devices"), [("v2:2x2", 8), ("v3:2x2", 8), ("v4:2x2x1", 4), ("tpu7x:2x2x1", 8)])
def test_older_and_newer_tpus(shape, devices):
    """On v2, v3 and 7x a core is a device. JAX's names of all are in the table."""
    found = devices_of(shape)
    assert len(found) == devices
    assert found[0].device_kind in CHIPS


@pytest.mark.slow
@needs_libtpu
def test_gradients_cross_the_network_between_slices_once():
    table = plan("--topology", "2xv5e:2x2", "--mesh.fsdp", "2")
    assert table["mesh"] == {"data": 4, "fsdp": 2}
    crossing = [one for one in table["collectives"] if one["slices"] == 2]
    assert {(one["kind"], tuple(one["axes"]), one["devices"]) for one in crossing} == {("all-reduce", ("data",), 2)}
    # Each device sends its part of the sum within the slice: a quarter of the gradients, in float32 and padded.
    least = 4 * table["n_params"] / 4
    assert least < sum(one["n_bytes"] for one in crossing) < 2 * least
    speed = CHIPS[table["kind"]].network
    assert table["estimate"]["links"] > sum(one["sent"] for one in crossing) / speed


@pytest.mark.slow
@needs_libtpu
def test_a_small_step_compiles_for_the_oldest_tpu():
    """The attention kernel does not."""
    table = plan("--topology", "v2:2x2")
    assert table["attention"]["backend"] == "xla"
    assert table["attention"]["against"]["splash"] == "needs TPU v4 or newer, found TPU v2"


@pytest.mark.slow
@needs_libtpu
def test_what_a_sparse_core_sends_counts():
    table = plan("--topology", "tpu7x:2x2x1")
    reduced = sum(one["n_bytes"] for one in table["collectives"] if one["kind"] == "all-reduce")
    padded = table["n_params"] + (384 - 257) * 192
    assert reduced == pytest.approx(4 * padded, rel=0.01)
