"""Compiled programs kept on disk, freed memory kept in the process, and how often anything is compiled or moved."""

import collections
import os
import platform
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from gpt2_jax import runtime, train
from gpt2_jax.config.flags import parse_args
from gpt2_jax.errors import UserError

FAULTS = """
import resource, sys
from gpt2_jax import runtime
keep, rows = sys.argv[1] == "keep", int(sys.argv[2])
if keep:
    runtime.use_single_malloc_arena()
import jax, jax.numpy as jnp
@jax.jit
def update(x):  # 4 rows² bytes of temporary memory
    y = x.reshape(rows, 64)
    z = y @ y.T
    return x + (z * jnp.roll(z, 1)).sum()
x = jnp.ones(rows * 64)
if keep:
    runtime.keep_freed_memory(update.lower(x).compile())
for _ in range(20):
    x = update(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    x = update(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


@pytest.fixture
def jax_config():
    """Puts back what `enable_compilation_cache` sets."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_compilation_cache_max_size",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def page_faults(*args: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", FAULTS, *args], env=environment, capture_output=True, check=True)
    return int(done.stdout)


def program(n_bytes: int) -> SimpleNamespace:
    """A compiled program with so much temporary memory."""
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=n_bytes))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_cpu_program_finds_its_memory_again():
    # 64 MB are 16,384 pages. In one of the ten calls that are counted the heap may still find it a new place.
    assert page_faults("leave", "4096") > 16000
    assert page_faults("keep", "4096") < 4000
    assert page_faults("keep", "9000") > 79000  # 324 MB are more than a heap should hold on to


def test_the_users_own_malloc_settings_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: pytest.fail("mallopt was called"))
    runtime.use_single_malloc_arena()
    runtime.keep_freed_memory(program(1 << 20))


def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path, jax_config):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime.enable_compilation_cache("auto")
    assert jax_config.jax_compilation_cache_dir == str(tmp_path / "gpt2_jax" / "programs")
    assert (tmp_path / "gpt2_jax" / "programs").is_dir()
    runtime.enable_compilation_cache("")
    assert jax_config.jax_compilation_cache_dir is None
    runtime.enable_compilation_cache(str(tmp_path / "mine"))
    assert jax_config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_the_environment_decides(monkeypatch, tmp_path, jax_config):
    before = jax_config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    runtime.enable_compilation_cache("auto")
    assert jax_config.jax_compilation_cache_dir == before


def test_a_directory_that_cannot_be_made(monkeypatch, tmp_path, jax_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"compilation_cache = '.*file/x' cannot be written; type --compilation_cache ''"
    ):
        runtime.enable_compilation_cache(str(tmp_path / "file" / "x"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    runtime.enable_compilation_cache("auto")  # a user without a home
    assert jax_config.jax_compilation_cache_dir is None


FIFTY = "--config quickstart --steps 50 --optimizer.warmup_steps 5 --eval.every 10 --checkpoint.every 20 \
--eval.sample_tokens 20 --model.n_embd 24 --model.block_size 32 --compilation_cache ''"


@pytest.fixture
def fifty(tmp_path):
    """Flags of 50 updates with evaluation, checkpoints and sampling."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 2000)
    return [*shlex.split(FIFTY), "--data.text", str(text), "--out", str(tmp_path / "run")]


def test_each_program_is_compiled_once(fifty):
    environment = {**os.environ, "JAX_LOG_COMPILES": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "gpt2_jax.train", *fifty]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    compiled = collections.Counter(re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr))
    ours = {"_new_state": 1, "update": 1, "evaluate": 1, "_prefill": 1, "_decode": 1, "stage": 1}
    # Single operations of JAX: the key of the sampling, and the prompt and tokens around it.
    around = {"_threefry_seed": 1, "_threefry_fold_in": 1, "iota": 1, "tile": 1, "broadcast_in_dim": 1}
    assert compiled == {**ours, **around, "convert_element_type": 3}


def test_each_update_moves_one_batch(monkeypatch, fifty, jax_config):
    calls = collections.Counter()

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.update([name]) or function(*args))

    counted(train, "put_batch")
    counted(jax, "device_get")
    train.train(parse_args("train", "", fifty), jax.devices()[:1])
    # Of the metrics of each update, and of the sums of five evaluations and the one of the summary.
    assert calls == {"put_batch": 50, "device_get": 50 + 6}
