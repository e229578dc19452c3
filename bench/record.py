"""The record beside every benchmark's figures: machine, versions, commit, command and flags."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax.files import replace_text

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken", "gigatoken", "torch",
            "transformers", "tokamax", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # fmt: skip
VARIABLES = ("XLA_", "JAX_", "CUDA_", "NCCL_", "NVIDIA_", "TF32_", "OMP_", "LIBTPU_")  # prefixes


def arguments(doc: str) -> argparse.ArgumentParser:
    """The parser of a benchmark with this docstring, with the flag --results that all have."""
    # Without abbreviations: some benchmarks pass unknown flags on to training.
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="directory of the written file")
    return parser


def slug(text: str) -> str:
    """The name of a device in file names: "NVIDIA H200" becomes nvidia-h200."""
    return text.lower().replace(" ", "-")


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


def gpu() -> str | None:
    """Name and driver of the NVIDIA GPU, None without one."""
    return output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or None


def circumstances(device: str | None = None) -> dict[str, Any]:
    """The machine and the versions behind the figures.

    Args:
        device: name of the device if other processes measured on it: asking JAX would reserve its memory. By default
            JAX's first device.
    """
    import jax  # late: the processes of torch do without it

    cpu = re.search(r"^model name\s*: (.*)$", output("cat", "/proc/cpuinfo"), re.MULTILINE)
    # Only code counts: the figures of an earlier benchmark may still be uncommitted.
    changes = output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":/!bench/results")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted": bool(changes),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": device or jax.devices()[0].device_kind,
        "gpu": gpu(),
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {one.name: one.version for one in importlib.metadata.distributions() if one.name in PACKAGES},
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def write(name: str, figures: Mapping[str, Any], *, results: Path = RESULTS, device: str | None = None) -> Path:
    """Writes `results/NAME.json`: the circumstances, then the figures. The file appears whole or not at all."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    replace_text(path, json.dumps({**circumstances(device), **figures}, indent=2) + "\n")
    return path


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over median."""
    return statistics.median(ours) / statistics.median(theirs)
