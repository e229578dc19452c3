"""Options of XLA for the training and the evaluation step: those that the config asks for.

They are passed to `jax.jit`, not through the environment: so they hold for these programs only, whenever JAX started,
and a cached program is never run under other options.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import Hardware

Options = dict[str, bool | int]

# KiB of the memory on the chip that one operation may take, instead of 16,384: larger tiles, fewer trips to HBM. Others
# train with these: marin (50,000 on v5e, 98,304 on v6e), MaxText and axlearn (98,304 on v6e). In compiled programs they
# save bytes, but not always estimated cycles, and compiling takes longer (docs/scaling.md).
_V5E: Options = {"xla_tpu_scoped_vmem_limit_kib": 65536}
_V5P: Options = {"xla_tpu_scoped_vmem_limit_kib": 65472}  # the most that the compiler takes
_V6E: Options = {"xla_tpu_scoped_vmem_limit_kib": 98304}

# By `jax.Device.device_kind`. Left out, and why:
# - the latency-hiding scheduler and asynchronous gathers: on by default
# - asynchronous all-reduces (xla_enable_async_all_reduce with ..._async_collective_fusion_fuse_all_reduce): with
#   xla_tpu_overlap_compute_collective_tc they gave NaN beside this attention kernel (jax-ml/jax#38741), and a fifth of
#   the bytes overlaps (docs/scaling.md)
# - all-reduces on SparseCore: wrong losses on v6e and v7x (axlearn's compiler_options.py)
# - xla_tpu_spmd_rng_bit_generator_unsafe: random bits depend on the mesh
# - xla_tpu_enable_data_parallel_all_reduce_opt: for networks between slices, which have their own rule
# - combining less (xla_jf_crs_combiner_threshold_in_bytes): all-reduces start earlier, and still block
EXPERIMENTAL: dict[str, Options] = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}

VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def compiler_options(config: TrainConfig, hardware: Hardware, environment: Mapping[str, str] = os.environ) -> Options:
    """The options for a config on some hardware, by name.

    Args:
        environment: an option of `EXPERIMENTAL` that `VARIABLES` name in it is left out.

    Raises:
        UserError: the hardware does not have what the config asks for.
    """
    if config.sdc_checker and hardware.platform != "tpu":
        raise UserError(f"sdc_checker = true needs tpu, found {hardware.platform}; type --sdc_checker false")
    options: Options = {}
    if config.compiler_options == "experimental":
        named = named_options(environment)
        options |= {name: value for name, value in EXPERIMENTAL.get(hardware.kind, {}).items() if name not in named}
    if config.deterministic and hardware.platform == "cuda":  # implies deterministic gradients in cuDNN's attention
        options["xla_gpu_deterministic_ops"] = True
    if config.sdc_checker:
        options["xla_tpu_enable_sdc_checker"] = True
    return options


def named_options(environment: Mapping[str, str]) -> set[str]:
    """The options of XLA that the user has set: --NAME, --NAME=VALUE or --noNAME in one of `VARIABLES`.

    XLA_FLAGS may also be the name of a file with them.
    """
    texts = [environment.get(variable, "") for variable in VARIABLES]
    texts = [Path(text).read_text("utf-8") if os.path.isfile(text) else text for text in texts]
    words = [word for text in texts for word in text.split() if word.startswith("-")]
    names = {word.lstrip("-").partition("=")[0] for word in words}
    return names | {name.removeprefix("no") for name in names}
