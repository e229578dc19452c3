"""What follows from a config and the hardware: the dtype, and what is left to XLA."""

import pytest

from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import Hardware
from gpt2_jax.resolve import compiler_options, matmul_dtype, slow_dtype

BASE = {"out": "runs/x", "steps": 1, "batch_size": 1}


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        (Hardware("cpu"), "float32"),
        (Hardware("tpu"), "bfloat16"),
        (Hardware("rocm"), "bfloat16"),
        (Hardware("cuda", 6.0), "float32"),  # P100: no matrix units
        (Hardware("cuda", 7.0), "float16"),  # V100
        (Hardware("cuda", 7.5), "float16"),  # T4
        (Hardware("cuda", 8.0), "bfloat16"),  # A100
        (Hardware("cuda", 8.9), "bfloat16"),  # L4, RTX 4090
        (Hardware("cuda", 9.0), "bfloat16"),  # H100
        (Hardware("cuda", 12.0), "bfloat16"),  # RTX 5090
    ],
)
def test_auto_is_the_narrowest_dtype_with_matrix_units(hardware, dtype):
    assert matmul_dtype("auto", hardware) == dtype
    for named in ("float32", "bfloat16", "float16"):
        assert matmul_dtype(named, hardware) == named


@pytest.mark.parametrize(
    ("keys", "platform", "options"),
    [
        ({}, "cuda", {}),
        ({"deterministic": True}, "cpu", {}),
        ({"deterministic": True}, "tpu", {}),
        ({"deterministic": True}, "cuda", {"xla_gpu_deterministic_ops": True}),
        ({"sdc_checker": True}, "tpu", {"xla_tpu_enable_sdc_checker": True}),
    ],
)
def test_options_of_xla_follow_from_config_and_platform(keys, platform, options):
    assert compiler_options(TrainConfig(**BASE, **keys), platform) == options


def test_the_checker_of_tpus_is_refused_elsewhere():
    with pytest.raises(UserError, match="sdc_checker = true needs tpu, found cuda; type --sdc_checker false"):
        compiler_options(TrainConfig(**BASE, sdc_checker=True), "cuda")


@pytest.mark.parametrize(
    ("dtype", "platform", "slow"),
    [("float32", "cpu", False), ("bfloat16", "cpu", True), ("bfloat16", "cuda", False), ("bfloat16", "tpu", False)],
)
def test_a_warning_names_the_dtype_that_is_slow_on_a_cpu(dtype, platform, slow):
    warning = slow_dtype(dtype, platform)
    assert bool(warning) == slow
    assert not slow or warning.startswith(f"warning: {dtype} is slow on a CPU")
