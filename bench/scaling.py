"""Compiles the four sizes for TPU slices with `gpt2_jax.plan` and writes docs/scaling.md. Nothing runs on a chip.

    python bench/scaling.py [--topologies v5e v5p v6e] [--sizes gpt2-124m ...]

Compiles the rows that bench/results/scaling.json lacks at this version of JAX, one to three minutes each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.config.toml import read_config
from gpt2_jax.hardware import CHIPS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "scaling.json"
DOCUMENT = ROOT / "docs" / "scaling.md"

# Google's names of the slices. For v5p they count cores, two per chip.
SLICES = {"v5e:2x4": "v5e-8", "v5e:4x4": "v5e-16", "v5e:4x8": "v5e-32", "v5e:8x8": "v5e-64", "v5e:16x16": "v5e-256",
          "v5p:2x2x4": "v5p-32", "v5p:4x4x4": "v5p-128", "v6e:2x4": "v6e-8", "v6e:4x4": "v6e-16"}  # fmt: skip
KINDS = {"v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"}  # keys of CHIPS
# Flags for the presets that do not fit the memory of a chip without them.
FLAGS = {
    ("gpt2-774m", "v5e"): ["--mesh.fsdp", "8"],
    ("gpt2-1558m", "v5e"): ["--mesh.fsdp", "8", "--micro_batch_size", "4"],
    ("gpt2-1558m", "v6e"): ["--mesh.fsdp", "4"],
}


class Row(NamedTuple):
    """One row of the table. A `batch_size` of 0 is the preset's."""

    size: str
    topology: str
    batch_size: int = 0

    @property
    def key(self) -> str:
        """The key in the results file."""
        return f"{self.size} {self.topology}" + (f" batch {self.batch_size}" if self.batch_size else "")

    @property
    def flags(self) -> list[str]:
        """Flags of the command besides `--config` and `--topology`."""
        batch = ["--batch_size", str(self.batch_size)] if self.batch_size else []
        return FLAGS.get((self.size, self.topology.split(":")[0]), []) + batch


# In the order of the table. tests/planning compares its own compiles with four of them.
ROWS = [
    Row("gpt2-124m", "v5e:2x4"),
    Row("gpt2-124m", "v5e:4x8"),
    Row("gpt2-124m", "v5e:16x16"),
    Row("gpt2-124m", "v5e:4x8", batch_size=4 * 512),
    Row("gpt2-124m", "v5e:16x16", batch_size=32 * 512),
    Row("gpt2-124m", "v5p:2x2x4"),
    Row("gpt2-124m", "v6e:2x4"),
    Row("gpt2-355m", "v5e:2x4"),
    Row("gpt2-355m", "v5e:8x8"),
    Row("gpt2-355m", "v5p:4x4x4"),
    Row("gpt2-774m", "v5e:2x4"),
    Row("gpt2-774m", "v5p:4x4x4"),
    Row("gpt2-774m", "v6e:2x4"),
    Row("gpt2-1558m", "v5e:4x4"),
    Row("gpt2-1558m", "v5p:4x4x4"),
    Row("gpt2-1558m", "v6e:4x4"),
]


def plan(row: Row) -> dict[str, Any]:
    """Runs `gpt2_jax.plan` for a row and returns the part of its JSON that the table and the tests use."""
    command = [sys.executable, "-m", "gpt2_jax.plan", "--config", row.size, "--topology", row.topology, "--json"]
    command += row.flags
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    table = json.loads(done.stdout)
    keep = ("devices", "hosts", "mesh", "n_params", "attention_kernels", "attention_copies", "micro_batches", "memory",
            "model_flops", "hardware_flops", "traffic", "collectives", "estimate", "tokens")  # fmt: skip
    config = table["config"]
    return {"flags": row.flags, "batch_size": config["batch_size"], "steps": config["steps"],
            "attention": table["attention"]["backend"], **{key: table[key] for key in keep}}  # fmt: skip


HEADER = """# Scaling: the four sizes on TPU slices

`python bench/scaling.py` writes this page from [bench/results/scaling.json](../bench/results/scaling.json), the output
of `python -m gpt2_jax.plan` for each row. **The programs are compiled and estimated, not run.** XLA compiles the
training step for these chips; memory, collectives and FLOPs are read from the program. Times are arithmetic: the
compute cycles that the TPU compiler estimates, attention kernels at the chip's peak, and collectives at the link speed
of the data sheet. The first time assumes that everything overlaps, the second that nothing does. Evaluation,
checkpoints, data loading, stragglers and thermal limits are not included.

| size | chips | sequences per update | data × fsdp | micro-batches × sequences | GiB per chip | sent per chip and update | update | communication | MFU | time for the preset's tokens |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""  # noqa: E501

FOOTER = """

"Micro-batches × sequences" is per chip. "Sent" counts bytes that a chip sends with ring algorithms, over each mesh
axis; collectives under 1 MB are left out. "Communication" is its share of an update in which nothing overlaps.

- Tokens of the presets: {tokens}.
- Link speeds, all links of a chip together, in one direction: {links}.

## Configs that need sharding

774M does not fit a v5e chip with its preset, and 1558M fits neither v5e nor v6e. Their rows add flags, so that several
chips share one copy of parameters, gradients and optimizer state:

{flags}

All other rows use the preset as it is, apart from the sequences per update.

## Strong and weak scaling

The batch of a preset is fixed. More chips leave fewer sequences for each, while every chip still sends all gradients
once per update: communication takes a larger share, and MFU falls. The first three rows of 124M show it. In the next
two, every chip keeps 64 sequences, and the update takes the same time on every slice. The loss of a run with batches of
that size is not measured.
"""


def span(low: float, high: float, unit: str) -> str:
    """A range as text, or one number if both ends print alike."""
    low_text, high_text = (f"{number:.1f}" if number < 10 else f"{number:,.0f}" for number in (low, high))
    return f"{low_text}{unit}" if low_text == high_text else f"{low_text} – {high_text}{unit}"


def line(row: Row, table: dict[str, Any]) -> str:
    """A line of the table."""
    estimate, mesh, memory = table["estimate"], table["mesh"], table["memory"]
    per_device = table["batch_size"] // table["devices"] // table["micro_batches"]
    sent: dict[str, float] = {}
    for one in table["collectives"]:
        if one["n_bytes"] >= 1e6:
            axes = " and ".join(one["axes"])
            sent[axes] = sent.get(axes, 0) + one["sent"]
    updates = table["steps"] * read_config(row.size).batch_size / table["batch_size"]
    least, most = estimate["least"], estimate["most"]
    unit, seconds = next(
        (unit, seconds)
        for unit, seconds in ((" days", 86400), (" h", 3600), (" min", 60))
        if updates * most > 2 * seconds
    )
    cells = [
        row.size.removeprefix("gpt2-").upper(),
        SLICES[row.topology],
        f"{table['batch_size']:,}",
        f"{mesh['data']} × {mesh['fsdp']}",
        f"{table['micro_batches']} × {per_device}",
        f"{memory['needed'] / 2**30:.1f} of {memory['available'] / 2**30:.0f}",
        ", ".join(f"{axes} {n_bytes / 1e9:.2f} GB" for axes, n_bytes in sent.items()),
        span(1000 * least, 1000 * most, " ms"),
        f"{100 * estimate['links'] / most:.0f}%",
        span(*(100 * mfu for mfu in estimate["mfu"]), "%"),
        span(updates * least / seconds, updates * most / seconds, unit),
    ]
    return f"| {' | '.join(cells)} |"


def document(results: dict[str, dict[str, Any]]) -> str:
    """The text of docs/scaling.md."""
    presets = {row.size: read_config(row.size) for row in ROWS}
    tokens = {
        size: config.steps * config.batch_size * config.model.block_size / 1e9 for size, config in presets.items()
    }
    name = {size: size.removeprefix("gpt2-").upper() for size in presets}
    return (
        HEADER
        + "\n".join(line(row, results[row.key]) for row in ROWS if row.key in results)
        + FOOTER.format(
            tokens=", ".join(f"{name[size]} {count:.1f} G" for size, count in tokens.items()),
            links=", ".join(f"{chip} {CHIPS[kind].link / 1e9:.0f} GB/s" for chip, kind in KINDS.items()),
            flags="\n".join(f"- {name[size]} on {chip}: `{' '.join(flags)}`" for (size, chip), flags in FLAGS.items()),
        )
    )


def main() -> None:
    """Compiles the missing rows, and writes the results and the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", nargs="*", default=list(KINDS))
    parser.add_argument("--sizes", nargs="*", default=sorted({row.size for row in ROWS}))
    args = parser.parse_args()
    version = importlib.metadata.version("jax")
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known = recorded["results"] if recorded.get("jax") == version else {}
    results: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        wanted = row.size in args.sizes and row.topology.split(":")[0] in args.topologies
        if row.key in known and known[row.key]["flags"] == row.flags:
            results[row.key] = known[row.key]
        elif wanted:
            print(row.key, flush=True)
            results[row.key] = plan(row)
        RESULTS.write_text(json.dumps({"jax": version, "results": {**known, **results}}, indent=1) + "\n")
    RESULTS.write_text(json.dumps({"jax": version, "results": results}, indent=1) + "\n")
    DOCUMENT.write_text(document(results))


if __name__ == "__main__":
    main()
