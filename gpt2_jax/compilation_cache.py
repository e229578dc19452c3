"""A cache of compiled programs that runs only what this user has written, whole and for the same key.

JAX hands the files of its own cache to XLA as they are. A damaged one can crash the process, and is never replaced.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jaxlib.version import __version__ as jaxlib_version

_ENTRY, _PARTIAL = ".program", ".partial"
_DIGEST_BYTES = 32  # SHA-256, at the start of each file
_VERSIONS = f"{jax.__version__} {jaxlib_version}"  # also in JAX's keys, but those are not for us to rely on

# A symbolic link is not followed, and a FIFO does not block. Windows has neither flag.
_READ_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class ProgramCache:
    """Compiled programs in a directory, one file each. JAX calls `get` and `put`.

    No damage to the directory, a full disk and a read-only one included, is an error: the program is compiled again.

    Args:
        directory: exists, and has files of this cache only.
        max_bytes: of all files. The least recently used are removed first, by their times of modification.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._path = directory  # the name that JAX logs
        self._max_bytes = max_bytes
        self._n_bytes = max_bytes  # an upper bound, until the first `put` has counted

    def get(self, key: str) -> bytes | None:
        """The program of a key; None if there is none, or none that can be trusted. Such a file is removed."""
        path = self._file(key)
        try:
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _READ_FLAGS)) as file:
                status = os.fstat(file.fileno())
                is_fine = stat.S_ISREG(status.st_mode) and is_private(status) and status.st_size <= self._max_bytes
                content = file.read() if is_fine else b""
        except OSError:
            return None
        digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != _digest(key, program):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return program

    def put(self, key: str, program: bytes) -> None:
        """Stores a program, or nothing if it cannot be written. A reader sees the old file or the new one, whole."""
        n_bytes = _DIGEST_BYTES + len(program)
        if n_bytes > self._max_bytes:
            return
        with suppress(OSError):
            if self._n_bytes + n_bytes > self._max_bytes:
                self._n_bytes = self._evict(self._max_bytes - n_bytes)
            descriptor, partial = tempfile.mkstemp(dir=self._path, suffix=_PARTIAL)
            try:
                with open(descriptor, "wb") as file:
                    file.write(_digest(key, program))
                    file.write(program)
                os.replace(partial, self._file(key))
                self._n_bytes += n_bytes
            finally:
                with suppress(OSError):  # gone, if it was written
                    os.unlink(partial)

    def _file(self, key: str) -> Path:
        return self._path / f"{key}{_ENTRY}"

    def _evict(self, max_bytes: int) -> int:
        """Removes the least recently used files until `max_bytes` or less are left, and returns their size.

        If it removes any, it removes down to 7/8 of that: a full cache is not counted for each new program.
        """
        files: list[tuple[float, int, str]] = []
        for entry in os.scandir(self._path):
            if entry.name.endswith((_ENTRY, _PARTIAL)):  # partial ones of processes that were killed
                with suppress(OSError):  # another process has removed it
                    status = entry.stat(follow_symlinks=False)
                    files.append((status.st_mtime, status.st_size, entry.path))
        left = sum(n_bytes for _, n_bytes, _ in files)
        if left > max_bytes:
            for _, n_bytes, path in sorted(files):
                if left <= max_bytes - max_bytes // 8:
                    break
                with suppress(OSError):
                    os.unlink(path)
                    left -= n_bytes
        return left


def is_private(status: os.stat_result) -> bool:
    """True if a file or directory belongs to this user, and nobody else can write it."""
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _digest(key: str, program: bytes) -> bytes:
    """The SHA-256 of a program, its key and the versions: a file of another name or version has another one."""
    digest = hashlib.sha256(f"{_VERSIONS}\n{key}\n".encode())
    digest.update(program)
    return digest.digest()


def use_program_cache(cache: ProgramCache, directory: Path) -> bool:
    """Makes JAX keep its compiled programs in the cache of a directory, for this process.

    JAX has no public way to do so.

    Returns:
        False if this version of JAX is not as `_install` knows it. Then JAX caches nothing.
    """
    jax.config.update("jax_compilation_cache_dir", str(directory))
    try:
        if _install(cache, str(directory)):
            return True
    except (ImportError, AttributeError, TypeError):  # a module, a name or a parameter has gone
        pass
    jax.config.update("jax_compilation_cache_dir", None)
    return False


def _install(cache: ProgramCache, directory: str) -> bool:
    """Gives JAX the cache of a directory, and tells whether JAX has taken it."""
    module: Any = importlib.import_module("jax._src.compilation_cache")
    module.get_file_cache = functools.partial(_file_cache, module.get_file_cache, cache, directory)
    module.reset_cache()  # JAX may have begun to use another one
    if not module.is_persistent_cache_enabled():  # by the environment
        return True
    module._initialize_cache()
    if module._cache is cache:
        return True
    module.reset_cache()
    return False


def _file_cache(others: Callable[[str], Any], cache: ProgramCache, directory: str, path: str) -> Any:
    """Stands in for JAX's `get_file_cache`, which makes the cache of a directory at its first use."""
    return (cache, path) if path == directory else others(path)
