"""Command lines: a preset or a TOML file gives the config, and flags override it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, Literal, TypeVar

import tyro

from gpt2_jax.config import TrainConfig, flatten
from gpt2_jax.config.help import help_lines, row
from gpt2_jax.config.toml import nearest_key, preset_names, read_config
from gpt2_jax.config.validation import fit_warmup, validate
from gpt2_jax.errors import UserError
from gpt2_jax.files import check_regular, is_open_pipe, user_path

COMPLETION = "--tyro-print-completion"
CONFIG_STYLE: dict[str, Any] = {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}
FLAGS_STYLE: dict[str, Any] = {"config": (tyro.conf.FlagCreatePairsOff,)}

Flags = TypeVar("Flags")
Parsed = TypeVar("Parsed")


def parse_args(
    prog: str,
    description: str,
    args: Sequence[str],
    note: Callable[[str], object] = lambda line: None,
    own: type[Any] | None = None,
) -> TrainConfig:
    """The validated config of a command line `--config NAME|FILE.toml [--section.key value ...]`.

    Args:
        note: called with a line for the user about each value that was changed.
        own: the command's flags besides those of the config, for completion in a shell.

    Raises:
        UserError: something is wrong that can be found without data and devices.
        SystemExit: after `--help` or the script for completion, with code 0; without `--config`, after a list of the
            presets.
    """
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if args[:1] == [COMPLETION]:
        presets: Any = Literal[tuple(preset_names())]
        bases = (own, TrainConfig) if own else (TrainConfig,)
        kind = dataclasses.make_dataclass("_", [("config", presets)], bases=bases, frozen=True, kw_only=True)
        _print_completion(kind, args, prog, CONFIG_STYLE)
    name, rest = "", []
    remaining = iter(args)
    for arg in remaining:
        if arg == "--config":
            name = next(remaining, "")
        else:
            rest.append(arg)
    topic = _help_topic(rest)
    usage = f"usage: {prog} --config {name or 'NAME|FILE.toml'} [--section.key value ...]"
    width = max(60, shutil.get_terminal_size().columns)
    description = textwrap.fill(description, width, break_on_hyphens=False)
    if not name and not topic:
        presets = [line for preset, header in preset_names().items() for line in row(preset, header, 20, width, 2)]
        print(description, "", usage, "", "presets:", *presets, "", sep="\n")
        print(f"For the keys, type {prog} --config NAME --help.")
        raise SystemExit(2 if topic is None else 0)
    ignored: list[str] = []
    written = _read_config(name, ignored.append) if name else None
    if topic is not None:
        if not topic:
            print(description, "", usage, "", sep="\n")
        print("\n".join(help_lines(written, topic, width)))
        raise SystemExit(0)
    assert written is not None
    config = apply_flags(written, rest, prog=f"{prog} --config {name}", description=description)
    given = {word[2:].split("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    if "compilation_cache" not in given:
        for line in ignored:
            note(line)
    if "optimizer.warmup_steps" not in given:
        config, line = fit_warmup(config, written)
        if line:
            note(line)
    validate(config)
    return config


def _help_topic(args: Sequence[str]) -> str | None:
    """The word after `--help` or `-h`, which may be missing; None without the flag."""
    for flag, word in itertools.pairwise([*args, ""]):
        if flag in ("--help", "-h"):
            return "" if word.startswith("-") else word
    return None


def _read_config(name: str, note: Callable[[str], object]) -> TrainConfig:
    """Reads a preset or a file. The config.toml of a run directory names the directory that it is in now.

    So a run directory that was moved or copied resumes where it is now. `note` is for `read_config`.
    """
    if name in preset_names():
        return read_config(name)
    path = user_path(name, "--config")
    if not is_open_pipe(name):
        check_regular(path)
    if path.name == "config.toml" and (path.parent / "checkpoints").is_dir():
        return dataclasses.replace(read_config(str(path), note), out=str(path.parent))
    return read_config(str(path))


def take_flags(kind: type[Any], args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line: the flags that are fields of the dataclass `kind`, with their values, and the rest."""
    switches = {field.name: isinstance(field.default, bool) for field in dataclasses.fields(kind)}
    taken: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        name = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and name in switches:
            taken.append(word)
            if "=" not in word and not switches[name]:
                taken += itertools.islice(words, 1)
        else:
            rest.append(word)
    return taken, rest


def apply_flags(config: TrainConfig, args: Sequence[str], *, prog: str, description: str) -> TrainConfig:
    """`config` with `--section.key value` flags applied.

    Raises:
        UserError: an unknown flag, or a bad value.
    """
    known = flatten(config)
    del known["data.sources"]  # The list itself is not a flag, but the keys of its tables are.
    for index, source in enumerate(config.data.sources):
        known |= flatten(source, f"data.sources.{index}.")

    def parse(args: list[str]) -> TrainConfig:
        return tyro.cli(
            TrainConfig,
            default=config,
            args=args,
            prog=prog,
            description=description,
            **CONFIG_STYLE,
        )

    words: list[str] = []
    key = ""
    for arg in args:
        if arg.startswith("--"):
            key = arg[2:].replace("-", "_")
            if key == "data.sources":
                raise UserError(
                    f"{arg} is not a flag; write [[data.sources]] tables with train and weight in a TOML file"
                )
            if key not in known:
                raise UserError(f"unknown flag {arg}; {nearest_key(key, list(known), prefix='--')}")
            arg = "--" + key
        elif isinstance(known.get(key), bool):  # true and false, as in TOML
            arg = arg.capitalize()
        words.append(arg)
    return _raise_user_errors(lambda: parse(words), prog)


def parse_flags(kind: type[Flags], args: Sequence[str], *, prog: str, description: str) -> Flags:
    """Parses a command's flags, `--field-name value`, into the dataclass `kind`. `--help` prints them and exits with 0.

    Raises:
        UserError: an unknown flag, a missing one, or a bad value.
    """

    def parse(args: Sequence[str]) -> Flags:
        return tyro.cli(kind, args=args, prog=prog, description=description, **FLAGS_STYLE)

    if args[:1] == [COMPLETION]:
        _print_completion(kind, args, prog, FLAGS_STYLE)
    if {"--help", "-h"} & set(args):
        parse(["--help"])
    return _raise_user_errors(lambda: parse(args), prog)


def _print_completion(kind: type[Any], args: Sequence[str], prog: str, style: Mapping[str, Any]) -> None:
    """Prints the script with which a shell completes the flags of the command's short name, and exits with code 0."""
    tyro.cli(kind, args=args, prog=prog.replace("python -m gpt2_jax.", "gpt2-"), **style)


# --- tyro's errors -------------------------------------------------------------------------------------


def _raise_user_errors(parse: Callable[[], Parsed], prog: str) -> Parsed:
    """Calls `parse`. If tyro prints an error and exits, raises a one-line `UserError` instead."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), redirect_stdout(printed):
            return parse()
    except SystemExit:
        raise UserError(
            f"{_error_message(printed.getvalue())}; for the meaning of every flag, type {prog} --help"
        ) from None


def _error_message(printed: str) -> str:
    """The message in an error that tyro has printed.

    tyro has no way to ask for it. It draws a box with a title, a rule, the message, a rule, and hints.
    """
    parts = re.split(r"^\W*[-─]{8,}\W*$", printed, flags=re.MULTILINE)
    return " ".join(parts[1 if len(parts) > 1 else 0].replace("│", " ").split())
