"""What bench/faults.py disturbs: real processes of the command on a tiny model, and what they leave."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from record import Figures

from gpt2_jax.checkpoint_info import complete_checkpoints, read_info

ROOT = Path(__file__).parents[1]
TINY = """
out = "unset"
steps = 200
batch_size = 4
micro_batch_size = 2
batch_ramp = [[640, 2]]

[model]
vocab_size = 0
block_size = 16
n_layer = 2
n_head = 2
n_embd = 32
dropout = 0.1

[data]
text = "unset"
tokenizer = "bytes"

[optimizer]
warmup_steps = 5

[checkpoint]
every = 4
keep = 3

[eval]
every = 20

[log]
every = 1
"""
TIMEOUT = 300.0  # of a process: a hang
SPEEDS = ("tokens_per_second", "mfu")


class Runs:
    """Starts training processes in a temporary directory, which share a cache of compiled programs.

    Args:
        directory: of all runs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "tiny.toml").write_text(TINY)
        (directory / "text.txt").write_text("".join(f"{number} squared is {number**2}\n" for number in range(2000)))

    def flags(self, out: Path) -> list[str]:
        """Those of the tiny run: its config and text, then its directory and the cache."""
        return ["--config", str(self.directory / "tiny.toml"), "--data.text", str(self.directory / "text.txt"),
                "--out", str(out), "--compilation_cache", str(self.directory / "programs")]  # fmt: skip

    def start(self, out: Path, *flags: str, checkout: Path = ROOT, devices: int | None = None) -> subprocess.Popen[str]:
        """Starts the command with the tiny config unless `flags` name another."""
        tiny = self.flags(out)[4 * ("--config" in flags) :]
        command = [sys.executable, "-m", "gpt2_jax.train", *tiny, *flags]
        return self._spawn(command, checkout, {} if devices is None else {"JAX_NUM_CPU_DEVICES": str(devices)})

    def other(self, name: str, *args: str | Path) -> tuple[int | None, str]:
        """Runs another command of the package to its end: the exit code, None for a hang, and its output."""
        return ended(self._spawn([sys.executable, "-m", f"gpt2_jax.{name}", *map(str, args)], ROOT, {}))

    def _spawn(self, command: list[str], checkout: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | variables,
            errors="replace",
        )

    def finish(self, out: Path, *flags: str, checkout: Path = ROOT) -> tuple[int | None, str]:
        """Runs the command to its end: the exit code, None for a hang, and its output."""
        return ended(self.start(out, *flags, checkout=checkout))


def ended(process: subprocess.Popen[str]) -> tuple[int | None, str]:
    """The exit code of a process, None for a hang, and its output."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[0]
    return process.returncode, output


def rows_of(out: Path) -> list[Figures]:
    """The complete rows of a run, without speeds."""
    with contextlib.suppress(FileNotFoundError):
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]
    return []


def outcome(out: Path) -> tuple[str, list[Figures]]:
    """The fingerprint of the newest checkpoint, and the rows."""
    return read_info(complete_checkpoints(out / "checkpoints")[-1])["fingerprint"]["state"], rows_of(out)


def wait_for(process: subprocess.Popen[str], out: Path, step: int, seconds: float) -> None:
    """Until the run has the row of an update and `seconds` more, or has ended."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows_of(out)[-3:]):
            time.sleep(seconds)
            return
        time.sleep(0.005)


@functools.cache
def undisturbed_run(runs: Runs) -> tuple[str, list[Figures]]:
    """The outcome of the run that nothing happens to."""
    code, output = runs.finish(runs.directory / "undisturbed")
    if code:
        raise SystemExit(f"the undisturbed run failed:\n{output[-2000:]}")
    return outcome(runs.directory / "undisturbed")
