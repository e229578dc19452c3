"""Configs as TOML: reads presets and files, checks names and types, and writes complete configs."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gpt2_jax.config import ModelConfig, TrainConfig, flatten
from gpt2_jax.errors import UserError
from gpt2_jax.parsing import MAX_TOML_BYTES, parse_toml, read_text

PRESETS = Path(__file__).parent / "presets"
CACHES_IN_FILES = ("auto", "")  # the values of compilation_cache that are not a directory
SHOWN = 100  # characters of a wrong key or value in an error


def preset_names() -> dict[str, str]:
    """The names of the presets, each with the first line of its header."""
    return {
        path.stem: path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
        for path in sorted(PRESETS.glob("*.toml"))
    }


REMOVED = ("log.profile_steps",)  # keys of earlier versions, none of which changed the mathematics


def read_config(name: str, note: Callable[[str], object] | None = None) -> TrainConfig:
    """Reads a config from a preset or a TOML file.

    The programs in a cache are executed, so a file that someone else may have written cannot choose its directory.

    Args:
        note: called with a line for the user about what a run of an earlier version may have, and is not read as it is
            written: `compilation_cache` is a directory, which is read as "auto"; a key of `REMOVED`, which is left out.
            Without `note` these are errors.

    Raises:
        UserError: there is no such preset or file, it is not TOML, or a key is unknown, missing or of the wrong type.
    """
    path = PRESETS / f"{name}.toml" if name in preset_names() else Path(name)
    presets = f"give a .toml file or a preset: {', '.join(preset_names())}"
    table = _read_toml(path, f"--config {name}", presets)
    if note:
        _leave_out_removed_keys(table, lambda key: note(f"{path}: {key} is no longer a key, and is left out"))
    config: TrainConfig = _from_table(TrainConfig, table, str(path))
    if config.compilation_cache in CACHES_IN_FILES:
        return config
    found = f"{path}: compilation_cache = {config.compilation_cache[:SHOWN]!r}"
    if note is None:
        raise UserError(
            f'{found}; a file can only have "auto" or ""; remove it, and type --compilation_cache DIR for a directory'
        )
    note(f'{found} is read as "auto"; to use the directory, type it as --compilation_cache')
    return dataclasses.replace(config, compilation_cache="auto")


def _leave_out_removed_keys(table: dict[str, Any], note: Callable[[str], object]) -> None:
    for key in REMOVED:
        section, _, name = key.partition(".")
        if isinstance(of := table.get(section), dict) and of.pop(name, None) is not None:
            note(key)


def read_model_config(path: Path) -> ModelConfig:
    """Reads the model and the tokenizer from a run's config.toml.

    Raises:
        UserError: as `read_config`.
    """
    table = _read_toml(path, str(path), "give the directory of a run")
    return _from_table(ModelConfig, {key: table[key] for key in ("model", "data") if key in table}, str(path))


def _read_toml(path: Path, where: str, advice: str) -> dict[str, Any]:
    try:
        text = read_text(path, MAX_TOML_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: {reason}; {advice}") from error
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UserError(f"{path} is not TOML: {error}; correct it") from error


def nearest_key(key: str, known: Sequence[str], prefix: str = "") -> str:
    """Suggests a known key for an unknown one: the same name in another section, or the closest spelling."""
    same_name = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"did you mean {prefix}{close[0]}?"


def all_keys() -> list[str]:
    """Every key of a config, in the order of its fields."""
    return list(flatten(TrainConfig(out="", steps=1, batch_size=1)))


def _from_table(kind: type[Any], table: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    """Builds a config dataclass from a TOML table, and checks names and types.

    Args:
        where: the file, for errors.
        prefix: the section of the table, such as "model.".
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            known, shown = all_keys() + [prefix + name for name in hints], prefix + key[:SHOWN]
            raise UserError(f"{where}: unknown key {shown}; {nearest_key(shown, known)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: {key} is a section; write [{key}] with its keys below")
            values[key] = _from_table(hints[key], value, where, f"{key}.")
        else:
            values[key] = _convert(hints[key], value, f"{where}: {prefix}{key}")
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing key {prefix}{missing[0]}; write {prefix}{missing[0]} = ...")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks that a TOML value has the type `hint`, and converts lists to tuples and integers to floats where needed.

    Args:
        where: the file and the key, for errors.

    Raises:
        UserError: it has another type.
    """
    if get_origin(hint) is Union:  # a number, or a word
        number, words = get_args(hint)
        if type(value) is number:
            return value
        expected = f"{number.__name__} or {' or '.join(map(repr, get_args(words)))}"
        if value not in get_args(words):
            raise UserError(f"{where} = {repr(value)[:SHOWN]}; expected {expected}")
        return value
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise UserError(f"{where} = {repr(value)[:SHOWN]}; expected one of {', '.join(map(repr, get_args(hint)))}")
    if get_origin(hint) is tuple:
        inner, *rest = get_args(hint)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            file, key = where.rsplit(": ", 1)
            if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
                raise UserError(
                    f"{where} = {repr(value)[:SHOWN]}; expected tables; write [[{key}]] for each, with its keys below"
                )
            return tuple(_from_table(inner, item, file, f"{key}.") for item in value)
        if isinstance(value, list) and (rest == [...] or len(value) == 1 + len(rest)):
            return tuple(_convert(inner, item, where) for item in value)
        example = "numbers such as [5, 6]" if (inner, rest) == (int, [...]) else "pairs such as [[1000000, 64]]"
        raise UserError(f"{where} = {repr(value)[:SHOWN]}; expected a list of {example}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where} = {repr(value)[:SHOWN]}; expected {hint.__name__}, found {type(value).__name__}")
    return value


def to_toml(config: TrainConfig | ModelConfig) -> str:
    """The complete config as TOML. `read_config` or `read_model_config` reads it back to the same values."""
    lines: list[str] = []
    section = ""
    for key, value in flatten(config).items():
        *path, name = key.split(".")
        if "".join(path) != section:
            section = "".join(path)
            lines.append(f"\n[{section}]")
        lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value of a config as TOML."""
    if dataclasses.is_dataclass(value):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in flatten(value).items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):  # A JSON string is a TOML basic string, except for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
