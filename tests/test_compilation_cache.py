"""Damaged, foreign and lost entries of the compilation cache, full disks, and versions of JAX that have another one."""

import errno
import os
import random
import shlex
import subprocess
import sys

import jax
import pytest
from jax._src import compilation_cache as cache_of_jax
from xla_flags import FAST_COMPILE

from gpt2_jax import compilation_cache
from gpt2_jax.compilation_cache import ProgramCache, use_program_cache
from gpt2_jax.metrics import read_rows

KEY, OTHER = "jit_update-0123", "jit_update-4567"
PROGRAM = random.Random(0).randbytes(3000)
LIMIT = 1 << 20

needs_users = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no owners and modes of this kind")


def change(path, function):
    path.write_bytes(function(path.read_bytes()))


def flip(position):
    def damage(path):
        change(path, lambda data: data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])

    return damage


def swap(path):
    """Gives a program the entry of another one, as a damaged file system does."""
    path.with_name(f"{OTHER}.program").replace(path)


def replace_by(make):
    def damage(path):
        path.rename(path.with_name("elsewhere"))  # whole
        make(path)

    return damage


DAMAGES = {
    "digest": flip(5),
    "first byte": flip(32),
    "middle": flip(1000),
    "last byte": flip(3031),
    "truncated": lambda path: change(path, lambda data: data[:1500]),
    "in the digest": lambda path: change(path, lambda data: data[:20]),
    "digest only": lambda path: change(path, lambda data: data[:32]),
    "empty": lambda path: change(path, lambda data: b""),
    "zeros": lambda path: change(path, lambda data: bytes(len(data))),
    "longer": lambda path: change(path, lambda data: data + b"\0"),
    "no digest": lambda path: change(path, lambda data: data[32:]),
    "swapped": swap,
    "huge": lambda path: os.truncate(path, 1 << 40),  # sparse
    "writable by a group": lambda path: path.chmod(0o660),
    "writable by all": lambda path: path.chmod(0o602),
    "symbolic link": replace_by(lambda path: path.symlink_to("elsewhere")),
    "dangling link": replace_by(lambda path: path.symlink_to("nowhere")),
    "FIFO": replace_by(lambda path: os.mkfifo(path)),
    "lost": lambda path: path.unlink(),
}


@pytest.fixture
def cache(tmp_path):
    cache = ProgramCache(tmp_path, LIMIT)
    cache.put(KEY, PROGRAM)
    cache.put(OTHER, PROGRAM[::-1])
    assert (cache.get(KEY), cache.get(OTHER)) == (PROGRAM, PROGRAM[::-1])
    return cache


@needs_users
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_no_entry_and_is_replaced(damage, cache, tmp_path):
    path = tmp_path / f"{KEY}.program"
    DAMAGES[damage](path)
    assert cache.get(KEY) is None
    cache.put(KEY, PROGRAM)
    assert cache.get(KEY) == PROGRAM
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_entry_is_removed(cache, tmp_path):
    flip(1000)(tmp_path / f"{KEY}.program")
    cache.get(KEY)
    assert [path.name for path in tmp_path.iterdir()] == [f"{OTHER}.program"]


@needs_users
def test_an_entry_of_another_user_is_no_entry(cache, monkeypatch):
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert cache.get(KEY) is None


def test_an_entry_of_another_version_is_no_entry(cache, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_VERSIONS", "0.9.9 0.9.9")
    assert cache.get(KEY) is None


def test_a_directory_in_the_place_of_an_entry_costs_the_entry(cache, tmp_path):
    (tmp_path / f"{KEY}.program").unlink()
    (tmp_path / f"{KEY}.program").mkdir()
    assert cache.get(KEY) is None
    cache.put(KEY, PROGRAM)
    assert cache.get(KEY) is None
    assert cache.get(OTHER)
    assert not list(tmp_path.glob("*.partial"))


def test_files_of_jax_do_not_matter(cache, tmp_path):
    """JAX's own cache never writes an entry again whose `-cache` is there, and stops without an `-atime`."""
    for name in (f"{KEY}-cache", "jit_a-1-cache", "jit_b-2-atime", ".lockfile"):
        (tmp_path / name).write_bytes(b"?")
    assert cache.get(KEY) == PROGRAM
    assert cache.get("jit_a-1") is None
    cache.put("jit_a-1", PROGRAM)
    assert cache.get("jit_a-1") == PROGRAM


# --- writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_nothing(number, cache, tmp_path, monkeypatch):
    def fail(*args, **keywords):
        raise OSError(number, os.strerror(number))

    before = sorted(tmp_path.iterdir())
    for name in ("replace", "utime"):
        monkeypatch.setattr(compilation_cache.os, name, fail)
    cache.put("new", PROGRAM)
    cache.put(KEY, b"another")
    assert cache.get("new") is None
    assert cache.get(KEY) == PROGRAM
    monkeypatch.setattr(compilation_cache.tempfile, "mkstemp", fail)
    cache.put("new", PROGRAM)
    assert sorted(tmp_path.iterdir()) == before


def test_a_directory_that_has_gone(cache, tmp_path):
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    assert cache.get(KEY) is None
    cache.put(KEY, PROGRAM)
    assert cache.get(KEY) is None


def test_the_least_recently_used_are_removed(tmp_path):
    size = 32 + 1000
    cache = ProgramCache(tmp_path, 10 * size)
    (tmp_path / "mine.txt").write_text("stays")
    (tmp_path / "killed.partial").write_bytes(bytes(size))
    os.utime(tmp_path / "killed.partial", (1, 1))
    for number in range(9):
        cache.put(str(number), bytes(1000))
        os.utime(tmp_path / f"{number}.program", (100 + number, 100 + number))
    assert len(list(tmp_path.iterdir())) == 11
    assert cache.get("0") == bytes(1000)  # now the most recently used
    cache.put("new", bytes(1000))  # one too many: down to 7/8 of the rest, which is 7 others
    kept = {path.stem for path in tmp_path.glob("*.program")}
    assert kept == {"0", "3", "4", "5", "6", "7", "8", "new"}
    assert (tmp_path / "mine.txt").exists()
    assert not (tmp_path / "killed.partial").exists()
    cache.put("larger than all", bytes(11 * size))
    assert {path.stem for path in tmp_path.glob("*.program")} == kept


def test_two_processes_of_one_cache(tmp_path):
    one, other = ProgramCache(tmp_path, 5000), ProgramCache(tmp_path, 5000)
    for number in range(40):
        (one, other)[number % 2].put(str(number), bytes(400))
        assert other.get(str(number)) == one.get(str(number)) == bytes(400)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 5000  # each knows what it wrote itself


# --- in JAX --------------------------------------------------------------------------------------------

# Compiles and runs, again and again, with damage in between. What would crash crashes this process.
COMPILING = """
import random, resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from gpt2_jax import runtime
from gpt2_jax.compilation_cache import ProgramCache

runtime.enable_compilation_cache(sys.argv[1])
(directory,) = Path(sys.argv[1]).iterdir()
draw = random.Random(0)
events = []
jax.monitoring.register_event_listener(lambda name, **keywords: events.append(name.rpartition("_")[2]))

def values():
    jax.clear_caches()
    events.clear()
    x = jnp.arange(12.0).reshape(3, 4)
    results = [jax.jit(lambda x: jnp.tanh(x @ x.T + factor).sum())(x).item() for factor in range(3)]
    return results, events.count("hits"), events.count("misses")

def flip(data):
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]

expected, hits, n = values()
assert n >= 4 and not hits
assert values() == (expected, n, 0)
entries = {path: path.read_bytes() for path in directory.iterdir()}
assert len(entries) == n
rotated = dict(zip(entries, [*list(entries.values())[1:], next(iter(entries.values()))]))
kinds = {
    "flipped": lambda path, data: flip(data),
    "truncated": lambda path, data: data[: len(data) // 2],
    "zeros": lambda path, data: bytes(len(data)),
    "empty": lambda path, data: b"",
    "swapped": lambda path, data: rotated[path],
    "as JAX has it": lambda path, data: data[32:],
}
for kind in ["flipped"] * int(sys.argv[2]) + list(kinds):
    for path, data in entries.items():
        path.write_bytes(kinds[kind](path, data))
    assert values() == (expected, 0, n), kind
    assert values() == (expected, n, 0), kind

for path in entries:
    path.unlink()
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # fails in the middle of a file, as a full disk
assert values() == (expected, 0, n)
assert not list(directory.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, before)
assert values() == (expected, 0, n)
assert values() == (expected, n, 0)
print("as expected")
"""


def compile_with_damage(directory, flips):
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE}
    command = [sys.executable, "-c", COMPILING, str(directory), str(flips)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "as expected\n", "")


@needs_users
def test_damage_between_compilations_changes_nothing(tmp_path):
    compile_with_damage(tmp_path / "programs", 3)


@pytest.mark.slow
@needs_users
def test_many_flipped_bits_change_nothing(tmp_path):
    compile_with_damage(tmp_path / "programs", 60)


TRAINING = """--config quickstart --steps 4 --optimizer.warmup_steps 2 --eval.every 2 --eval.sample_tokens 5
--log.every 1 --model.n_layer 1 --model.n_embd 24 --model.block_size 32 --data.text text.txt
--compilation_cache programs"""


@pytest.mark.slow
@needs_users
def test_training_with_a_damaged_cache_is_the_same_training(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, " * 500)

    def losses(out):
        command = [sys.executable, "-m", "gpt2_jax.train", *shlex.split(TRAINING), "--out", out]
        environment = os.environ | {"XLA_FLAGS": FAST_COMPILE}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        rows = read_rows(tmp_path / out / "metrics.jsonl")
        return [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows]

    whole = losses("first")
    entries = sorted(tmp_path.glob("programs/*/*.program"))
    assert len(entries) >= 5
    damages = [DAMAGES[name] for name in ("middle", "truncated", "zeros", "empty", "first byte", "digest")]
    for index, path in enumerate(entries):
        damages[index % len(damages)](path)
    assert losses("second") == whole
    assert losses("third") == whole


@pytest.fixture
def settings_of_jax():
    """Restores what `use_program_cache` changes in JAX."""
    before = jax.config.jax_compilation_cache_dir, cache_of_jax.get_file_cache
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    cache_of_jax.get_file_cache = before[1]
    cache_of_jax.reset_cache()


def test_jax_takes_the_cache(settings_of_jax, tmp_path):
    ours, others = tmp_path / "ours", tmp_path / "others"
    ours.mkdir()
    assert use_program_cache(ProgramCache(ours, LIMIT), ours)
    assert jax.jit(lambda x: x + 12345)(1) == 12346
    assert list(ours.glob("jit_*.program"))
    before = set(ours.iterdir())
    jax.config.update("jax_compilation_cache_dir", str(others))  # of the user, who has changed their mind
    cache_of_jax.reset_cache()
    assert jax.jit(lambda x: x + 54321)(1) == 54322
    assert list(others.glob("jit_*-cache"))
    assert set(ours.iterdir()) == before


@pytest.mark.parametrize("name", ["get_file_cache", "reset_cache", "_initialize_cache", "is_persistent_cache_enabled"])
def test_without_a_part_of_jax_nothing_is_cached(name, settings_of_jax, monkeypatch, tmp_path):
    with monkeypatch.context() as context:
        context.delattr(cache_of_jax, name)
        assert not use_program_cache(ProgramCache(tmp_path, LIMIT), tmp_path)
    assert jax.config.jax_compilation_cache_dir is None


def test_if_jax_prefers_its_own_nothing_is_cached(settings_of_jax, monkeypatch, tmp_path):
    def initialize():
        cache_of_jax._cache = cache_of_jax.LRUCache(str(tmp_path), max_size=-1)

    with monkeypatch.context() as context:
        context.setattr(cache_of_jax, "_initialize_cache", initialize)
        assert not use_program_cache(ProgramCache(tmp_path, LIMIT), tmp_path)
    assert jax.config.jax_compilation_cache_dir is None
    assert cache_of_jax._cache is None
    assert jax.jit(lambda x: x + 23456)(1) == 23457
    assert not list(tmp_path.iterdir())
