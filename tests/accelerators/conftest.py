"""The tests that need a chip: `python -m pytest -n 0 -m gpu tests/accelerators`, or `-m tpu`; skipped elsewhere."""

import os

import jax
import pytest

PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}


def pytest_configure(config):
    """Gives JAX the chips and XLA its default flags if these tests run alone. All others run on CPU devices."""
    if platform := PLATFORMS.get(config.getoption("markexpr")):
        jax.config.update("jax_platforms", f"{platform},cpu")
        os.environ["XLA_FLAGS"] = ""
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the commands that tests start need memory too


def devices_of(marker):
    """The devices of JAX's platform of that name."""
    try:
        return jax.devices(marker)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        pytest.skip(
            f"JAX has no {marker} here ({reason}); where it has one, type python -m pytest -n 0 -m {marker} "
            "tests/accelerators"
        )


EACH = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in PLATFORMS]


@pytest.fixture(params=EACH)
def devices(request):
    """All GPUs, then all TPUs."""
    return devices_of(request.param)


@pytest.fixture
def device(devices):
    """One of them."""
    return devices[0]


@pytest.fixture(params=EACH)
def platform(request):
    """JAX's name of them, for processes that a test starts. This process does not open a TPU: only one can have it."""
    if PLATFORMS[request.param] not in jax.config.jax_platforms or request.param == "gpu":
        devices_of(request.param)
    return PLATFORMS[request.param]
