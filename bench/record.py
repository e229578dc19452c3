"""The parts that all benchmarks share: flags, turns, and the file with figures, machine, versions, commit and command.

A file also has `rows`: the results by name, as a value and its details in words. docs/performance.md shows them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from scipy.stats import t as student_t

from gpt2_jax.files import replace_text

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken", "gigatoken", "torch",
            "transformers", "ctranslate2", "llama_cpp_python", "tokamax", "nvidia-cudnn-cu12",
            "nvidia-cudnn-cu13")  # fmt: skip
VARIABLES = ("XLA_", "JAX_", "CUDA_", "NCCL_", "NVIDIA_", "TF32_", "OMP_", "LIBTPU_")  # prefixes

Figures = dict[str, Any]
Rows = dict[str, tuple[float | None, str]]  # a value, None if it could not be measured, and its details
Result = TypeVar("Result")


def arguments(doc: str, repeat: int) -> argparse.ArgumentParser:
    """The parser of a benchmark with this docstring, with the flags that all have."""
    # Without abbreviations: some benchmarks pass unknown flags on to training.
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="directory of the written file")
    parser.add_argument("--repeat", type=int, default=repeat, help=f"repetitions ({repeat})")
    return parser


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def take_turns(actions: Mapping[str, Callable[[], Result]], repeat: int) -> dict[str, list[Result]]:
    """What each action returns in each repetition. They take turns, A B A B, after a turn to warm up."""
    results: dict[str, list[Result]] = {name: [] for name in actions}
    for repetition in range(repeat + 1):
        for name, action in actions.items():
            result = action()
            if repetition:
                results[name].append(result)
    return results


def median_of(runs: Sequence[Mapping[str, float]], key: str) -> float:
    """The median of a figure over repetitions."""
    return statistics.median(run[key] for run in runs)


def mean_and_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean of independent values, and its 95% interval (Student's t)."""
    mean = statistics.mean(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def duration(seconds: float) -> str:
    """Milliseconds or seconds, three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def python_path() -> str:
    """PYTHONPATH for processes that import this checkout, installed or not."""
    return os.pathsep.join(filter(None, [str(RESULTS.parents[1]), os.environ.get("PYTHONPATH")]))


def output(*command: str) -> str:
    """The output of a command; "" if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def circumstances(device: str) -> Figures:
    """The machine and the versions behind the figures."""
    cpu = re.search(r"^model name\s*: (.*)$", output("cat", "/proc/cpuinfo"), re.MULTILINE)
    # Only code counts: the figures of an earlier benchmark may still be uncommitted.
    changes = output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":/!bench/results")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted": bool(changes),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": device,
        "gpu": output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or None,
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {one.name: one.version for one in importlib.metadata.distributions() if one.name in PACKAGES},
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def write(name: str, figures: Figures, rows: Rows, results: Path, device: str = "") -> None:
    """Prints the rows, and writes everything to NAME-DEVICE.json. The file appears whole or not at all.

    Args:
        device: by default JAX's first. Where other processes measured, asking JAX would reserve the device's memory.
    """
    if not device:
        import jax  # late: the processes of torch do without it

        device = jax.devices()[0].device_kind
    for row, (value, details) in rows.items():
        print(f"{row:40} {'-' if value is None else f'{value:.3g}':>8}  {details}")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}-{device.lower().replace(' ', '-')}.json"
    named = {row: {"value": value, "details": details} for row, (value, details) in rows.items()}
    text = json.dumps({**circumstances(device), "rows": named, **figures}, indent=2, ensure_ascii=False)
    replace_text(path, text + "\n")
    print(path)


def replace_rows(page: str, header: str, rows: Sequence[str]) -> str:
    """The page with these rows in the table whose header starts with `header`."""
    start = page.index("\n| ---", page.index(f"\n{header}")) + 1
    start = page.index("\n", start) + 1
    end = (page + "\n").index("\n\n", start)
    return page[:start] + "\n".join(rows) + page[end:]
