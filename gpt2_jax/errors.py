"""Errors that a command reports in one line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: says what was found, what was expected and what to type. Commands exit with code 2."""


class DivergedError(Exception):
    """Training produced a loss or a gradient that is not finite. Commands exit with code 1."""
