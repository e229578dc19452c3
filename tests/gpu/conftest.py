"""The tests that need an NVIDIA GPU: `python -m pytest -m gpu tests/gpu`. Elsewhere they are skipped."""

import os

import jax
import pytest


def pytest_configure(config):
    """Gives JAX the GPU and XLA its default flags if these tests run alone. All others run on simulated CPU devices."""
    if config.getoption("markexpr") == "gpu":
        jax.config.update("jax_platforms", "cuda,cpu")
        os.environ["XLA_FLAGS"] = ""
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the commands that tests start need memory too


@pytest.fixture(scope="session")
def gpu():
    """JAX's first GPU."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        pytest.skip(f"JAX has no GPU here ({reason}); where it has one, type python -m pytest -m gpu tests/gpu")
