"""Updates of two trainings in the same number of seconds. SIGSTOP and SIGCONT let each run for half a second in turn.

So both see the same machine, and what a stopped update has done is not lost. The interval is that of the machine's
speed within one pair of processes, and pairs differ: bench/display.py gave 0.991, and 1.021 with another pair.
"""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fault_runs import wait_for
from record import Figures

SLICE_SECONDS = 0.5
SLICES_PER_BLOCK = 120  # a block has many updates, as it counts whole ones
WARMUP = 5  # updates


def updates_in_turns(
    start: Mapping[str, Callable[[Path], subprocess.Popen[str]]], directory: Path, pairs: int
) -> Figures:
    """The updates of both trainings in blocks, their ratio, and its 95% interval from resampled blocks.

    Args:
        start: "before" and "now": starts an endless training with a row for each update in a run directory.
        directory: where the run directories are created.
        pairs: slices of each.
    """
    names = tuple(start)
    outs = {name: Path(tempfile.mkdtemp(dir=directory)) for name in names}
    processes = {}
    for name in names:
        processes[name] = start[name](outs[name])
        wait_for(processes[name], outs[name], WARMUP, 0.0)
        processes[name].send_signal(signal.SIGSTOP)

    def updates(name: str) -> int:
        return (outs[name] / "metrics.jsonl").read_bytes().count(b'"tokens_per_second"')

    counts: dict[str, list[int]] = {name: [updates(name)] for name in names}
    for pair in range(pairs):
        for name in names if pair % 2 else names[::-1]:
            processes[name].send_signal(signal.SIGCONT)
            time.sleep(SLICE_SECONDS)
            processes[name].send_signal(signal.SIGSTOP)
        if (pair + 1) % SLICES_PER_BLOCK == 0:
            for name in names:
                counts[name].append(updates(name))
    for process in processes.values():
        process.kill()
    blocks = {name: [after - earlier for earlier, after in itertools.pairwise(counts[name])] for name in names}
    if not all(map(all, blocks.values())):
        raise SystemExit(f"a training made no update in {SLICES_PER_BLOCK * SLICE_SECONDS} s: {blocks}")

    def ratio(chosen: Mapping[str, list[int]]) -> float:
        return sum(chosen["now"]) / sum(chosen["before"])

    rng, count = random.Random(0), len(blocks["now"])
    resampled = []
    for _ in range(10_000):
        numbers = rng.choices(range(count), k=count)
        resampled.append(ratio({name: [blocks[name][number] for number in numbers] for name in names}))
    resampled.sort()
    return {
        "seconds_each": pairs * SLICE_SECONDS,
        "updates": blocks,
        "now_over_before": ratio(blocks),
        "interval_95": [resampled[250], resampled[-250]],
    }


def describe(case: Figures) -> str:
    """The details of a row about such a measurement."""
    low, high = case["interval_95"]
    done = ", ".join(f"{key} {sum(blocks):,}" for key, blocks in case["updates"].items())
    return f"95% interval {low:.4f} to {high:.4f}; updates in {case['seconds_each']:,.0f} s each: {done}"
