"""Process setup: the persistent compilation cache, malloc on CPU, and the memory of a GPU.

Environment variables that configure either of them win over the defaults here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import jax

from gpt2_jax.compilation_cache import ProgramCache, is_private, use_program_cache
from gpt2_jax.errors import UserError
from gpt2_jax.files import make_directory, user_path
from gpt2_jax.hardware import GPU_MEMORY_SHARE

CACHE_BYTES = 8 << 30  # The least recently used programs are removed. The quickstart's take 260 KB on one CPU.

MAX_KEPT_BYTES = 256 << 20  # A program with more temporary memory returns it to the kernel after each call.

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def enable_compilation_cache(directory: str) -> ProgramCache | None:
    """Caches compiled programs on disk, for this process and later ones of this user.

    Args:
        directory: "auto" for gpt2_jax/programs in the user's cache directory, empty for no cache. The programs are in
            a directory of the user's own in it. JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE override
            "auto": then JAX's own cache is used, or none.

    Returns:
        The cache; None if there is none, or JAX's own.

    Raises:
        UserError: the directory cannot be created or written, or the user's own in it is not private.
    """
    if directory == "auto":
        if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & set(os.environ):
            return None
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = Path(cache, "gpt2_jax", "programs") if os.path.isabs(cache) else None  # "~" stays if nobody has a home
    else:
        path = user_path(directory, "compilation_cache") if directory else None
    problem = ""
    if path:
        path /= f"user-{os.geteuid()}" if hasattr(os, "geteuid") else "user"  # others may use the same directory
        problem = _make_private(path)
        if problem and directory != "auto":
            raise UserError(f"compilation_cache = {directory!r} {problem}; type --compilation_cache ''")
    if path and not problem:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small ones add up to a slow start
        if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA trusts its own files as they are
        programs = ProgramCache(path, CACHE_BYTES)
        if not use_program_cache(programs, path):
            print(f"programs are not cached: gpt2_jax cannot check those of JAX {jax.__version__}", file=sys.stderr)
        return programs
    jax.config.update("jax_compilation_cache_dir", None)  # a user without a home has no cache, as in plain JAX
    return None


def _make_private(path: Path) -> str:
    """Creates a directory that only this user can write and read, and returns what is wrong with it or ""."""
    try:
        make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return "cannot be written"
    if path.is_symlink() or not is_private(status):
        return f"has {path.name}, which is not a directory that only you can write"
    return "" if os.access(path, os.W_OK) else "cannot be written"


def use_most_of_gpu_memory() -> None:
    """Lets JAX reserve `GPU_MEMORY_SHARE` of each GPU instead of three quarters, unless the environment has a share.

    The rest is for CUDA itself, the code of kernels, and NCCL's buffers. Call it before JAX looks for devices.
    """
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(os.environ):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_MEMORY_SHARE)


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
