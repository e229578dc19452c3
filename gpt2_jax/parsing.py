"""Parses JSON and TOML of unknown origin: what is too large or nested too deep is refused before it is parsed.

The parsers of Python take hundreds of times the memory of a text, quadratic time for some, and recurse without a limit.
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

MAX_DEPTH = 64  # Of arrays and objects in each other, and of parts of a dotted key.
MAX_TOML_BYTES = 1 << 20  # A config with an alphabet of 65,536 characters has 190 KB. Parsing 0.9 MB takes 0.5 s.
MAX_JSON_BYTES = 1 << 24  # The manifest of 100,000 token files.

JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
TOML_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5})?|\'\'\'(?:[^\']|\'(?!\'\'))*+(?:\'{3,5})?'
    r'|"(?:[^"\\\n]|\\.)*+"?|\'[^\'\n]*+\'?|#[^\n]*+',
    re.DOTALL,
)
BRACKET = re.compile(r"[][{}]")
BETWEEN_KEYS = re.compile(r"[][{}=,\n]")


def read_text(path: Path, max_bytes: int) -> str:
    """Reads a file of UTF-8 text, without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `max_bytes`, or not UTF-8.
    """
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from error


def parse_json(text: str) -> Any:
    """Parses JSON. A number in it can be of any size; `is_count` is for those that count something.

    Raises:
        ValueError: it is not JSON, or nested more than `MAX_DEPTH` deep.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH:  # else it cannot be deep
        _check_depth(JSON_STRING.sub("", text))
    with _no_recursion():
        return json.loads(text)


def parse_toml(text: str) -> dict[str, Any]:
    """Parses TOML.

    Raises:
        ValueError: it is not TOML, nested more than `MAX_DEPTH` deep, or has an integer of more than 64 bits.
    """
    bare = TOML_STRING.sub("", text)
    _check_depth(bare)
    if max(part.count(".") for part in BETWEEN_KEYS.split(bare)) > MAX_DEPTH:
        raise ValueError(f"a key has more than {MAX_DEPTH} parts")
    with _no_recursion():
        table = tomllib.loads(text)
    for key, value in table.items():
        _check_integers(key, value)
    return table


@contextlib.contextmanager
def _no_recursion() -> Iterator[None]:
    """Turns the error of a parser that recurses too deep into a ValueError: some damaged texts hide their brackets."""
    try:
        yield
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _check_depth(bare: str) -> None:
    """Checks how deep the brackets of a text without strings are nested."""
    depth = 0
    for match in BRACKET.finditer(bare):
        depth += 1 if match[0] in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _check_integers(key: str, value: Any) -> None:
    """Checks that integers have 64 bits, as TOML says: others are no floats, and Python prints none of 4,300 digits."""
    if isinstance(value, list | dict):
        for item in value.items() if isinstance(value, dict) else ((key, item) for item in value):
            _check_integers(*item)
    elif type(value) is int and not -1 << 63 <= value < 1 << 63:
        raise ValueError(f"{key[:100]} is an integer of more than 64 bits")


def is_count(value: Any) -> TypeGuard[int]:
    """True for an integer from 0 to 2^63 − 1. Booleans are integers for Python, but not here."""
    return type(value) is int and 0 <= value < 1 << 63
