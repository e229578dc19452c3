"""The run directory: opens it for a new or a resumed run."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from gpt2_jax.config import TrainConfig, differences
from gpt2_jax.config.toml import read_config, to_toml
from gpt2_jax.distributed.agreement import check_shared, is_primary
from gpt2_jax.errors import UserError
from gpt2_jax.files import replace_text


def saved_config(config: TrainConfig) -> TrainConfig | None:
    """The config of the run in `config.out`; None if the directory has no checkpoint yet.

    Raises:
        UserError: the directory has checkpoints but no config of a run, or cannot be read.
    """
    out = Path(config.out).expanduser()
    try:
        if not any(path.name.isdigit() for path in (out / "checkpoints").iterdir()):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read the run directory {out}: {error.strerror}; type another --out") from error
    try:
        return read_config(str(out / "config.toml"))
    except UserError as error:
        raise UserError(f"{out} has checkpoints but not the config of a run ({error}); type another --out") from error


def open_directory(config: TrainConfig, saved: TrainConfig | None) -> Path:
    """Creates the run directory, or checks that it belongs to this config and can be written.

    Args:
        saved: the config from `saved_config`.

    Raises:
        UserError: it belongs to another config, cannot be written, or is not shared by all processes.
    """
    out = Path(config.out).expanduser()
    if saved and (changed := differences(config, saved)):
        listed = "; ".join(f"{key}: {there!r} -> {here!r}" for key, (there, here) in changed.items())
        advice = "restore its values, or type another --out"
        if list(changed) == ["optimizer.decay_steps"]:  # derived from `steps` unless it is given
            advice = f"type --optimizer.decay_steps {changed['optimizer.decay_steps'][0]} to keep its schedule"
        raise UserError(f"{out} holds a run of another config ({listed}); {advice}")
    try:
        if is_primary():
            out.mkdir(parents=True, exist_ok=True)
        for path in (out, *(out / name for name in ("config.toml", "checkpoints", "metrics.jsonl", "loss.png"))):
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, f"no permission for {path.name}")
    except OSError as error:
        raise UserError(f"cannot write the run directory {out}: {error.strerror}; type another --out") from error
    check_shared(out)
    return out


def write_config(out: Path, config: TrainConfig) -> None:
    """Writes config.toml, complete and resolved."""
    replace_text(out / "config.toml", to_toml(config))
