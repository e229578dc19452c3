"""Compiles the four sizes for TPUs and GPUs with `gpt2_jax.plan` and fills docs/scaling.md. Nothing runs on a chip.

    python bench/scaling.py

Compiles the rows that bench/results/scaling.json lacks at this version of JAX, up to three minutes each. It can be
stopped and started again. It needs the extras `plan` and `cuda12`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from record import RESULTS, Figures, replace_rows

from gpt2_jax.config.toml import read_config

RECORD = RESULTS / "scaling.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
# The same on all chips, so that the rows of a size can be compared. The presets take what fits.
SETTINGS = {
    "gpt2-124m": "--micro_batch_size 16 --model.remat none",
    "gpt2-355m": "--micro_batch_size 8 --model.remat none",
    "gpt2-774m": "--micro_batch_size 8 --model.remat dots",
    "gpt2-1558m": "--micro_batch_size 8 --model.remat dots",
}


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        chips: the number of GPUs, or Google's name of the slice. For v5p it counts cores, two per chip.
        sharding: flags without which the preset does not fit the memory of a chip.
        batch_size: 0 for the preset's.
    """

    size: str
    topology: str
    chips: str
    sharding: str = ""
    batch_size: int = 0

    @property
    def key(self) -> str:
        """The key in the results file."""
        return f"{self.size} {self.topology}" + (f" batch {self.batch_size}" if self.batch_size else "")

    @property
    def flags(self) -> list[str]:
        """Flags of the command besides `--config` and `--topology`."""
        words = f"{SETTINGS[self.size]} {self.sharding}".split()
        return words + ["--batch_size", str(self.batch_size)] * bool(self.batch_size)


# In the order of the table. tests/planning compares its own compiles with four of them.
ROWS = [
    Row("gpt2-124m", "v5e:1x1", "v5e-1"),
    Row("gpt2-124m", "v5e:2x4", "v5e-8"),
    Row("gpt2-124m", "v5e:4x8", "v5e-32"),
    Row("gpt2-124m", "v5e:16x16", "v5e-256"),
    Row("gpt2-124m", "v5e:4x8", "v5e-32", batch_size=4 * 512),
    Row("gpt2-124m", "v5e:16x16", "v5e-256", batch_size=32 * 512),
    Row("gpt2-124m", "v5p:2x2x4", "v5p-32"),
    Row("gpt2-124m", "v6e:2x4", "v6e-8"),
    Row("gpt2-124m", "h100:8", "8 × H100"),
    Row("gpt2-124m", "h100:64", "64 × H100"),
    Row("gpt2-124m", "h100:512", "512 × H100"),
    Row("gpt2-355m", "v5e:1x1", "v5e-1"),
    Row("gpt2-355m", "v5e:2x4", "v5e-8"),
    Row("gpt2-355m", "v5e:8x8", "v5e-64"),
    Row("gpt2-355m", "v5p:4x4x4", "v5p-128"),
    Row("gpt2-355m", "h100:8", "8 × H100"),
    Row("gpt2-774m", "v5e:2x4", "v5e-8", "--mesh.fsdp 8"),
    Row("gpt2-774m", "v5p:4x4x4", "v5p-128"),
    Row("gpt2-774m", "v6e:2x4", "v6e-8"),
    Row("gpt2-774m", "h100:8", "8 × H100"),
    Row("gpt2-1558m", "v5e:4x4", "v5e-16", "--mesh.fsdp 8 --micro_batch_size 4"),
    Row("gpt2-1558m", "v5p:4x4x4", "v5p-128"),
    Row("gpt2-1558m", "v6e:4x4", "v6e-16", "--mesh.fsdp 4"),
    Row("gpt2-1558m", "h100:8", "8 × H100"),
    Row("gpt2-1558m", "h100:64", "64 × H100"),
]


def plan(row: Row) -> Figures:
    """Runs `gpt2_jax.plan` for a row and returns the part of its JSON that the table and the tests use."""
    command = [sys.executable, "-m", "gpt2_jax.plan", "--config", row.size, "--topology", row.topology, "--json"]
    command += row.flags
    table = json.loads(subprocess.check_output(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}))
    keep = ("devices", "hosts", "mesh", "n_params", "attention_kernels", "attention_copies", "micro_batches", "memory",
            "model_flops", "hardware_flops", "traffic", "collectives", "estimate", "tokens")  # fmt: skip
    config = table["config"]
    return {"flags": row.flags, "batch_size": config["batch_size"], "steps": config["steps"],
            "attention": table["attention"]["backend"], **{key: table[key] for key in keep}}  # fmt: skip


def span(low: float, high: float, unit: str) -> str:
    """A range as text, or one number if both ends print alike."""
    low_text, high_text = (f"{number:.1f}" if number < 10 else f"{number:,.0f}" for number in (low, high))
    return f"{low_text}{unit}" if low_text == high_text else f"{low_text} – {high_text}{unit}"


def line(row: Row, table: Figures) -> str:
    """A line of the table."""
    estimate, mesh, memory = table["estimate"], table["mesh"], table["memory"]
    per_device = table["batch_size"] // table["devices"] // table["micro_batches"]
    sent: dict[str, float] = {}
    beside = np.zeros(2)  # bytes sent beside matmuls, and beside other work only
    for one in table["collectives"]:
        if one["n_bytes"] >= 1e6:
            axes = " and ".join(one["axes"])
            sent[axes] = sent.get(axes, 0) + one["sent"]
            matmuls, any_work = one["matmul_overlapped_bytes"], one["overlapped_bytes"]
            beside += one["sent"] / one["n_bytes"] * np.array([matmuls, any_work - matmuls])
    updates = table["steps"] * read_config(row.size).batch_size / table["batch_size"]
    least, most = estimate["least"], estimate["most"]
    unit, seconds = next(
        (unit, seconds)
        for unit, seconds in ((" days", 86400), (" h", 3600), (" min", 60))
        if updates * most > 2 * seconds
    )
    cells = [
        row.size.removeprefix("gpt2-").upper(),
        row.chips,
        f"{table['batch_size']:,}",
        f"{mesh['data']} × {mesh['fsdp']}",
        f"{table['micro_batches']} × {per_device}",
        f"{memory['needed'] / 2**30:.1f} of {memory['available'] / 2**30:.0f}",
        ", ".join(f"{axes} {n_bytes / 1e9:.2f} GB" for axes, n_bytes in sent.items()),
        ", ".join(f"{share:.0%}" for share in beside / sum(sent.values())) if sent else "",
        span(1000 * least, 1000 * most, " ms"),
        f"{100 * estimate['links'] / most:.0f}%",
        span(*(100 * mfu for mfu in estimate["mfu"]), "%"),
        span(updates * least / seconds, updates * most / seconds, unit),
    ]
    return f"| {' | '.join(cells)} |"


def document(page: str, results: Figures) -> str:
    """docs/scaling.md with these results in its table."""
    return replace_rows(page, "| size |", [line(row, results[row.key]) for row in ROWS])


def main() -> None:
    """Compiles the missing rows, and writes the results and the document."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    version = importlib.metadata.version("jax")
    recorded = json.loads(RECORD.read_text())
    known = recorded["results"] if recorded["jax"] == version else {}
    for row in ROWS:
        if row.key not in known or known[row.key]["flags"] != row.flags:
            print(row.key, flush=True)
            known[row.key] = plan(row)
            RECORD.write_text(json.dumps({"jax": version, "results": known}, indent=1) + "\n")
    DOCUMENT.write_text(document(DOCUMENT.read_text(), known))


if __name__ == "__main__":
    main()
