"""Devices: what a program is compiled for, the data-sheet figures of known chips, and the memory that is free."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import jax

Platform = Literal["cpu", "cuda", "rocm", "tpu"]


class Hardware(NamedTuple):
    """The target of a program. `capability` is the compute capability of an NVIDIA GPU, 0 elsewhere."""

    platform: Platform
    capability: float = 0.0


def hardware_of(device: jax.Device) -> Hardware:
    """The hardware of one device."""
    if device.platform == "gpu":
        if "rocm" in device.client.platform_version.lower():
            return Hardware("rocm")
        return Hardware("cuda", float(device.compute_capability))
    return Hardware("tpu" if device.platform == "tpu" else "cpu")


def current_hardware() -> Hardware:
    """The hardware that jitted functions run on by default."""
    return hardware_of(jax.local_devices()[0])


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device, from its maker's data sheet.

    Attributes:
        flops: dense bfloat16 FLOP/s.
        memory: bytes.
        bandwidth: memory bandwidth in bytes/s.
        link: bytes/s to the other devices of its slice (TPU) or host (NVLink), in one direction.
        network: bytes/s to other hosts, per GPU. 0 for TPUs, whose links connect the whole slice.
        clock: matrix unit clock in Hz, in the cycles that the TPU compiler counts (peak FLOP/s ÷ FLOPs per cycle).
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float = 0.0
    clock: float = 0.0


GB, GIB = 1e9, 2.0**30
GPUS_PER_HOST = 8
# NVIDIA: SXM boards. The NVLink figure on a data sheet counts both directions. Each GPU has one InfiniBand port to
# other hosts: NDR (400 Gb/s), or HDR (200 Gb/s) for A100. TPU: Google's documentation of each generation.
_A100 = {"flops": 312e12, "link": 300 * GB, "network": 25 * GB}
_HOPPER = {"flops": 989e12, "link": 450 * GB, "network": 50 * GB}
_V5E = Chip(197e12, 16 * GIB, 819 * GB, 200 * GB, clock=1.5e9)
_V5P = Chip(459e12, 95 * GIB, 2765 * GB, 600 * GB, clock=1.75e9)
_V6E = Chip(918e12, 32 * GIB, 1638 * GB, 400 * GB, clock=1.75e9)

# Keys are values of `jax.Device.device_kind`.
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
    """The figures of a device, or None for CPUs and unknown chips."""
    return CHIPS.get(device.device_kind)


def host_of(device: jax.Device) -> int:
    """The index of the host that a device is on. GPUs are eight to a host, however many processes drive them."""
    return device.id // GPUS_PER_HOST if device.platform == "gpu" else device.process_index


# The limit of a container in version 2 of control groups, and in version 1.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory(device: jax.Device) -> int | None:
    """Bytes that this process can still allocate on an attached device; None where that is unknown.

    On a GPU, JAX takes three quarters of the memory that is free at its start, unless XLA_PYTHON_CLIENT_MEM_FRACTION
    says otherwise. The simulated devices of a CPU share the memory of the host.
    """
    if device.platform == "cpu":
        host = _available_host_memory()
        return host // jax.local_device_count() if host else None
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    chip = chip_of(device)
    return int(chip.memory) if chip else None


def _available_host_memory() -> int | None:
    """Bytes that Linux can still give to processes, at most the limit of this container; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    available = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    for limit in map(Path, _CONTAINER_LIMITS):
        if available and limit.exists() and (text := limit.read_text("utf-8").strip()).isdigit():
            available = min(available, int(text))
    return available
