"""Errors that a command reports in one line instead of a traceback."""

from __future__ import annotations

import importlib
from typing import Any


class UserError(Exception):
    """Bad input: says what was found, what was expected and what to type. Commands exit with code 2."""


class DivergedError(Exception):
    """Training produced a loss or a gradient that is not finite. Commands exit with code 1."""


def one_line(error: Exception, length: int = 200) -> str:
    """The message of a library's error on one line, cut to `length` characters."""
    return " ".join(str(error).split())[:length]


def import_optional(name: str, purpose: str) -> Any:
    """Imports a module of an optional dependency.

    Args:
        name: the module. The package that pip installs has its name, up to the first dot.
        purpose: the work that needs it, for the error: "reading a.parquet".

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"{purpose} needs {package}, which is not installed; type pip install {package}") from error
