"""Devices that need not be attached, for compiling programs: TPU slices, GPU clusters, simulated CPU devices."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax

from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS, GPUS_PER_HOST


@dataclasses.dataclass(frozen=True)
class _GPU:
    """The figures of an NVIDIA GPU that XLA needs to compile for it, besides those in `Chip`."""

    kind: str
    capability: int
    cores: int
    clock_ghz: float
    l2_bytes: int
    shared_memory: int  # bytes per core
    shared_memory_per_block: int  # bytes, opt-in maximum


_GPUS = {
    "a100": _GPU("NVIDIA A100-SXM4-80GB", 8, 108, 1.41, 40 << 20, 164 << 10, 163 << 10),
    "h100": _GPU("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 50 << 20, 228 << 10, 227 << 10),
    "h200": _GPU("NVIDIA H200", 9, 132, 1.98, 50 << 20, 228 << 10, 227 << 10),
}
TPU_SHAPES = {
    "v5e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "v5p": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8",
    "v6e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
}
MAX_CPU_DEVICES = 1024  # JAX simulates them, each with threads of its own: 10,000 take a minute to start.
KNOWN = "; ".join(
    [f"{name}: {shapes}" for name, shapes in TPU_SHAPES.items()]
    + [f"{', '.join(_GPUS)}, cpu: a number of devices, as in h100:8"]
)


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, to compile programs for. Only the devices of "cpu" can run them.

    Call it before anything else initializes JAX's backends: it restricts JAX to the CPU.

    Args:
        topology: for example "v5e:4x4", "h100:16" or "cpu:8".

    Raises:
        UserError: the topology is unknown, or its compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    jax.config.update("jax_platforms", "cpu")
    count = int(shape) if re.fullmatch(r"[1-9][0-9]{0,5}", shape) else 0
    if name == "cpu" and 0 < count <= MAX_CPU_DEVICES:
        return _cpu_devices(count)
    if name in _GPUS and count:
        return _gpu_devices(_GPUS[name], count)
    if name in TPU_SHAPES and re.fullmatch(r"[0-9]{1,6}(x[0-9]{1,6}){1,2}", shape):
        return _tpu_devices(name, shape)
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


def _tpu_devices(name: str, shape: str) -> Sequence[jax.Device]:
    _require("libtpu", "plan", f"compiling for {name}")
    _configure_libtpu()
    from jax.experimental import topologies

    single = math.prod(map(int, shape.split("x"))) == 1
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **bounds).devices
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
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        whole = count // GPUS_PER_HOST * GPUS_PER_HOST
        raise UserError(
            f"{count} GPUs do not fill whole hosts of {GPUS_PER_HOST}; take {whole} or {whole + GPUS_PER_HOST}"
        )
    _configure_xla_for_absent_gpus()
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


def _configure_xla_for_absent_gpus() -> None:
    """Turns off logs, and autotuning, which would run kernels to compare them."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _require(module: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs {module}, which is not installed; type pip install 'gpt2_jax[{extra}]'")
