"""`--help` of the commands that take a config: an overview, the keys of one section, or one key."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import docstring_parser

from gpt2_jax.config import TrainConfig, flatten
from gpt2_jax.config.toml import nearest_key, toml_value
from gpt2_jax.errors import UserError

MORE = "For the keys of a section, type --help model; for one key, --help model.n_layer."
LEFT = 36  # characters for a key and its value
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class Key(NamedTuple):
    """A key of a config."""

    default: Any  # dataclasses.MISSING if it has to be given
    hint: Any
    text: str  # sentences; the first one says what the key is


def help_lines(config: TrainConfig | None, topic: str, width: int) -> list[str]:
    """Explains keys in lines of at most `width` characters, which is 60 or more.

    Args:
        config: the values that are shown; None shows the defaults.
        topic: a section as `model`, a key as `model.n_layer`; empty for the keys outside of sections and the sections.

    Raises:
        UserError: there is no such section or key.
    """
    values = flatten(config) if config else {}
    keys = dict(keys_of(TrainConfig))
    sections = {name.split(".")[0]: None for name in keys if "." in name}
    name = topic.replace("-", "_")
    if name in keys:
        return _explain(name, keys[name], values, width)
    if not name or name in sections:
        lines = []
        for key, of in keys.items():
            if key.rpartition(".")[0] == name:
                lines += row(_with_value(key, of, values), of.text, LEFT, width, 2 if name else 1)
        if not name:
            kinds = get_type_hints(TrainConfig)
            lines = ["keys:", *lines, "", "sections:"]
            lines += [line for section in sections for line in row(section, kinds[section].__doc__, 12, width, 1)]
        return [*lines, "", *textwrap.wrap(MORE, width)]
    raise UserError(f"--help {topic}: no key and no section; {nearest_key(name, [*sections, *keys])}")


def keys_of(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Key]]:
    """The keys of a config's dataclass by name, in the order of the fields."""
    hints = get_type_hints(kind)
    texts = {param.arg_name: param.description or "" for param in docstring_parser.parse_from_object(kind).params}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from keys_of(hint, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, Key(field.default, hint, texts[field.name])


def row(left: str, text: str | None, column: int, width: int, max_lines: int) -> list[str]:
    """Lines of the help: `left` in a column, and beside it the first line of a text, cut after `max_lines`."""
    left = left if len(left) <= column else left[: column - 1] + "…"
    first = (text or "").split("\n")[0]
    right = textwrap.wrap(first, width - column - 3, max_lines=max_lines, placeholder=" …", break_on_hyphens=False)
    return [f"  {beside:{column}} {line}" for beside, line in itertools.zip_longest([left], right, fillvalue="")]


def _explain(name: str, key: Key, values: Mapping[str, Any], width: int) -> list[str]:
    kind = kind_of(key.hint) + ("" if key.default is dataclasses.MISSING else f"; by default {_shown(key.default)}")
    paragraphs = [_with_value(name, key, values), kind, "", *key.text.split("\n")]
    return [line for each in paragraphs for line in textwrap.wrap(each.strip(), width) or [""]]


def _with_value(name: str, key: Key, values: Mapping[str, Any]) -> str:
    flag = "[[data.sources]]" if name == "data.sources" else f"--{name}"  # tables of a file, not a flag
    return f"{flag} {_shown(values.get(name, key.default))}"


def _shown(value: Any) -> str:
    """A value as a flag has it."""
    if value is dataclasses.MISSING:
        return ""
    return value if isinstance(value, str) and value else toml_value(value)


def kind_of(hint: Any) -> str:
    """The values of a type, in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(kind_of, get_args(hint)))
    return KINDS.get(hint, "a list")
