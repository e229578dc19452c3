"""Devices: what a program is compiled for, and the data-sheet figures of known chips."""

from __future__ import annotations

import dataclasses
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
