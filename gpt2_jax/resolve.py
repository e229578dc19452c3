"""Resolves what a config leaves open: dtype and attention backend by the hardware, the schedule by `steps`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from gpt2_jax.attention import Choice, choose
from gpt2_jax.attention.backend import Problem
from gpt2_jax.config import Dtype, TrainConfig
from gpt2_jax.hardware import Hardware, Platform
from gpt2_jax.model import GPT2

# With MFMA or WMMA instructions: MI100, MI200, MI300, MI350, and RX 7000 and 9000.
_AMD_MATRIX_UNITS = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


def resolve(config: TrainConfig, hardware: Hardware) -> tuple[TrainConfig, Choice]:
    """Fills in what follows from the config and the hardware, and chooses the attention backend.

    Raises:
        UserError: the hardware does not support the requested attention backend.
    """
    dtype = matmul_dtype(config.dtype, hardware)
    optimizer = dataclasses.replace(config.optimizer, decay_steps=config.optimizer.decay_steps or config.steps)
    model = config.model
    problem = Problem(hardware, jnp.dtype(dtype), model.block_size, model.n_embd // model.n_head, model.dropout)
    choice = choose(model.attention, problem)
    return dataclasses.replace(config, dtype=dtype, optimizer=optimizer), choice


def matmul_dtype(dtype: Dtype, hardware: Hardware) -> Dtype:
    """The dtype of activations and matmuls: "auto" is the narrowest that the hardware has matrix units for.

    NVIDIA GPUs have them for bfloat16 from Ampere on (compute capability 8.0), and for float16 from Volta on (7.0).
    AMD's have them for bfloat16 from CDNA and RDNA 3 on, and TPUs all have them.
    """
    if dtype != "auto":
        return dtype
    match hardware.platform:
        case "cpu":
            return "float32"
        case "cuda":
            return "bfloat16" if hardware.capability >= 8.0 else "float16" if hardware.capability >= 7.0 else "float32"
        case "rocm":
            return "bfloat16" if hardware.architecture.startswith(_AMD_MATRIX_UNITS) else "float32"
        case "tpu":
            return "bfloat16"


def same_or_narrower(dtype: Dtype, hardware: Hardware) -> tuple[Dtype, ...]:
    """The dtype, and after float32 the narrower one that the hardware has matrix units for, if there is one."""
    narrow = matmul_dtype("auto", hardware)
    return (dtype, narrow) if dtype == "float32" != narrow else (dtype,)


def slow_generation(dtype: Dtype, platform: Platform) -> str | None:
    """A warning if the platform writes text in a dtype much slower than in float32; None otherwise.

    Each token multiplies a vector with every matrix, which XLA's CPU backend does fast in float32 only. The products of
    many rows in evaluation and training are another case: there bfloat16 can be faster, on CPUs with units for it.
    """
    if platform != "cpu" or dtype == "float32":
        return None
    return f"warning: writing text in {dtype} is slow on a CPU; for speed, type --dtype float32"


def matmul_precision(dtype: str | jnp.dtype) -> Literal["highest"] | None:
    """The precision for `jax.default_matmul_precision`.

    float32 means float32: by default, GPUs round the operands to TF32 and TPUs to bfloat16.
    """
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def build_model(config: TrainConfig, attention: Choice) -> GPT2:
    """The model of a resolved config, with the chosen attention backend."""
    return GPT2(dataclasses.replace(config.model, attention=attention.backend), jnp.dtype(config.dtype))
