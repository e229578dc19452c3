"""The run directory: opens it for a new or a resumed run."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_jax.checkpoint_info import complete_checkpoints
from gpt2_jax.config import TrainConfig, differences
from gpt2_jax.config.toml import CACHES_IN_FILES, read_config, to_toml
from gpt2_jax.data.contents import KEPT
from gpt2_jax.distributed.agreement import barrier, check_shared, is_primary
from gpt2_jax.errors import UserError
from gpt2_jax.files import make_directory, remove_empty, replace_text, user_path
from gpt2_jax.interop.keep_tokenizer import KEPT as TOKENIZER_FILES
from gpt2_jax.run.goodput import FILE as TIME


def saved_config(config: TrainConfig) -> TrainConfig | None:
    """The config of the run in `config.out`; None if the directory has no checkpoint yet.

    Raises:
        UserError: the directory has checkpoints but no config of a run, or cannot be read.
    """
    out = user_path(config.out, "out")
    try:
        if not complete_checkpoints(out / "checkpoints"):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read the run directory {out}: {error.strerror}; type another --out") from error
    try:
        return read_config(str(out / "config.toml"), note=lambda line: None)
    except UserError as error:
        raise UserError(f"{out} has checkpoints but not the config of a run ({error}); type another --out") from error


@contextmanager
def open_directory(config: TrainConfig, saved: TrainConfig | None) -> Iterator[Path]:
    """Creates the run directory, or checks that it belongs to this config and can be written.

    If the `with` block raises before anything was trained, a new directory does not stay.

    Args:
        saved: the config from `saved_config`.

    Raises:
        UserError: it belongs to another config, cannot be written, or is not shared by all processes.
    """
    out = user_path(config.out, "out")
    if saved and (changed := differences(config, saved)):
        listed = "; ".join(f"{key}: {there!r} -> {here!r}" for key, (there, here) in changed.items())
        advice = "restore its values, or type another --out"
        if changed.keys() <= {"optimizer.decay_steps", "optimizer.warmup_steps"}:  # both can follow from `steps`
            flags = " ".join(f"--{key} {there}" for key, (there, _) in changed.items())
            advice = f"type {flags} to keep its schedule"
        raise UserError(f"{out} holds a run of another config ({listed}); {advice}")
    try:
        names = ("config.toml", "checkpoints", "metrics.jsonl", "samples.jsonl", TIME, "loss.png")
        for path in (out, *(out / name for name in names)):
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, f"no permission for {path.name}")
    except OSError as error:
        raise _not_writable(out, error) from error
    barrier("ready")  # a process that is refused up to here ends all of them before process 0 has written anything
    try:
        new = make_directory(out) if is_primary() else []
    except OSError as error:
        raise _not_writable(out, error) from error
    try:
        check_shared(out)
        yield out
    except BaseException:
        if new:
            _remove_unused(out, new)
        raise


def _not_writable(out: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the run directory {out}: {error.strerror}; type another --out")


def _remove_unused(out: Path, new: list[Path]) -> None:
    """Removes a new run directory, and its new parents, unless something was trained in it."""
    metrics, checkpoints = out / "metrics.jsonl", out / "checkpoints"
    remove_empty([checkpoints])
    if not checkpoints.exists() and not (metrics.exists() and metrics.stat().st_size):
        names = ("metrics.jsonl", TIME, "config.toml", *TOKENIZER_FILES)
        for file in (*map(out.joinpath, names), *out.glob(KEPT)):
            file.unlink(missing_ok=True)
        remove_empty(new)


def write_config(out: Path, config: TrainConfig) -> None:
    """Writes config.toml, complete and resolved, but for a directory of compiled programs: only a flag can name one."""
    replace_text(out / "config.toml", _kept(config))


def _kept(config: TrainConfig) -> str:
    if config.compilation_cache not in CACHES_IN_FILES:
        config = dataclasses.replace(config, compilation_cache="auto")
    return to_toml(config)


def forget_other_run(out: Path, config: TrainConfig, names: Iterable[str]) -> None:
    """Removes files that a run of another config has left here. It ended before its first checkpoint.

    Args:
        out: the run directory.
        config: of the run that starts.
        names: of the files.
    """
    path = out / "config.toml"
    if path.exists() and path.read_bytes() != _kept(config).encode():
        for name in names:
            (out / name).unlink(missing_ok=True)
