"""The facts beside the arrays of a checkpoint, sealed by a checksum. Reading them needs neither Orbax nor JAX.

step         the update after which it was saved
metrics      the evaluations there by name, such as "val_loss"; Orbax has a copy, and ranks checkpoints by one of them
fingerprint  that of the arrays: "state", "params" (see fingerprint.py)
data, sha256, layout, made_by    see run/checkpoints.py
checksum     CRC-32 of all of the above as JSON with sorted keys
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from gpt2_jax.errors import DamagedError, one_line
from gpt2_jax.parsing import parse_json, read_text

COMPLETE = "commit_success.txt"  # in a complete checkpoint: Orbax writes it last, and deletes it first
INFO, METRICS = "info/metadata", "metrics/metrics"  # written by Orbax too
DAMAGED = ".damaged"  # follows the step in the name of a checkpoint that was set aside
MAX_BYTES = 1 << 24  # the digests of 200,000 token files

_TYPES: dict[str, type] = {
    "metrics": dict,
    "data": str,
    "sha256": list,
    "layout": int,
    "made_by": dict,
    "fingerprint": dict,
}


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, in order. Others are being saved or deleted, or were left by a kill.

    Raises:
        OSError: the directory is missing, or cannot be read.
    """
    steps = [path for path in directory.iterdir() if path.name.isdigit() and (path / COMPLETE).exists()]
    return sorted(steps, key=lambda path: int(path.name))


def seal(step: int, metrics: dict[str, float], info: dict[str, Any]) -> dict[str, Any]:
    """`info` with the step, the metrics and the checksum."""
    facts = {**info, "step": step, "metrics": metrics}
    return {**facts, "checksum": _checksum(facts)}


def _checksum(facts: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"


def read_info(checkpoint: Path) -> dict[str, Any]:
    """The facts of a checkpoint. Those saved up to version 0.2.0 have no checksum, and fewer facts.

    Raises:
        DamagedError: the files are missing, or differ from what was written.
    """
    try:
        if not (checkpoint / COMPLETE).exists():
            raise ValueError(f"it is incomplete: {COMPLETE} is missing")
        info = parse_json(read_text(checkpoint / INFO, MAX_BYTES))
        if not isinstance(info, dict):
            raise ValueError(f"{INFO} is not an object")
        metrics = parse_json(read_text(checkpoint / METRICS, MAX_BYTES)) if (checkpoint / METRICS).exists() else {}
        _check(checkpoint, info, metrics)
    except (OSError, ValueError) as error:
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else one_line(error)
        raise DamagedError(f"the checkpoint {checkpoint} is damaged ({reason})") from error
    return info


def _check(checkpoint: Path, info: dict[str, Any], metrics: Any) -> None:
    """Raises ValueError unless the facts are those that were written."""
    checksum = info.pop("checksum", None)
    if checksum is None and {"step", "metrics", "fingerprint"} & info.keys():
        raise ValueError(f"the checksum in {INFO} is missing")
    for key, kind in _TYPES.items():
        if key in info and not isinstance(info[key], kind):
            raise ValueError(f"{key} in {INFO} is not of type {kind.__name__}")
    if not all(digest is None or isinstance(digest, str) for digest in info.get("sha256", [])):
        raise ValueError(f"sha256 in {INFO} is not a list of digests")
    if checksum is None:
        return
    if checksum != _checksum(info):
        raise ValueError(f"the checksum in {INFO} differs")
    if str(info["step"]) != checkpoint.name:
        raise ValueError(f"{INFO} is that of checkpoint {info['step']}")
    if "metrics" not in info:  # before tasks were evaluated
        info["metrics"] = {} if info["val_loss"] is None else {"val_loss": info["val_loss"]}
    if metrics != info["metrics"]:
        raise ValueError(f"{METRICS} has other metrics")


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that no one takes it for one to resume from, and returns the new path.

    Raises:
        OSError: it cannot be renamed.
    """
    number, target = 1, checkpoint.with_name(checkpoint.name + DAMAGED)
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}{DAMAGED}-{number}")
    return checkpoint.rename(target)
