"""The compilation cache, memory reuse on CPU, and how often training compiles a program or moves data."""

import collections
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax._src import compilation_cache as cache_of_jax
from jaxlib import xla_client
from xla_flags import FAST_COMPILE

from gpt2_jax import runtime
from gpt2_jax.errors import UserError

FAULTS = """
import resource, statistics, sys
from gpt2_jax import runtime
keep, rows, warm_up, calls = sys.argv[1] == "keep", *map(int, sys.argv[2:])
if keep:
    runtime.use_single_malloc_arena()
import jax, jax.numpy as jnp
@jax.jit
def update(x):  # 4 rows² bytes of temporary memory
    y = x.reshape(rows, 8)
    z = y @ y.T
    return x + (z * jnp.roll(z, 1)).sum()
x = jnp.ones(rows * 8)
if keep:
    runtime.keep_freed_memory(update.lower(x).compile())
for _ in range(warm_up):
    x = update(x).block_until_ready()
faults = []
for _ in range(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = update(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults)))
"""


@pytest.fixture
def jax_config():
    """Restores the settings that `enable_compilation_cache` changes."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before, get_file_cache = {name: getattr(jax.config, name) for name in names}, cache_of_jax.get_file_cache
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)
    cache_of_jax.get_file_cache = get_file_cache
    cache_of_jax.reset_cache()


def page_faults(*args: str) -> int:
    """Page faults of the median call in a process with the arguments default|keep, rows, warm-up and calls."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", FAULTS, *args], env=environment, capture_output=True, check=True)
    return int(done.stdout)


def program(n_bytes: int) -> SimpleNamespace:
    """A compiled program with `n_bytes` of temporary memory."""
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=n_bytes))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.slow
def test_a_cpu_program_reuses_its_temporary_memory():
    # 64 MB are 16,384 pages. In some calls malloc may still place the block anew, as the order in which threads free
    # memory changes: in four of ten on busy cores. The heap never shrinks, so this ends.
    assert page_faults("default", "4096", "3", "3") > 16000
    assert page_faults("keep", "4096", "20", "10") < 4000
    assert page_faults("keep", "9000", "3", "3") > 79000  # 324 MB are over the limit


def test_malloc_settings_of_the_user_win(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: pytest.fail("mallopt was called"))
    runtime.use_single_malloc_arena()
    runtime.keep_freed_memory(program(1 << 20))


def own(directory: Path) -> Path:
    """The directory of this user in a directory for all."""
    return directory / (f"user-{os.geteuid()}" if hasattr(os, "geteuid") else "user")


def test_programs_are_cached_in_the_users_cache_directory(monkeypatch, tmp_path, jax_config):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime.enable_compilation_cache("auto")
    programs = own(tmp_path / "gpt2_jax" / "programs")
    assert jax_config.jax_compilation_cache_dir == str(programs)
    assert jax_config.jax_persistent_cache_enable_xla_caches == "none"
    assert programs.is_dir()
    runtime.enable_compilation_cache("")
    assert jax_config.jax_compilation_cache_dir is None
    runtime.enable_compilation_cache(str(tmp_path / "mine"))
    assert jax_config.jax_compilation_cache_dir == str(own(tmp_path / "mine"))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no owners and modes of this kind")
def test_a_cache_that_others_can_write_is_not_used(monkeypatch, tmp_path, jax_config):
    old = os.umask(0)
    try:
        runtime.enable_compilation_cache(str(tmp_path / "shared"))  # the directory of all is as the umask says
    finally:
        os.umask(old)
    programs = own(tmp_path / "shared")
    assert (programs.parent.stat().st_mode & 0o777, programs.stat().st_mode & 0o777) == (0o777, 0o700)
    message = (
        rf"compilation_cache = '.*/shared' has {programs.name}, which is not a directory that only you can write; "
    )
    for mode in (0o720, 0o702):
        programs.chmod(mode)
        with pytest.raises(UserError, match=message + "type --compilation_cache ''"):
            runtime.enable_compilation_cache(str(tmp_path / "shared"))
    programs.chmod(0o700)
    programs.rename(tmp_path / "elsewhere")
    programs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=message):
        runtime.enable_compilation_cache(str(tmp_path / "shared"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runtime, "is_private", lambda status: False)
    runtime.enable_compilation_cache("auto")
    assert jax_config.jax_compilation_cache_dir is None


def test_a_jax_with_another_cache_has_none(monkeypatch, tmp_path, jax_config, capsys):
    monkeypatch.delattr(cache_of_jax, "get_file_cache")
    runtime.enable_compilation_cache(str(tmp_path))
    assert jax_config.jax_compilation_cache_dir is None
    line = f"programs are not cached: gpt2_jax cannot check those of JAX {jax.__version__}\n"
    assert capsys.readouterr() == ("", line)


def test_the_environment_overrides_the_default(monkeypatch, tmp_path, jax_config):
    before = jax_config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    get_file_cache = cache_of_jax.get_file_cache
    runtime.enable_compilation_cache("auto")
    assert jax_config.jax_compilation_cache_dir == before
    assert cache_of_jax.get_file_cache is get_file_cache


def test_a_cache_directory_that_cannot_be_created(monkeypatch, tmp_path, jax_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"compilation_cache = '.*file/x' cannot be written; type --compilation_cache ''"
    ):
        runtime.enable_compilation_cache(str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match="cannot be written"):
        runtime.enable_compilation_cache(str(tmp_path / "new" / ("x" * 300)))
    assert not (tmp_path / "new").exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    runtime.enable_compilation_cache("auto")  # a user without a home directory
    assert jax_config.jax_compilation_cache_dir is None


# --- the memory of a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_training_takes_most_of_a_gpu_unless_the_environment_says_how_much(monkeypatch, name):
    for each in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(each, "")  # so that it is restored
        monkeypatch.delenv(each)
    runtime.use_most_of_gpu_memory()
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.9
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv(name, "0.5")
    runtime.use_most_of_gpu_memory()
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.5


# --- containers: a user id that nobody has, with or without a home ---------------------------------------

NOBODYS_ID = 54321
COMPILING = """
import jax, jax.numpy as jnp
from gpt2_jax import runtime
runtime.enable_compilation_cache("auto")
for factor in range(3):
    jax.jit(lambda x: x * factor)(jnp.ones(3)).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def as_nobody():
    """Runs this Python as a user without an entry in the table of users, in an empty directory that it may write."""
    if not hasattr(os, "getuid") or os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can take another user id, with setpriv of util-linux")
    with tempfile.TemporaryDirectory(prefix="gpt2_jax-nobody-") as directory:
        os.chmod(directory, 0o777)

        def run(*args, umask=0o022, **environment):
            hidden = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
            kept = {name: value for name, value in os.environ.items() if name not in hidden}
            setpriv = ["setpriv", f"--reuid={NOBODYS_ID}", f"--regid={NOBODYS_ID}", "--clear-groups"]
            paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "XLA_FLAGS": FAST_COMPILE}
            return subprocess.run(
                [*setpriv, sys.executable, *args],
                cwd=directory,
                env=kept | paths | environment,
                capture_output=True,
                text=True,
                umask=umask,
            )

        if run("-c", "import jax").returncode:
            pytest.skip("another user cannot read this checkout or its Python")
        yield run, Path(directory)


def test_a_cache_for_a_user_id_that_nobody_has(as_nobody):
    run, home = as_nobody
    done = run("-c", COMPILING)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
    done = run("-c", COMPILING, umask=0o077, HOME=str(home))
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"{home}/.cache/gpt2_jax/programs/user-{NOBODYS_ID}\n",
        "",
    )
    assert len(list((home / ".cache/gpt2_jax/programs").glob("*/*.program"))) >= 3
    done = run("-c", COMPILING, HOME="/proc")  # nobody can write there
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"HOME": "."}, {"HOME": "/proc"}])
def test_a_user_id_that_nobody_has_trains_and_generates(as_nobody, environment):
    run, directory = as_nobody
    environment = {name: str(directory) if value == "." else value for name, value in environment.items()}
    flags = ["--config", "quickstart", "--steps", "5", "--model.n_layer", "1", "--data.val_fraction", "0.001"]
    done = run("-m", "gpt2_jax.train", *flags, umask=0o077, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert (directory / "runs/quickstart/loss.png").exists()
    flags = ["--model", "runs/quickstart", "--prompt", "def ", "--max-new-tokens", "5"]
    done = run("-m", "gpt2_jax.generate", *flags, umask=0o077, **environment)
    assert (done.returncode, done.stderr) == (0, "")


TRAINING = """
import collections, sys
import jax
from gpt2_jax import train
from gpt2_jax.config.flags import parse_args

calls = collections.Counter()

def counted(module, name):
    function = getattr(module, name)
    setattr(module, name, lambda *args: calls.update([name]) or function(*args))

counted(train, "put_batch")
counted(jax, "device_get")
train.train(parse_args("train", "", sys.argv[1:]))
print(*calls.elements())
"""
TWELVE = """--config quickstart --steps 12 --optimizer.warmup_steps 5 --eval.every 3 --checkpoint.every 5
--eval.sample_tokens 5 --model.n_layer 1 --model.n_embd 24 --model.block_size 32 --compilation_cache ''"""


@pytest.fixture(scope="module")
def twelve_updates(tmp_path_factory):
    """Programs compiled and transfers made by 12 updates with evaluations, checkpoints and sampling."""
    path = tmp_path_factory.mktemp("twelve")
    (path / "text.txt").write_text("to be or not to be, " * 500)
    environment = os.environ | {"JAX_LOG_COMPILES": "1", "XLA_FLAGS": FAST_COMPILE}
    command = [sys.executable, "-c", TRAINING, *shlex.split(TWELVE), "--data.text", "text.txt", "--out", "run"]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, check=True)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr)
    return collections.Counter(compiled), collections.Counter(done.stdout.splitlines()[-1].split())


def test_each_program_is_compiled_once(twelve_updates):
    compiled, _ = twelve_updates
    ours = dict.fromkeys(("_new_state", "update", "evaluate", "_prefill", "_decode"), 1)
    assert {name: compiled[name] for name in ours} == ours
    # JAX compiles small programs around the sampling, 9 in version 0.10.2, with names of its own. A fingerprint has one
    # for each of the 10 shapes of arrays in the state, and two more.
    assert compiled.total() - len(ours) <= 12 + 12


def test_each_update_moves_one_batch(twelve_updates):
    _, calls = twelve_updates
    # device_get: the metrics of each update, and the loss sums of four evaluations and of the summary.
    assert calls == {"put_batch": 12, "device_get": 12 + 5}
