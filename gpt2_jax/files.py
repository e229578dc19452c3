"""Paths that users type, atomic file writes, and a lock that lets one process at a time write a directory."""

from __future__ import annotations

import errno
import glob
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt2_jax.errors import UserError

# The kinds of file that are refused: reading them can wait forever, or never ends.
_STREAMS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def user_path(text: str, name: str) -> Path:
    """The path that a user typed, with `~` expanded. It need not exist.

    Args:
        text: the path or glob.
        name: the flag or the config key that it comes from, for errors: "--out" or "data.text".

    Raises:
        UserError: no file can have this path.
    """
    return Path(_expand(text, name))


def _expand(text: str, name: str) -> str:
    shown = f"{name} = {text!r}" if name[:1].islower() else f"{name} {text!r}"
    if not text:
        raise UserError(f"{shown} is empty; type a path")
    if "\0" in text:
        raise UserError(f"{shown} has a NUL character, which no path has; type another path")
    check_utf8(text, name)
    path = os.path.expanduser(text)
    if path == text and text.startswith("~"):
        home = text.split("/")[0]
        raise UserError(f"{shown}: {home} is unknown; type the whole path, or ./{home} for a file of that name")
    if not glob.has_magic(path):
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UserError(f"{shown}: {error.strerror}; type a shorter path") from error
    return path


def check_utf8(text: str, name: str) -> None:
    """Checks that a text of the command line can be written to a file.

    Raises:
        UserError: it is not UTF-8. Python has replaced the bytes that are not by surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{name} has {text!r}, which is not UTF-8; convert it, or type another") from None


def find_paths(pattern: str, name: str) -> list[Path]:
    """The paths that a user means, sorted: a path that exists, even with `*` or `[` in it; else the matches of a glob.

    Args:
        pattern: the path or glob.
        name: as for `user_path`.

    Raises:
        UserError: no file can have this path, or the path is that of a FIFO, a socket or a device.
    """
    pattern = _expand(pattern, name)
    if not os.path.exists(pattern):
        return sorted(map(Path, glob.glob(pattern, recursive=True)))
    check_regular(Path(pattern))
    return [Path(pattern)]


def check_regular(path: Path) -> None:
    """Checks that reading a path ends: it is a file, a directory or nothing.

    Raises:
        UserError: it is a FIFO, a socket or a device.
    """
    try:
        kind = _STREAMS.get(stat.S_IFMT(path.stat().st_mode))
    except OSError:  # reported where it is opened
        return
    if kind:
        raise UserError(f"{path} is {kind}; expected a file; store the content in one, and type its name")


def is_open_pipe(text: str) -> bool:
    """True for a pipe that the shell has connected: `<(command)` and /dev/stdin. Reading it ends with its writer."""
    return text.startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))


def check_hub_cache(name: str) -> None:
    """Checks that the libraries of the Hugging Face hub know where to keep their files.

    Args:
        name: of what is to be read from the hub, for the error.

    Raises:
        UserError: this user has no home directory. Some of them would write into a directory called `~`.
    """
    from huggingface_hub.constants import HF_HUB_CACHE  # imported late: few commands need it

    if HF_HUB_CACHE.startswith("~"):
        raise UserError(
            f"{name} is not a file or directory here, and there is no home directory to keep files of the Hugging Face "
            "hub in; give a path, or set HF_HOME to a directory"
        )


def make_directory(directory: Path) -> list[Path]:
    """Creates a directory and its parents, and returns those that are new, the deepest first.

    Raises:
        OSError: it cannot be created. Then none of them stays.
    """
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_empty(new)
        raise
    return new


def remove_empty(directories: Iterable[Path]) -> None:
    """Removes those of some directories that exist and are empty, in this order."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def replace_text(path: Path, text: str | Iterable[str]) -> None:
    """Writes a text, or its parts, to a file atomically: readers see the old text or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:  # the same bytes on every system
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive(directory: Path, purpose: str) -> Iterator[None]:
    """Locks a directory for this process. The kernel releases the lock when the process ends, even if it is killed.

    The lock is on the directory itself. Windows cannot open one, and locks the file `.lock` in it instead.

    Args:
        purpose: the activity that the lock protects, for the error message: "training".

    Raises:
        UserError: another process holds the lock. (A requeued job can start while the old one still saves.)
    """
    file = directory / ".lock" if sys.platform == "win32" else None
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT) if file else os.open(directory, os.O_RDONLY)
    try:
        try:
            _lock(descriptor)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is {purpose} in {directory}; wait for it, stop it, or give another --out"
            ) from None
        except OSError:  # some network file systems have no locks: there, nothing stops a second process
            pass
        yield
    finally:
        os.close(descriptor)
        if file:
            with suppress(OSError):  # another process has it open
                file.unlink()


def _lock(descriptor: int) -> None:
    """Locks an open file or directory, without waiting, with the lock that each system releases with the process.

    Raises:
        BlockingIOError, on Windows PermissionError: another process holds the lock.
        OSError: the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
