"""Files that are there whole or not at all, and directories that one process writes at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_jax.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it: readers see the old text or the new one, whole."""
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
    """Holds a directory for this process; the system lets go of it when the process ends, however it ends.

    Args:
        purpose: what only one process may do there, for the error: "training".

    Raises:
        UserError: another process holds it. (A requeued job can start while the old one still saves.)
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
        except OSError:  # a file system without locks, as some network ones: there the user has to take care
            pass
        yield
    finally:
        os.close(descriptor)
