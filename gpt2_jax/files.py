"""Atomic file writes, and a lock that lets one process at a time write a directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_jax.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Writes a file atomically: readers see the old text or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive(directory: Path, purpose: str) -> Iterator[None]:
    """Locks a directory for this process. The kernel releases the lock when the process ends, even if it is killed.

    Args:
        purpose: the activity that the lock protects, for the error message: "training".

    Raises:
        UserError: another process holds the lock. (A requeued job can start while the old one still saves.)
    """
    if sys.platform == "win32":  # has no flock
        yield
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is {purpose} in {directory}; wait for it, stop it, or give another --out"
            ) from None
        except OSError:  # some network file systems have no locks: there, nothing stops a second process
            pass
        yield
    finally:
        os.close(descriptor)
