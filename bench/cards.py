"""Compiles the four sizes for two generations of GPUs, and fills docs/hardware.md for every card. Nothing runs.

    python bench/cards.py

The memory of a program depends on the generation, by its dtype and attention kernel, and hardly on the card. So each
size is compiled twice per generation and rematerialization, with small and larger micro-batches. The rest is linear:
memory in the micro-batch, traffic and communication in the number of micro-batches. CHECKS compiles some of what comes
out for the card itself. Compiles what bench/results/cards.json lacks at this version of JAX, under a minute each. It
can be stopped and started again. It needs the extra `cuda12`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from record import RESULTS, Figures, replace_rows

from gpt2_jax.config.toml import read_config
from gpt2_jax.hardware import CHIPS
from gpt2_jax.planning.estimate import Estimate, make_plan
from gpt2_jax.planning.micro_batch import USABLE, Change
from gpt2_jax.planning.topologies import GPUS, devices_of

RECORD = RESULTS / "cards.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "hardware.md"
SIZES = ("gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m")
COMPILED_FOR = {False: "v100-32gb", True: "rtx-4090"}  # by whether the generation has bfloat16 and cuDNN's attention
LARGEST = 32  # sequences of 1,024 tokens; larger micro-batches are hardly faster
Remat = Literal["none", "dots", "full"]


class Card(NamedTuple):
    """A row of the table: `count` cards are the usual host, for what one card does not hold."""

    label: str
    name: str  # as in --topology
    count: int = 8

    @property
    def generation(self) -> bool:
        """Whether it has bfloat16 and cuDNN's attention."""
        return GPUS[self.name].capability >= (8, 0)


class Program(NamedTuple):
    """A step to compile. `micro_batches` has the two sizes."""

    generation: bool
    size: str
    remat: Remat
    devices: int
    micro_batches: tuple[int, int]

    def key(self, micro_batch: int) -> str:
        """The key in the results file."""
        return f"{COMPILED_FOR[self.generation]}:{self.devices} {self.size} {self.remat} {micro_batch}"


# From little memory to much. Rematerialization that helps no card is left out.
CARDS = [
    Card("T4", "t4"), Card("V100 16 GB", "v100"), Card("V100 32 GB", "v100-32gb"),
    Card("L4", "l4"), Card("A10", "a10"), Card("A10G", "a10g"),
    Card("RTX 3090", "rtx-3090", 2), Card("RTX 4090", "rtx-4090", 2), Card("RTX 5090", "rtx-5090", 2),
    Card("A100 40 GB", "a100-40gb"), Card("A40", "a40"), Card("L40S", "l40s"), Card("RTX A6000", "rtx-a6000", 4),
    Card("A100 80 GB", "a100"), Card("H100 PCIe", "h100-pcie"), Card("H100 SXM", "h100"), Card("H100 NVL", "h100-nvl"),
    Card("GH200 96 GB", "gh200", 1), Card("H200", "h200"), Card("B200", "b200"), Card("GB200", "gb200", 4),
    Card("B300", "b300"), Card("GB300", "gb300", 4),
]  # fmt: skip
PROGRAMS = [
    Program(False, "gpt2-124m", "none", 1, (2, 8)),
    Program(False, "gpt2-355m", "none", 1, (1, 4)),
    Program(False, "gpt2-774m", "none", 1, (1, 2)),
    Program(False, "gpt2-774m", "full", 1, (1, 4)),
    Program(False, "gpt2-774m", "full", 8, (1, 4)),
    Program(False, "gpt2-1558m", "full", 1, (1, 4)),
    Program(False, "gpt2-1558m", "full", 8, (1, 4)),
    Program(True, "gpt2-124m", "none", 1, (4, 16)),
    Program(True, "gpt2-355m", "none", 1, (2, 8)),
    Program(True, "gpt2-774m", "none", 1, (2, 8)),
    Program(True, "gpt2-774m", "dots", 1, (2, 8)),
    Program(True, "gpt2-1558m", "none", 1, (2, 8)),
    Program(True, "gpt2-1558m", "dots", 1, (2, 8)),
    Program(True, "gpt2-1558m", "full", 1, (2, 8)),
    Program(True, "gpt2-1558m", "full", 2, (2, 8)),
    Program(True, "gpt2-1558m", "dots", 8, (2, 8)),
]
# Cards, sizes and rematerializations whose choice in the table is compiled for the card itself.
CHECKS = [("t4", "gpt2-355m"), ("a10g", "gpt2-124m"), ("h100", "gpt2-774m"), ("rtx-5090", "gpt2-1558m")]


def compiled(topology: str, size: str, remat: Remat, micro_batch: int) -> Figures:
    """Compiles a step, and returns what the table needs of it. `fsdp` takes all devices, and memory has no limit."""
    name, _, count = topology.partition(":")
    kind, config = GPUS[name].kind, read_config(size)
    if GPUS[name].capability < (8, 0):
        config = dataclasses.replace(config, dtype="float16")
    chip = CHIPS[kind]
    devices = devices_of(topology)
    CHIPS[kind] = dataclasses.replace(chip, memory=1e15)
    try:
        plan = make_plan(Change(micro_batch, remat, int(count)).apply(config), devices, topology)
    finally:
        CHIPS[kind] = chip
    return {
        "dtype": plan.config.dtype,
        "attention": plan.attention.backend,
        "micro_batches": plan.micro_batches,
        "required": plan.memory.required,
        "hardware_flops": plan.hardware_flops,
        "hbm_bytes": plan.hbm_bytes,
        "sent": sum(collective.sent() for collective in plan.collectives),
    }


class Cell(NamedTuple):
    """What fits on a card: settings, bytes that the program requires, and seconds of an update."""

    program: Program
    micro_batch: int
    required: float
    estimate: Estimate


def line_through(x: tuple[float, float], y: tuple[float, float], at: float) -> float:
    """The value at `at` of the line through two points."""
    return y[0] + (y[1] - y[0]) * (at - x[0]) / (x[1] - x[0])


def settings(card: Card, size: str, results: Figures) -> Iterator[Cell]:
    """All settings of the card's generation."""
    chip = CHIPS[GPUS[card.name].kind]
    for program in PROGRAMS:
        if (program.generation, program.size) != (card.generation, size) or program.devices not in (1, card.count):
            continue
        few, many = (results[program.key(micro_batch)] for micro_batch in program.micro_batches)
        share = read_config(size).batch_size // program.devices
        both = {figure: (few[figure], many[figure]) for figure in ("micro_batches", "required", "hbm_bytes", "sent")}
        counts = both["micro_batches"]
        for micro_batch in (2**power for power in reversed(range(LARGEST.bit_length()))):
            estimate = Estimate(
                compute=few["hardware_flops"] / program.devices / chip.flops,
                memory=line_through(counts, both["hbm_bytes"], share / micro_batch) / chip.bandwidth,
                communication=line_through(counts, both["sent"], share / micro_batch) / chip.link,
                compiler_estimate=None,
            )
            required = line_through(program.micro_batches, both["required"], micro_batch)
            yield Cell(program, micro_batch, required, estimate)


def choose(card: Card, size: str, results: Figures) -> Cell | None:
    """What fits and takes the least time if nothing overlaps: on one card, else on a host of them."""
    memory = USABLE * CHIPS[GPUS[card.name].kind].memory
    fitting = (cell for cell in settings(card, size, results) if cell.required <= memory)
    return min(fitting, key=lambda cell: (cell.program.devices, cell.estimate.upper_bound), default=None)


def duration(seconds: float) -> str:
    """Hours or days."""
    hours = seconds / 3600
    return f"{hours:.2g} h" if hours < 48 else f"{hours / 24:,.0f} days"


def text(cell: Cell | None, size: str) -> str:
    """A cell of the table."""
    if cell is None:
        return "–"
    program, steps = cell.program, read_config(size).steps
    low, high = (duration(steps * seconds) for seconds in (cell.estimate.lower_bound, cell.estimate.upper_bound))
    if low.split()[1] == high.split()[1]:
        low = low.split()[0]
    parts = [f"{cell.micro_batch}", *([program.remat] if program.remat != "none" else [])]
    where = f"{program.devices} cards: " if program.devices > 1 else ""
    return f"{where}{' '.join(parts)}, {cell.required / 2**30:.1f} GiB, {low} – {high}"


def document(page: str, recorded: Figures) -> str:
    """docs/hardware.md with these results in its tables."""
    results: dict[str, Any] = recorded["programs"]
    rows = []
    for card in CARDS:
        cells = [text(choose(card, size, results), size) for size in SIZES]
        memory = CHIPS[GPUS[card.name].kind].memory / 2**30
        rows.append(f"| {' | '.join([card.label, f'`{card.name}`', f'{memory:.1f}', *cells])} |")
    page = replace_rows(page, "| card |", rows)
    checks = []
    for key, check in recorded["checks"].items():
        topology, size, remat, micro_batch = key.split()
        shares = [f"{100 * (check[kind] / check[f'{kind}_expected'] - 1):+.1f}%" for kind in ("required", "hbm_bytes")]
        needed = f"{check['required'] / 2**30:.2f} GiB"
        checks.append(f"| `{topology}` | {size} | {remat} | {micro_batch} | {needed} | {' | '.join(shares)} |")
    return replace_rows(page, "| compiled for |", checks)


def main() -> None:
    """Compiles what is missing, and writes the results and the document."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    recorded: Figures = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if recorded.get("jax") != jax.__version__:
        recorded = {"jax": jax.__version__, "programs": {}, "checks": {}}

    def add(group: str, key: str, **more: float) -> None:
        topology, size, remat, micro_batch = key.split()
        if key not in recorded[group]:
            print(key, flush=True)
            recorded[group][key] = compiled(topology, size, remat, int(micro_batch)) | more
            RECORD.write_text(json.dumps(recorded, indent=1) + "\n")

    for program in PROGRAMS:
        for micro_batch in program.micro_batches:
            add("programs", program.key(micro_batch))
    for name, size in CHECKS:
        card = next(card for card in CARDS if card.name == name)
        cell = choose(card, size, recorded["programs"])
        assert cell is not None
        expected = cell.estimate.memory * CHIPS[GPUS[name].kind].bandwidth
        key = f"{name}:{cell.program.devices} {size} {cell.program.remat} {cell.micro_batch}"
        add("checks", key, required_expected=cell.required, hbm_bytes_expected=expected)
    DOCUMENT.write_text(document(DOCUMENT.read_text(), recorded))


if __name__ == "__main__":
    main()
