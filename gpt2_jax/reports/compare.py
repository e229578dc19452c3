"""Where two runs part."""

from __future__ import annotations

from pathlib import Path

from gpt2_jax.config import flatten
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.metrics import Row, read_rows

# What the update decides, and nothing else does: not the speed, and not the files that a run writes.
COMPARED = ("loss", "grad_norm", "param_norm", "learning_rate", "skipped", "val_loss", "fingerprint")


def compare(first: Path, second: Path) -> list[str]:
    """Lines about the configs and the rows of two run directories.

    Raises:
        UserError: one is not a run directory.
    """
    a, b = _rows(first), _rows(second)
    lines = [f"{name:10}{path}, to update {max(rows)}" for name, path, rows in (("A", first, a), ("B", second, b))]
    configs = [flatten(read_config(str(path / "config.toml"))) for path in (first, second)]
    changed = [key for key in configs[0] if key != "out" and configs[0][key] != configs[1][key]]
    if changed:
        listed = "; ".join(f"{key}: {configs[0][key]!r} in A, {configs[1][key]!r} in B" for key in changed)
        lines.append(f"{'config':10}{listed}")
    same = 0  # the last update after which the fingerprints agree
    for step in sorted(a.keys() & b.keys()):
        keys = [key for key in a[step] if key in b[step] and _is_compared(key)]
        different = [key for key in keys if a[step][key] != b[step][key]]
        if "skipped" in a[step].keys() ^ b[step].keys():
            only = "A" if "skipped" in a[step] else "B"
            return [*lines, f"{'differ':10}at update {step}: skipped in {only} only; {_until(same)}"]
        if different:
            found = ", ".join(f"{key} {a[step][key]} in A, {b[step][key]} in B" for key in different)
            return [*lines, f"{'differ':10}at update {step}: {found}; {_until(same)}"]
        if "fingerprint" in keys:
            same = step
    common = sum(key in b[step] for step in a.keys() & b.keys() for key in a[step] if _is_compared(key))
    if not common:
        return [*lines, f"{'unknown':10}no update has a row in both"]
    return [*lines, f"{'equal':10}all {common:,} values of the rows that both have; {_until(same)}"]


def _is_compared(key: str) -> bool:
    return key in COMPARED or "/" in key  # TASK/METRIC


def _until(same: int) -> str:
    if not same:
        return "no fingerprint is in both before"
    return f"the whole state is equal, bit for bit, up to update {same}"


def _rows(run: Path) -> dict[int, Row]:
    """The rows of each update together.

    Raises:
        UserError: the directory has no rows.
    """
    rows: dict[int, Row] = {}
    for row in read_rows(run / "metrics.jsonl"):
        rows.setdefault(row["step"], {}).update(row)
    if not rows:
        raise UserError(f"{run} has no metrics.jsonl with rows; give the directory of a run")
    return rows
