"""Finds and reads the files of a model: what may not be read, is no JSON or is too large is one line."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt2_jax import parsing
from gpt2_jax.errors import UserError, one_line

FindFile = Callable[[str], Path | None]  # finds a file of a model by its name; None if there is none

LARGEST_TEXT = 1 << 25  # bytes of a JSON or text file. GPT-2's tokenizer.json has 3.5 MB, one of 250,000 tokens 17 MB.


@contextlib.contextmanager
def permission(path: Path | str) -> Iterator[None]:
    """Turns the error of a file or directory that this user may not read into a `UserError`."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"no permission to read {error.filename or path}; ask its owner, or type chmod u+rX on it"
        ) from error


def check_permission(path: Path) -> None:
    """Opens a file, or every file in a directory, before a library does that takes what is forbidden for damaged.

    Raises:
        UserError: this user may not read it.
    """
    with permission(path):
        paths = [path] if not path.is_dir() else _tree(path)
        for file in paths:
            with contextlib.suppress(FileNotFoundError), open(file, "rb"):
                pass


def _tree(directory: Path) -> Iterator[Path]:
    """All files below a directory. Unlike `os.walk`, raises the errors of directories."""
    for path in directory.iterdir():
        if path.is_dir():
            yield from _tree(path)
        else:
            yield path


def is_file(path: Path) -> bool:
    """True for a file. Unlike `Path.is_file`, never False for one in a directory that this user may not enter.

    Raises:
        UserError: this user may not enter its directory.
    """
    try:
        with permission(path):
            return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def directory_files(directory: Path) -> FindFile:
    """Finds the files of a model in a directory."""
    return lambda name: path if is_file(path := directory / name) else None


def no_files(name: str) -> Path | None:
    """Finds nothing: for formats without further files."""
    return None


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file of a model.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is larger than `LARGEST_TEXT`.
    """
    try:
        with permission(path):
            return parsing.read_text(path, LARGEST_TEXT)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: as `read_text`, or it is not a JSON object.
    """
    try:
        table = parsing.parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); copy it again") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} holds {type(table).__name__}; expected a JSON object")
    return table
