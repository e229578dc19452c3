"""What a config and the hardware leave to XLA."""

import pytest

from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import UserError
from gpt2_jax.resolve import compiler_options, slow_dtype

BASE = {"out": "runs/x", "steps": 1, "batch_size": 1}


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
