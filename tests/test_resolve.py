"""What follows from a config and the hardware: the dtype."""

import pytest

from gpt2_jax.hardware import Hardware
from gpt2_jax.resolve import matmul_dtype, same_or_narrower, slow_generation


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        (Hardware("cpu"), "float32"),
        (Hardware("tpu"), "bfloat16"),
        (Hardware("rocm", architecture="gfx90a:sramecc+:xnack-"), "bfloat16"),  # MI250X
        (Hardware("rocm", architecture="gfx942"), "bfloat16"),  # MI300X
        (Hardware("rocm", architecture="gfx906"), "float32"),  # MI50: no matrix units
        (Hardware("rocm", architecture="gfx1030"), "float32"),  # RX 6800: no matrix units
        (Hardware("rocm", architecture="gfx1100"), "bfloat16"),  # RX 7900
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
    ("dtype", "platform", "slow"),
    [("float32", "cpu", False), ("bfloat16", "cpu", True), ("bfloat16", "cuda", False), ("bfloat16", "tpu", False)],
)
def test_a_warning_names_the_dtype_that_writes_text_slowly_on_a_cpu(dtype, platform, slow):
    warning = slow_generation(dtype, platform)
    assert bool(warning) == slow
    assert not slow or warning.startswith(f"warning: writing text in {dtype} is slow on a CPU")


@pytest.mark.parametrize(
    ("dtype", "hardware", "expected"),
    [
        ("float32", Hardware("cuda", 8.0), ("float32", "bfloat16")),
        ("float32", Hardware("cuda", 7.5), ("float32", "float16")),
        ("float32", Hardware("cpu"), ("float32",)),
        ("bfloat16", Hardware("cuda", 8.0), ("bfloat16",)),
    ],
)
def test_only_float32_has_a_narrower_dtype(dtype, hardware, expected):
    assert same_or_narrower(dtype, hardware) == expected
