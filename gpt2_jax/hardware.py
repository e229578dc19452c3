"""Devices: what a program is compiled for, the data-sheet figures of known chips, and the memory that is free."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import jax

Platform = Literal["cpu", "cuda", "rocm", "tpu"]


class Hardware(NamedTuple):
    """The target of a program.

    Attributes:
        capability: the compute capability of an NVIDIA GPU, 0 elsewhere.
        kind: JAX's name of the chip, "" if it does not matter.
        architecture: that of an AMD GPU, such as "gfx90a"; "" elsewhere.
    """

    platform: Platform
    capability: float = 0.0
    kind: str = ""
    architecture: str = ""


def hardware_of(device: jax.Device) -> Hardware:
    """The hardware of one device."""
    if device.platform == "gpu":
        if "rocm" in device.client.platform_version.lower():
            return Hardware("rocm", kind=device.device_kind, architecture=str(device.compute_capability))
        return Hardware("cuda", float(device.compute_capability), device.device_kind)
    return Hardware("tpu" if device.platform == "tpu" else "cpu", kind=device.device_kind)


def current_hardware() -> Hardware:
    """The hardware that jitted functions run on by default."""
    return hardware_of(jax.local_devices()[0])


GB, GIB = 1e9, 2.0**30
GPU_MEMORY_SHARE = 0.9  # of a GPU, for arrays: `runtime.use_most_of_gpu_memory`


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one device of JAX, from its maker's data sheet.

    Attributes:
        flops: peak FLOP/s of dense matmuls in 16 bits that add in float32: in bfloat16, or in float16 on Volta and
            Turing, which have no units for bfloat16.
        memory: bytes that arrays can take. On GPUs, `GPU_MEMORY_SHARE` of what the driver reports.
        bandwidth: memory bandwidth in bytes/s.
        link: bytes/s to the other devices of its slice, in one direction.
        network: bytes/s to devices of other slices, in one direction. 0 where no slices are joined.
        clock: matrix unit clock in Hz, in the cycles that the TPU compiler counts (peak FLOP/s ÷ FLOPs per cycle).
        per_host: GPUs of a full host.
        per_slice: GPUs that one NVLink switch connects, or a host.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float = 0.0
    clock: float = 0.0
    per_host: int = 8
    per_slice: int = 8


def _gpu(
    tflops: float,
    gib: float,
    memory_gb: float,
    link_gb: float,
    network_gb: float,
    per_host: int = 8,
    per_slice: int = 8,
) -> Chip:
    memory = GPU_MEMORY_SHARE * gib * GIB
    return Chip(tflops * 1e12, memory, memory_gb * GB, link_gb * GB, network_gb * GB, 0.0, per_host, per_slice)


def _tpu(
    tflops: float, gib: float, memory_gb: float, link_gb: float, network_gb: float = 0.0, clock_ghz: float = 0.0
) -> Chip:
    return Chip(tflops * 1e12, gib * GIB, memory_gb * GB, link_gb * GB, network_gb * GB, clock_ghz * 1e9)


_V5E = _tpu(197, 16, 819, 200, 3.125, 1.5)
_V5P = _tpu(459, 95, 2765, 600, 6.25, 1.75)
_V6E = _tpu(918, 32, 1638, 400, 12.5, 1.75)

# Keys are values of `jax.Device.device_kind`. Columns: dense TFLOP/s, GiB, then GB/s of memory, links and network.
#
# GPUs: peaks and bandwidths are from the documents that each group names, halved where they count sparsity, and were
# compared with the tables of nanochat, Lightning and XLA in November 2026. GeForce cards and the A10G add in float32 at
# half their float16 rate. GiB are what CUDA and ROCm report (XLA's target configs, out-of-memory messages of PyTorch):
# the data sheet's size less error correction and the driver's part. Links are NVLink or Infinity Fabric where all GPUs
# of a host have it, else PCIe: half of a data sheet's figure, which counts both directions. Network is a port of
# InfiniBand per GPU in hosts that are built for it (DGX), and 100 Gb/s for eight PCIe cards, as clouds rent them.
_PCIE3, _PCIE4, _PCIE5, _SHARED_PORT = 16, 32, 64, 12.5 / 8
CHIPS = {
    # Volta and Turing, in float16: data sheets of V100 (2020) and T4 (2019)
    "Tesla V100-SXM2-16GB": _gpu(125, 15.8, 900, 150, 6.25),
    "Tesla V100-SXM2-32GB": _gpu(125, 31.7, 900, 150, 6.25),
    "Tesla V100-PCIE-16GB": _gpu(112, 15.8, 900, _PCIE3, _SHARED_PORT),
    "Tesla V100-PCIE-32GB": _gpu(112, 31.7, 900, _PCIE3, _SHARED_PORT),
    "Tesla T4": _gpu(65, 14.6, 320, _PCIE3, _SHARED_PORT),
    # Ampere: data sheets of A100 (2021), A10 (2021), A40 (2020), RTX A6000 (2020); GA102 white paper (2020)
    "NVIDIA A100-SXM4-40GB": _gpu(312, 39.4, 1555, 300, 25),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 79.1, 2039, 300, 25),
    "NVIDIA A100-PCIE-40GB": _gpu(312, 39.4, 1555, _PCIE4, _SHARED_PORT),
    "NVIDIA A100 80GB PCIe": _gpu(312, 79.1, 1935, _PCIE4, _SHARED_PORT),
    "NVIDIA A10": _gpu(125, 22.0, 600, _PCIE4, _SHARED_PORT),
    "NVIDIA A10G": _gpu(70, 22.0, 600, _PCIE4, _SHARED_PORT),
    "NVIDIA A40": _gpu(149.7, 44.3, 696, _PCIE4, _SHARED_PORT),
    "NVIDIA RTX A6000": _gpu(154.8, 47.4, 768, _PCIE4, _SHARED_PORT),
    "NVIDIA GeForce RTX 3090": _gpu(71, 23.7, 936, _PCIE4, _SHARED_PORT),
    # Ada: data sheets of L4 and L40S (2023); Ada white paper (2022)
    "NVIDIA L4": _gpu(121, 22.0, 300, _PCIE4, _SHARED_PORT),
    "NVIDIA L40S": _gpu(362, 44.4, 864, _PCIE4, _SHARED_PORT),
    "NVIDIA GeForce RTX 4090": _gpu(165.2, 23.6, 1008, _PCIE4, _SHARED_PORT),
    # Hopper: data sheets of H100 (2023), GH200 (2023), H200 (2024)
    "NVIDIA H100 80GB HBM3": _gpu(989, 79.1, 3350, 450, 50),
    "NVIDIA H100 PCIe": _gpu(756, 79.1, 2039, _PCIE5, _SHARED_PORT),
    "NVIDIA H100 NVL": _gpu(835, 93.0, 3938, _PCIE5, _SHARED_PORT),
    "NVIDIA H200": _gpu(989, 139.8, 4800, 450, 50),
    "NVIDIA GH200 480GB": _gpu(989, 94.5, 4000, 450, 50, 1, 1),
    "NVIDIA GH200 144G HBM3e": _gpu(989, 142.5, 4900, 450, 50, 1, 1),
    # Blackwell: data sheets of DGX B200 and GB200 (2024), DGX B300 and GB300 (2025); RTX Blackwell white paper (2025)
    "NVIDIA B200": _gpu(2250, 178.3, 8000, 900, 50),
    "NVIDIA GB200": _gpu(2500, 184.3, 8000, 900, 50, 4, 72),
    "NVIDIA B300 SXM6 AC": _gpu(2250, 267.7, 8000, 900, 100),
    "NVIDIA GB300": _gpu(2500, 276.6, 8000, 900, 100, 4, 72),
    "NVIDIA GeForce RTX 5090": _gpu(209.5, 31.4, 1792, _PCIE5, _SHARED_PORT),
    # CDNA: data sheets of MI250X (2021; a device is one of its two dies) and MI300X (2023)
    "AMD Instinct MI250X": _gpu(191.5, 64.0, 1638, 200, 12.5),
    "AMD Instinct MI300X": _gpu(1307, 191.7, 5300, 448, 50),
    # Google's documentation of each TPU (2026); the links of v2 and v3: Jouppi et al. 2020. A device is a core, half a
    # chip, on v2, v3 and 7x, and a chip on the others. v4's network is taken to be v5p's.
    "TPU v2": _tpu(23, 8, 350, 124, clock_ghz=0.7),
    "TPU v3": _tpu(61.5, 16, 450, 164, clock_ghz=0.94),
    "TPU v4": _tpu(275, 32, 1228, 300, 6.25, 1.05),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _tpu(1153.5, 96, 3690, 300, 6.25),
}


_UNKNOWN_GPU = _gpu(0, 0, 0, 0, 0)


def chip_of(device: jax.Device) -> Chip | None:
    """The figures of a device, or None for CPUs and unknown chips."""
    return CHIPS.get(device.device_kind)


def host_of(device: jax.Device) -> int:
    """The index of the host that a device is on. Hosts of GPUs are full, however many processes drive them."""
    if device.platform != "gpu":
        return device.process_index
    return device.id // (chip_of(device) or _UNKNOWN_GPU).per_host


def slice_of(device: jax.Device) -> int:
    """The index of the slice that a device is on: the devices that a fast network connects.

    That is a slice of a TPU pod, or the GPUs on one NVLink switch, or else in one host. XLA finds out which GPUs these
    are, except for GPUs that are not attached.
    """
    if device.platform == "gpu" and device.client.runtime_type == "compile_only_runtime":
        return device.id // (chip_of(device) or _UNKNOWN_GPU).per_slice
    # TPUs have only the second attribute, and those of a single slice may have none.
    return getattr(device, "partition_index", 0) or getattr(device, "slice_index", 0)


# The limit of a container in version 2 of control groups, and in version 1.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory(device: jax.Device) -> int | None:
    """Bytes that this process can still allocate on an attached device; None where that is unknown.

    On a GPU, that is the share of its memory that JAX reserves at its start (`runtime.use_most_of_gpu_memory`). The
    simulated devices of a CPU share the memory of the host.
    """
    if device.platform == "cpu":
        host = _available_host_memory()
        return host // jax.local_device_count() if host else None
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    chip = chip_of(device)
    return int(chip.memory) if chip else None


def peak_memory(device: jax.Device) -> tuple[int, int] | None:
    """The most bytes that were in use on an attached device so far, and its limit; None if it does not count them."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" not in stats or "bytes_limit" not in stats:
        return None
    return int(stats["peak_bytes_in_use"]), int(stats["bytes_limit"])


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
