"""Devices that need not be attached, for compiling programs: TPU slices, GPU clusters, simulated CPU devices."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS, GPU_MEMORY_SHARE


class _GPU(NamedTuple):
    """An NVIDIA GPU as XLA needs it to compile, besides the figures in `Chip`. `capability` is (major, minor)."""

    kind: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    l2_mib: int


class _Generation(NamedTuple):
    """The limits of a core, by NVIDIA's CUDA programming guide, "Compute Capabilities". Shared memory in KiB."""

    shared_memory: int
    shared_memory_per_block: int  # opt-in
    threads: int
    fpus: int


_GENERATIONS = {
    (7, 0): _Generation(96, 96, 2048, 64),
    (7, 5): _Generation(64, 64, 1024, 64),
    (8, 0): _Generation(164, 163, 2048, 64),
    (8, 6): _Generation(100, 99, 1536, 128),
    (8, 9): _Generation(100, 99, 1536, 128),
    (9, 0): _Generation(228, 227, 2048, 128),
    (10, 0): _Generation(228, 227, 2048, 128),
    (10, 3): _Generation(228, 227, 2048, 128),
    (12, 0): _Generation(100, 99, 1536, 128),
}
GPUS = {
    "t4": _GPU("Tesla T4", (7, 5), 40, 1.59, 4),
    "v100": _GPU("Tesla V100-SXM2-16GB", (7, 0), 80, 1.53, 6),
    "v100-32gb": _GPU("Tesla V100-SXM2-32GB", (7, 0), 80, 1.53, 6),
    "v100-pcie": _GPU("Tesla V100-PCIE-16GB", (7, 0), 80, 1.38, 6),
    "a100": _GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40),
    "a100-40gb": _GPU("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 40),
    "a100-pcie": _GPU("NVIDIA A100 80GB PCIe", (8, 0), 108, 1.41, 40),
    "a10": _GPU("NVIDIA A10", (8, 6), 72, 1.70, 6),
    "a10g": _GPU("NVIDIA A10G", (8, 6), 80, 1.71, 6),
    "a40": _GPU("NVIDIA A40", (8, 6), 84, 1.74, 6),
    "rtx-a6000": _GPU("NVIDIA RTX A6000", (8, 6), 84, 1.80, 6),
    "rtx-3090": _GPU("NVIDIA GeForce RTX 3090", (8, 6), 82, 1.70, 6),
    "l4": _GPU("NVIDIA L4", (8, 9), 58, 2.04, 48),
    "l40s": _GPU("NVIDIA L40S", (8, 9), 142, 2.52, 96),
    "rtx-4090": _GPU("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 72),
    "h100": _GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50),
    "h100-pcie": _GPU("NVIDIA H100 PCIe", (9, 0), 114, 1.76, 50),
    "h100-nvl": _GPU("NVIDIA H100 NVL", (9, 0), 132, 1.79, 50),
    "h200": _GPU("NVIDIA H200", (9, 0), 132, 1.98, 50),
    "gh200": _GPU("NVIDIA GH200 480GB", (9, 0), 132, 1.98, 50),
    "b200": _GPU("NVIDIA B200", (10, 0), 148, 1.97, 126),
    "gb200": _GPU("NVIDIA GB200", (10, 0), 152, 2.06, 129),
    "b300": _GPU("NVIDIA B300 SXM6 AC", (10, 3), 148, 1.92, 126),
    "gb300": _GPU("NVIDIA GB300", (10, 3), 152, 2.07, 129),
    "rtx-5090": _GPU("NVIDIA GeForce RTX 5090", (12, 0), 170, 2.41, 96),
}
TPU_SHAPES = {
    "v2": "2x2, 4x4, 8x8, 16x16",
    "v3": "2x2, 4x4, 8x8, 16x16, 32x32",
    "v4": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8",
    "v5e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "v5p": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8",
    "v6e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "tpu7x": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8",
}
MAX_CPU_DEVICES = 1024  # JAX simulates them, each with threads of its own: 10,000 take a minute to start.
KNOWN = "; ".join(
    [f"{name}: {shapes}" for name, shapes in TPU_SHAPES.items()]
    + ["several TPU slices as in 2xv5e:4x4", f"{', '.join(GPUS)}, cpu: a number of devices, as in h100:8"]
)


_PARTS = re.compile(r"(?:([1-9][0-9]{0,2})x)?([^:]+):(.*)")  # slices, name, shape


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, to compile programs for. Only the devices of "cpu" can run them.

    Call it before anything else initializes JAX's backends: it restricts JAX to the CPU.

    Args:
        topology: for example "v5e:4x4", "2xv5e:4x4" for two slices, "h100:16" or "cpu:8".

    Raises:
        UserError: the topology is unknown, or its compiler is not installed.
    """
    parts = _PARTS.fullmatch(topology)
    slices, name, shape = parts.groups() if parts else (None, "", "")
    jax.config.update("jax_platforms", "cpu")
    count = int(shape) if re.fullmatch(r"[1-9][0-9]{0,5}", shape) else 0
    if name in TPU_SHAPES and re.fullmatch(r"[0-9]{1,6}(x[0-9]{1,6}){1,2}", shape):
        return _tpu_devices(name, shape, int(slices or 1))
    if name == "cpu" and 0 < count <= MAX_CPU_DEVICES and not slices:
        return _cpu_devices(count)
    if name in GPUS and count and not slices:
        return _gpu_devices(GPUS[name], count)
    raise UserError(f"unknown topology {topology!r}; known are {KNOWN}")


def _cpu_devices(count: int) -> Sequence[jax.Device]:
    with contextlib.suppress(RuntimeError):  # the backends are initialized already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"cpu:{count} needs {count} devices, and this process was started with {len(devices)}; "
            f"type --topology cpu:{len(devices)}"
        )
    return devices[:count]


def _tpu_devices(name: str, shape: str, slices: int) -> Sequence[jax.Device]:
    _require("libtpu", "plan", f"compiling for {name}")
    _configure_libtpu()
    from jax.experimental import topologies

    single = math.prod(map(int, shape.split("x"))) == 1
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as on TPU VMs
    if slices > 1:
        options["num_slices"] = slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split(": ", 1)[-1].splitlines()[0]
        raise UserError(f"no such slice: {name}:{shape} ({reason}); known are {TPU_SHAPES[name]}") from error


def _configure_libtpu() -> None:
    """Sets environment variables with which libtpu compiles without a TPU, except those that the user has set.

    They keep libtpu from searching for a TPU and from querying the metadata server. They let several processes load it
    at the same time, and limit its logs to errors.
    """
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3",
                "TF_CPP_MIN_LOG_LEVEL": "3"}  # fmt: skip
    for key, value in settings.items():
        os.environ.setdefault(key, value)


def _gpu_devices(gpu: _GPU, count: int) -> Sequence[jax.Device]:
    plugin = "jax_cuda13_plugin" if importlib.util.find_spec("jax_cuda13_plugin") else "jax_cuda12_plugin"
    _require(plugin, "cuda12", f"compiling for {gpu.kind}")
    chip, generation = CHIPS[gpu.kind], _GENERATIONS[gpu.capability]
    for per, group in ((chip.per_host, "hosts"), (chip.per_slice, "racks")):
        if count > per and (left := count % per):
            whole = count - left
            raise UserError(f"{count} GPUs do not fill whole {group} of {per}; take {whole} or {whole + per}")
    _configure_xla_for_absent_gpus()
    from jax.experimental import topologies

    major, minor = gpu.capability
    config = f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.cores} clock_rate_ghz: {gpu.clock_ghz} fpus_per_core: {generation.fpus}
          device_memory_size: {int(chip.memory / GPU_MEMORY_SHARE)} memory_bandwidth: {int(chip.bandwidth)}
          l2_cache_size: {gpu.l2_mib << 20}
          shared_memory_per_core: {generation.shared_memory << 10} shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {generation.shared_memory_per_block << 10}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {generation.threads}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{gpu.kind}"
    """
    per_host, per_slice = min(count, chip.per_host), min(count, chip.per_slice)
    shape = f"{count // per_slice}x{per_slice // per_host}x{per_host}"  # slices, hosts of each, GPUs of each
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=shape).devices


def _configure_xla_for_absent_gpus() -> None:
    """Turns off logs, and autotuning, which would run kernels to compare them."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _require(module: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs {module}, which is not installed; type pip install 'gpt2_jax[{extra}]'")
