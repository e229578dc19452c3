"""Process setup: the persistent compilation cache, and malloc on CPU.

Environment variables that configure either of them win over the defaults here.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import jax

from gpt2_jax.errors import UserError
from gpt2_jax.files import user_path

CACHE_BYTES = 8 << 30  # JAX evicts the least recently used programs. The quickstart's take 260 KB on one CPU.

MAX_KEPT_BYTES = 256 << 20  # A program with more temporary memory returns it to the kernel after each call.

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def enable_compilation_cache(directory: str) -> None:
    """Caches compiled programs on disk, for this process and later ones.

    Args:
        directory: "auto" for gpt2_jax in the user's cache directory, empty for no cache. JAX_COMPILATION_CACHE_DIR and
            JAX_ENABLE_COMPILATION_CACHE override "auto".

    Raises:
        UserError: the directory cannot be created or written.
    """
    if directory == "auto":
        if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & set(os.environ):
            return
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = Path(cache, "gpt2_jax", "programs") if os.path.isabs(cache) else None  # "~" stays if nobody has a home
    else:
        path = user_path(directory, "compilation_cache") if directory else None
    if path and not _is_writable(path):
        if directory != "auto":
            raise UserError(f"compilation_cache = {directory!r} cannot be written; type --compilation_cache ''")
        path = None  # a user without a home directory has no cache, as in plain JAX
    jax.config.update("jax_compilation_cache_dir", str(path) if path else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs add up to a slow start
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES if path and _owner_is_known(path) else -1)


def _owner_is_known(directory: Path) -> bool:
    """False for a user id that is not in the table of users, as containers give to a process.

    To evict programs, JAX asks for the size of each file, and etils looks up the name of its owner on the way. Without
    one, JAX warns at every compilation and caches nothing. So such a cache has no limit.
    """
    try:
        import pwd
    except ImportError:  # Windows
        return True
    try:
        for owner in {os.getuid(), *(entry.stat().st_uid for entry in os.scandir(directory))}:
            pwd.getpwuid(owner)
    except (KeyError, OSError):
        return False
    return True


def _is_writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)


def use_single_malloc_arena() -> None:
    """Makes all threads allocate from one heap, as `keep_freed_memory` needs. Call it before any thread starts."""
    _mallopt(_M_ARENA_MAX, 1)


def keep_freed_memory(program: jax.stages.Compiled) -> None:
    """Lets the next call of a CPU program reuse the temporary memory of the last one, up to `MAX_KEPT_BYTES`.

    By default glibc returns large blocks to the kernel, and the next call page-faults on all of it: a third of the time
    of an update of nanoGPT's character model. A heap that keeps its memory also fragments. With 6 layers of width 384
    it grew to 7.8 GB instead of 2.1 GB, for a quarter of the time. Hence the limit.
    """
    memory = program.memory_analysis()
    if memory and memory.temp_size_in_bytes <= MAX_KEPT_BYTES:
        _mallopt(_M_MMAP_MAX, 0)
        _mallopt(_M_TRIM_THRESHOLD, -1)


def _mallopt(parameter: int, value: int) -> None:
    """Calls glibc's `mallopt`, unless the C library is another one or the environment already tunes malloc."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, value)
