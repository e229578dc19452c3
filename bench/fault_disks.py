"""Disks that are full or read-only, and deleted files: the pieces `storage` and `commands` of bench/faults.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_runs import TIMEOUT, Runs, outcome, undisturbed_run, wait_for
from record import Figures

from gpt2_jax.checkpoint_info import complete_checkpoints, read_info


@contextlib.contextmanager
def small_disk(runs: Runs) -> Iterator[Path]:
    """A file system of 6 MB. Only root can mount one."""
    disk = runs.directory / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def storage(runs: Runs, repeat: int) -> Figures:
    """A disk that is full for a while, full for good, or read-only from some update on; then the run resumes."""
    undisturbed = undisturbed_run(runs)
    figures: Figures = {}
    if os.geteuid():
        return {"skipped": "only root can mount a file system"}
    for case in ("full for a while", "full for good", "read-only", "metrics.jsonl deleted", "directory deleted"):
        with small_disk(runs) as disk:
            out, filler = disk / "run", disk / "filler"
            # A tiny model saves 20 times a second: the pause of half a second is longer than three saves.
            flags = ("--checkpoint.max_failures", "1000") if case == "full for a while" else ()
            process = runs.start(out, *flags)
            wait_for(process, out, 50, 0.0)
            if case.startswith("full"):
                fill(disk)
            elif case == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False)
            elif case == "directory deleted":
                shutil.rmtree(out, ignore_errors=True)
            else:
                (out / "metrics.jsonl").unlink()
            if case == "full for a while":
                time.sleep(0.5)
                filler.unlink()
            output, _ = process.communicate(timeout=TIMEOUT)
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            filler.unlink(missing_ok=True)
            code, after = runs.finish(out)
            figures[case] = {
                "exit_code": process.returncode,
                "tracebacks": ("Traceback" in output) + ("Traceback" in after),
                "last_line": (output.strip().splitlines() or [""])[-1].replace(str(disk), "DISK")[:200],
                "after_it": code,
                "equal": code == 0 and outcome(out)[0] == undisturbed[0],
            }
    return figures


def fill(disk: Path, left: int = 0) -> Path:
    """Fills a disk but for some bytes, and returns the file to delete."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    os.truncate(filler, max(filler.stat().st_size - left, 0))
    return filler


def commands(runs: Runs, repeat: int) -> Figures:
    """A disk that fills while text is prepared, a model converted and compiled programs cached; then there is room."""
    undisturbed, run = undisturbed_run(runs), runs.directory / "undisturbed"
    figures: Figures = {}
    if os.geteuid():
        return {"skipped": "only root can mount a file system"}
    actions: dict[str, Callable[[Path], tuple[int | None, str]]] = {
        "prepare": lambda out: runs.other(
            "prepare", runs.directory / "text.txt", "--out", out, "--tokenizer", "bytes", "--shard-tokens", "10000"
        ),
        "convert to huggingface": lambda out: runs.other(
            "convert", "--from", run, "--to", "huggingface", "--out", out
        ),
        "convert to orbax": lambda out: runs.other("convert", "--from", run, "--to", "orbax", "--out", out),
        "program cache": lambda out: runs.finish(
            runs.directory / f"cached-{out.parent.name}", "--compilation_cache", str(out)
        ),
    }  # fmt: skip
    for case, action in actions.items():
        code, output = action(runs.directory / "whole" / "out")
        if code:
            raise SystemExit(f"{case} failed:\n{output[-2000:]}")
        with small_disk(runs) as disk:
            filler = fill(disk, left=40_000)
            code, output = action(disk / "out")
            filler.unlink()
            after, more = action(disk / "out") if code else (code, "")
            equal = outcome(runs.directory / "cached-disk") == undisturbed if case == "program cache" else same_files(
                disk / "out", runs.directory / "whole" / "out"
            )  # fmt: skip
            figures[case] = {
                "exit_code": code,
                "error_lines": sum(line.startswith("error: ") for line in output.splitlines()),
                "tracebacks": ("Traceback" in output) + ("Traceback" in more),
                "after_it": after,
                "equal": after == 0 and equal,
            }
        shutil.rmtree(runs.directory / "whole")
    return figures


def same_files(one: Path, other: Path) -> bool:
    """True if two directories have the same files, but for the names and times that Orbax chooses."""
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (one, other)
    ]  # fmt: skip
    if all("checkpoints" not in {path.parts[0] for path in files} for files in contents):
        return contents[0] == contents[1]
    infos = [read_info(complete_checkpoints(root / "checkpoints")[-1]) for root in (one, other)]
    return infos[0]["fingerprint"] == infos[1]["fingerprint"]
