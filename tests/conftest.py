"""Eight simulated CPU devices, strict ranks and dtypes, and the fixtures that several files share."""

# ruff: noqa: E402 (the environment has to be set before JAX is imported)

import os
import tempfile

from xla_flags import FAST_COMPILE

# Set before JAX starts. Single-device tests use the first of the eight devices.
os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices on two busy cores can exceed XLA's default limit of 40 s for a collective.
DEVICES = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=300"
os.environ["XLA_FLAGS"] = f"{DEVICES} {FAST_COMPILE}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As many test processes as cores: threads of torch and NumPy would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One cache of compiled programs for all tests, the processes that run them and the commands that they start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpt2_jax-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import gc
import shutil
from pathlib import Path

import jax
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2, init_params

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 20, 20)  # at Python's pace garbage collections take a fifth of the tests' time

SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the file of the longest tests, so that no process waits for one of them at the end."""
    items.sort(key=lambda item: item.path.name != "test_train.py")


def pytest_collection_finish() -> None:
    """What was imported stays alive: no garbage collection needs to scan it."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text beside the checkout; tests that want it are skipped elsewhere."""
    if not (SHARED / "data").exists():
        pytest.skip(f"no real text in {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture
def strict_dtypes():
    """Mixing dtypes is an error, as in a model it is nearly always a mistake. Optax does it, so not everywhere."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def gpt2_vocabulary(monkeypatch, tmp_path) -> None:
    """tiktoken's cache with GPT-2's vocabulary, a copy: tiktoken deletes files that it does not like."""
    cache = SHARED / "gpt2_vocab" / "tiktoken_cache"
    if not cache.exists():
        pytest.skip(f"no GPT-2 vocabulary in {cache}")
    for file in cache.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Tokenizes in this process: starting workers takes most of the time of a small run, and other tests do it."""
    from gpt2_jax.data.tokenizer import get_tokenizer
    from gpt2_jax.data.workers import BlockTokenizer

    def tokenize_blocks(blocks, options, workers):
        tokenize = BlockTokenizer(options, get_tokenizer(options.tokenizer))
        return ((block, tokenize(block)) for block in blocks)

    monkeypatch.setattr("gpt2_jax.data.preparation.tokenize_blocks", tokenize_blocks)


@pytest.fixture
def cudnn_without_gpu(monkeypatch) -> None:
    """Lowers calls of cuDNN where there is none: JAX asks for its version only to know what it supports."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.fixture(scope="session")
def tiny_config() -> GPT2Config:
    """Two layers, small and of awkward sizes: a vocabulary to pad, heads that are not a power of two."""
    return GPT2Config(vocab_size=65, block_size=32, n_layer=2, n_head=3, n_embd=48, attention="xla")


@pytest.fixture(scope="session")
def tiny(tiny_config):
    """The tiny model and its initial parameters."""
    model = GPT2(tiny_config)
    return model, init_params(model, jax.random.key(0))
