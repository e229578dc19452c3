"""Errors that a command reports in one line instead of a traceback."""

from __future__ import annotations

import errno
import importlib
import os
import re
from typing import Any

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
# XLA says RESOURCE_EXHAUSTED, on CPU "INTERNAL: … Out of memory allocating 8 bytes", cuBLAS CUBLAS_STATUS_ALLOC_FAILED.
_NO_MEMORY = re.compile(r"out.of.memory|ALLOC_FAILED|RESOURCE_EXHAUSTED.*(memory|HBM)", re.IGNORECASE)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(Exception):
    """Bad input: says what was found, what was expected and what to type. Commands exit with code 2."""


class DamagedError(UserError):
    """A checkpoint is not what was saved."""


class DeletedError(DamagedError):
    """A checkpoint was deleted while it was read: the run that it belongs to has saved newer ones."""


class SaveError(Exception):
    """Checkpoints could not be saved, several times in a row. Commands exit with code 1: a later try may succeed."""


class ReplicaError(Exception):
    """Copies of the same arrays differ between devices. Commands exit with code 1: a restart may compute correctly."""


class RewindError(Exception):
    """The run is to continue from its newest checkpoint.

    Args:
        reason: why.
        update: the outlier to pass over from now on, 0 for none.
    """

    def __init__(self, reason: str, update: int = 0) -> None:
        super().__init__(reason)
        self.update = update


class DivergedError(Exception):
    """Training produced a loss or a gradient that is not finite. Commands exit with code 2: it would happen again."""


def one_line(error: BaseException, length: int | None = 200) -> str:
    """The message of an error on one line, cut to `length` characters; None cuts nothing."""
    return " ".join(str(error).split())[:length]


def strip_controls(text: str) -> str:
    """Makes text safe to print on a terminal: removes carriage returns and replaces other control characters.

    Line feeds and tabs stay. A file name or generated text can contain escape sequences that clear the screen or type
    commands.
    """
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def storage_problem(error: BaseException) -> str:
    """Why nothing more can be written, as "No space left on device"; "" for any other error.

    TensorStore has the number of the system's error in its text, and calls a full disk RESOURCE_EXHAUSTED.
    """
    found = _OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) else ""


def is_out_of_memory(error: BaseException) -> bool:
    """True if a device or the host has no memory left."""
    return isinstance(error, MemoryError) or (bool(_NO_MEMORY.search(str(error))) and not storage_problem(error))


def fixable(error: BaseException) -> str:
    """The line for an error of the system or a library that the user can fix; "" for any other error."""
    if problem := storage_problem(error):
        where = getattr(error, "filename", None) or "the output"  # standard output, or a file that it does not name
        return f"{where} cannot be written: {problem}; make room, or write elsewhere"
    text = one_line(error, 300)
    if is_out_of_memory(error):
        return f"not enough memory ({text}); take a smaller model, or devices with more memory"
    return text if "not in the list of known backends" in text else ""  # JAX_PLATFORMS has an unknown name


def import_optional(name: str, purpose: str, package: str = "") -> Any:
    """Imports a module of an optional dependency.

    Args:
        name: the module.
        purpose: the work that needs it, for the error: "reading a.parquet".
        package: what pip installs; by default the name of the module, up to the first dot.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = package or name.split(".")[0]
        raise UserError(f"{purpose} needs {package}, which is not installed; type pip install {package}") from error
