"""Chips that programs run on or are compiled for: what they can do, and topologies of them that are not there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax

from gpt2_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do, from its maker's data sheet.

    Attributes:
        flops: dense bfloat16 FLOP/s.
        memory: bytes.
        bandwidth: bytes/s of that memory.
        link: bytes/s that it can send to the others of its slice (TPU) or host (NVLink), in one direction.
        network: bytes/s that it can send beyond its host; of a TPU the links go everywhere.
        clock: of the matrix units, in Hz, as the TPU compiler counts cycles (peak FLOP/s over those of a cycle).
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float = 0.0
    clock: float = 0.0


GB, GIB = 1e9, 2.0**30
# NVIDIA: SXM boards; NVLink's data sheet figure counts both directions; beyond the host one InfiniBand NDR port each
# (400 Gb/s; HDR, 200 Gb/s, for A100). TPU: Google's documentation of each generation, links in one direction.
_A100 = {"flops": 312e12, "link": 300 * GB, "network": 25 * GB}
_HOPPER = {"flops": 989e12, "link": 450 * GB, "network": 50 * GB}
_V5E = Chip(197e12, 16 * GIB, 819 * GB, 200 * GB, clock=1.5e9)
_V5P = Chip(459e12, 95 * GIB, 2765 * GB, 600 * GB, clock=1.75e9)
_V6E = Chip(918e12, 32 * GIB, 1638 * GB, 400 * GB, clock=1.75e9)

# By `jax.Device.device_kind`.
CHIPS = {
    "NVIDIA A100-SXM4-40GB": Chip(memory=40 * GIB, bandwidth=1555 * GB, **_A100),
    "NVIDIA A100-SXM4-80GB": Chip(memory=80 * GIB, bandwidth=2039 * GB, **_A100),
    "NVIDIA H100 80GB HBM3": Chip(memory=80 * GIB, bandwidth=3350 * GB, **_HOPPER),
    "NVIDIA H200": Chip(memory=141 * GB, bandwidth=4800 * GB, **_HOPPER),
    "NVIDIA B200": Chip(2250e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB),
    "TPU v4": Chip(275e12, 32 * GIB, 1228 * GB, 150 * GB, clock=1.05e9),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device, None for CPUs and unknown chips."""
    return CHIPS.get(device.device_kind)


def host_of(device: jax.Device) -> int:
    """The number of the host that holds a device: of GPUs, eight share one, however many processes they have."""
    return device.id // GPUS_PER_HOST if device.platform == "gpu" else device.process_index


@dataclasses.dataclass(frozen=True)
class _GPU:
    """What XLA has to know of an NVIDIA GPU to compile for it, besides what `Chip` says."""

    kind: str
    capability: int
    cores: int
    clock_ghz: float
    l2_bytes: int
    shared_memory: int  # per core
    shared_memory_per_block: int  # at most, if asked for


_GPUS = {
    "a100": _GPU("NVIDIA A100-SXM4-80GB", 8, 108, 1.41, 40 << 20, 164 << 10, 163 << 10),
    "h100": _GPU("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 50 << 20, 228 << 10, 227 << 10),
    "h200": _GPU("NVIDIA H200", 9, 132, 1.98, 50 << 20, 228 << 10, 227 << 10),
}
GPUS_PER_HOST = 8
TPU_SHAPES = {
    "v5e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "v5p": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8",
    "v6e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
}
KNOWN = "; ".join(
    [f"{name}: {shapes}" for name, shapes in TPU_SHAPES.items()]
    + [f"{', '.join(_GPUS)}, cpu: any number of devices, as in h100:8"]
)


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology that programs can be compiled for, though they are not there.

    Call it before anything else makes JAX look for devices: it keeps JAX on the CPU.

    Args:
        topology: such as "v5e:4x4", "h100:16" or "cpu:8".

    Raises:
        UserError: an unknown topology, or its compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    jax.config.update("jax_platforms", "cpu")
    if name == "cpu" and shape.isdigit() and int(shape) > 0:
        return _cpu_devices(int(shape))
    if name in _GPUS and shape.isdigit() and int(shape) > 0:
        return _gpu_devices(_GPUS[name], int(shape))
    if name in TPU_SHAPES and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        return _tpu_devices(name, shape)
    raise UserError(f"unknown topology {topology!r}; known are {KNOWN}")


def _cpu_devices(count: int) -> Sequence[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"cpu:{count} has more devices than the {len(devices)} that this process was started with")
    return devices[:count]


def _tpu_devices(name: str, shape: str) -> Sequence[jax.Device]:
    _require("libtpu", "plan", f"compiling for {name}")
    # Nothing of a TPU is to be looked for; what libtpu would complain of is said beforehand.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3",
                "TF_CPP_MIN_LOG_LEVEL": "3"}  # fmt: skip
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    single = math.prod(map(int, shape.split("x"))) == 1
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **bounds).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split(": ", 1)[-1].splitlines()[0]
        raise UserError(f"no such slice: {name}:{shape} ({reason}); known are {TPU_SHAPES[name]}") from error


def _gpu_devices(gpu: _GPU, count: int) -> Sequence[jax.Device]:
    _require("jax_cuda12_plugin" if importlib.util.find_spec("jax_cuda12_plugin") else "jax_cuda13_plugin", "cuda12",
             f"compiling for {gpu.kind}")  # fmt: skip
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UserError(f"{count} GPUs do not make whole hosts of {GPUS_PER_HOST}; take a multiple")
    # Autotuning would run kernels to compare them.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    chip = CHIPS[gpu.kind]
    config = f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {gpu.capability} }}
          core_count: {gpu.cores} clock_rate_ghz: {gpu.clock_ghz} fpus_per_core: {128 if gpu.capability > 8 else 64}
          device_memory_size: {int(chip.memory)} memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {gpu.l2_bytes}
          shared_memory_per_core: {gpu.shared_memory} shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {gpu.shared_memory_per_block}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{gpu.kind}"
    """
    hosts, per_host = (count // GPUS_PER_HOST, GPUS_PER_HOST) if count > GPUS_PER_HOST else (1, count)
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x{hosts}x{per_host}").devices


def _require(module: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs {module}, which is not installed; type pip install 'gpt2_jax[{extra}]'")
