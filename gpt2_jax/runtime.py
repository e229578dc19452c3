"""What programs run in: compiled ones are kept on disk, and on CPUs freed memory is kept in the process.

Each only where the user has not decided it by the environment.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import jax

from gpt2_jax.errors import UserError

CACHE_BYTES = 8 << 30  # The programs not used for longest go first. The quickstart's, for one CPU, take 260 KB.

KEPT_BYTES = 256 << 20  # The most temporary memory of a program that is kept.

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def enable_compilation_cache(directory: str) -> None:
    """JAX keeps what it compiles in this directory, and the next process that needs it does not compile.

    Args:
        directory: "auto" for gpt2_jax in the user's cache directory, empty for none. JAX_COMPILATION_CACHE_DIR and
            JAX_ENABLE_COMPILATION_CACHE, where they are set, decide instead of "auto".

    Raises:
        UserError: the directory cannot be made or written.
    """
    if directory == "auto":
        if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & set(os.environ):
            return
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2_jax" / "programs"
    else:
        path = Path(directory).expanduser()
    if directory and not _is_writable(path):
        if directory != "auto":
            raise UserError(f"compilation_cache = {directory!r} cannot be written; type --compilation_cache ''")
        directory = ""  # a user without a home compiles at each start, as JAX alone does
    jax.config.update("jax_compilation_cache_dir", str(path) if directory else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small ones are a slow start too
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def _is_writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)


def use_single_malloc_arena() -> None:
    """All threads take memory from one heap; has to come before there are threads. `keep_freed_memory` needs it."""
    _mallopt(_M_ARENA_MAX, 1)


def keep_freed_memory(program: jax.stages.Compiled) -> None:
    """What XLA's CPU backend frees after a call of this program, the next call gets again, if it is little.

    glibc would hand large blocks back to the kernel, and the next call find all their pages missing: a third of the
    time of an update of nanoGPT's character model. But a heap breaks into pieces and comes to several times what is
    needed at once, 7.8 GB instead of 2.1 with 6 layers of 384, which are not worth the quarter of the time there.
    """
    memory = program.memory_analysis()
    if memory and memory.temp_size_in_bytes <= KEPT_BYTES:
        _mallopt(_M_MMAP_MAX, 0)
        _mallopt(_M_TRIM_THRESHOLD, -1)


def _mallopt(parameter: int, value: int) -> None:
    """glibc's `mallopt`, where there is one and the environment does not tune malloc already."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, value)
