"""Command lines: a preset or a TOML file gives the config, and flags override it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TypeVar

import tyro

from gpt2_jax.config import TrainConfig, flatten, validate
from gpt2_jax.config.toml import nearest_key, preset_names, read_config
from gpt2_jax.errors import UserError

Flags = TypeVar("Flags")
Parsed = TypeVar("Parsed")


def parse_args(prog: str, description: str, args: Sequence[str]) -> TrainConfig:
    """The validated config of a command line `--config NAME|FILE.toml [--section.key value ...]`.

    Raises:
        UserError: for everything that can be found wrong before looking at data and devices.
        SystemExit: code 0 after `--help`; without `--config`, the presets are listed.
    """
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    name, rest = "", []
    remaining = iter(args)
    for arg in remaining:
        if arg == "--config":
            name = next(remaining, "")
        else:
            rest.append(arg)
    if not name:
        asks_help = "--help" in rest or "-h" in rest
        print(f"{description}\n\nusage: {prog} --config NAME|FILE.toml [--section.key value ...]\n\npresets:")
        print("\n".join(f"  {preset:22}{header}" for preset, header in preset_names().items()))
        print(f"\nevery key, with its meaning: {prog} --config NAME --help")
        raise SystemExit(0 if asks_help else 2)
    config = apply_flags(read_config(name), rest, prog=f"{prog} --config {name}", description=description)
    validate(config)
    return config


def take_flags(kind: type[Any], args: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line as two: the flags that are fields of the dataclass `kind`, with their values, and the rest."""
    names = {field.name for field in dataclasses.fields(kind)}
    taken: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        if word.startswith("--") and word[2:].split("=")[0].replace("-", "_") in names:
            taken.append(word)
            if "=" not in word:
                taken += itertools.islice(words, 1)
        else:
            rest.append(word)
    return taken, rest


def apply_flags(config: TrainConfig, args: Sequence[str], *, prog: str, description: str) -> TrainConfig:
    """`config` with `--section.key value` flags applied; `--help` prints every key and exits with 0."""
    known = flatten(config)
    del known["data.sources"]  # a list of tables, whose own keys are flags once the file has them
    for index, source in enumerate(config.data.sources):
        known |= flatten(source, f"data.sources.{index}.")
    words: list[str] = []
    key = ""
    for arg in args:
        if arg in ("--help", "-h"):
            _tyro(config, ["--help"], prog, description)
        if arg.startswith("--"):
            key = arg[2:].replace("-", "_")
            if key == "data.sources":
                raise UserError(f"{arg} is no flag; write [[data.sources]] tables with train and weight in a TOML file")
            if key not in known:
                raise UserError(f"unknown flag {arg}; {nearest_key(key, list(known), prefix='--')}")
            arg = "--" + key
        elif isinstance(known.get(key), bool):  # true and false, as TOML spells them
            arg = arg.capitalize()
        words.append(arg)
    return _quietly(lambda: _tyro(config, words, prog, description), prog)


def parse_flags(kind: type[Flags], args: Sequence[str], *, prog: str, description: str) -> Flags:
    """The flags of a command as the dataclass `kind`, `--field-name value` each; `--help` prints them and exits with 0.

    Raises:
        UserError: an unknown flag, a missing one, or a bad value.
    """

    def parse(args: Sequence[str]) -> Flags:
        config = (tyro.conf.FlagCreatePairsOff,)
        return tyro.cli(kind, args=args, prog=prog, description=description, config=config)

    if {"--help", "-h"} & set(args):
        parse(["--help"])
    return _quietly(lambda: parse(args), prog)


def _quietly(parse: Callable[[], Parsed], prog: str) -> Parsed:
    """What `parse` returns; what tyro prints and exits with becomes a `UserError` of one line."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), redirect_stdout(printed):
            return parse()
    except SystemExit:
        # tyro draws a box: a title, a rule, the message, a rule, hints. The message is the line we need.
        parts = re.split(r"^\W*[-─]{8,}\W*$", printed.getvalue(), flags=re.MULTILINE)
        message = " ".join(parts[1 if len(parts) > 1 else 0].replace("│", " ").split())
        raise UserError(f"{message} (the meaning of every flag: {prog} --help)") from None


def _tyro(config: TrainConfig, args: list[str], prog: str, description: str) -> TrainConfig:
    return tyro.cli(
        TrainConfig,
        default=config,
        args=args,
        prog=prog,
        description=description,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
