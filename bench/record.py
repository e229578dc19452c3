"""What every benchmark writes down beside its figures: machine, versions, commit, flags."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gpt2_jax.files import replace_text

RESULTS = Path(__file__).parent / "results"


def cpu_model() -> str:
    """The CPU's name as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def arguments(doc: str) -> argparse.ArgumentParser:
    """The parser of a benchmark with this docstring, with the flag that all have: where the file goes."""
    # No abbreviations: flags of training pass through some of the benchmarks.
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="directory of the file written")
    return parser


def slug(text: str) -> str:
    """The name of a device as a part of a file's name: "NVIDIA H200" is nvidia-h200."""
    return text.lower().replace(" ", "-")


def python_path() -> str:
    """PYTHONPATH of processes that are to import this checkout, installed or not."""
    return os.pathsep.join(filter(None, [str(RESULTS.parents[1]), os.environ.get("PYTHONPATH")]))


def gpu() -> str | None:
    """Name and driver of the NVIDIA GPU, None without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def circumstances(packages: Sequence[str], device: str | None = None) -> dict[str, Any]:
    """Where and with what the figures were measured.

    Args:
        packages: whose versions matter.
        device: its name, if other processes measured: JAX would take memory on it only to ask. By default JAX's first.
    """

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], capture_output=True, text=True, check=False, cwd=RESULTS.parent
        ).stdout.strip()

    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "HEAD"),
        # Of what is run; the figures of the measurement before may still be uncommitted.
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":/!bench/results")),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": device or jax.devices()[0].device_kind,
        "gpu": gpu(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "OMP_NUM_THREADS") if name in os.environ},
    }


def write(
    name: str,
    packages: Sequence[str],
    figures: Mapping[str, Any],
    *,
    results: Path = RESULTS,
    device: str | None = None,
) -> Path:
    """Writes `results/NAME.json`: the circumstances, then the figures. The file appears whole or not at all."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    replace_text(path, json.dumps({**circumstances(packages, device), **figures}, indent=2) + "\n")
    return path


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over median."""
    return statistics.median(ours) / statistics.median(theirs)
