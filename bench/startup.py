"""From the start of `python -m gpt2_jax.train` to its first update, with an empty compilation cache and a full one.

    python bench/startup.py

The command runs as a user types it, each time with a new run directory, until metrics.jsonl has its first row. Then it
is killed. Empty and full caches take turns, and the machine's file cache is warm. Other flags are those of training.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Figures, Rows, arguments, python_path, take_turns, write

LIMIT = 600.0  # seconds until the first row


def first_update(flags: list[str], cache: Path) -> float:
    """Seconds from the start of the command to its first row."""
    out = Path(tempfile.mkdtemp(dir=cache.parent))
    command = [sys.executable, "-m", "gpt2_jax.train", *flags, "--log.every", "1", "--out", str(out),
               "--compilation_cache", str(cache)]  # fmt: skip
    rows = out / "metrics.jsonl"
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": python_path()}
    with open(out / "output", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None or time.perf_counter() - start > LIMIT:
                raise SystemExit(f"{' '.join(command)} wrote no row:\n{(out / 'output').read_text()[-2000:]}")
            time.sleep(0.002)
        return time.perf_counter() - start
    finally:
        process.kill()
        process.wait()


def rows(figures: Figures) -> Rows:
    """The time with a full cache over that with an empty one."""
    details = "{filled:.2f} s and {empty:.2f} s".format(**figures["median_s"])
    return {"full cache over empty": (figures["ratio"], details)}


def main() -> None:
    """Measures and writes the file."""
    parser = arguments(__doc__, repeat=7)
    args, extra = parser.parse_known_args()
    flags = extra if "--config" in extra else ["--config", "quickstart", *extra]
    with tempfile.TemporaryDirectory() as temporary:
        filled = Path(temporary) / "filled"
        actions = {
            "empty": lambda: first_update(flags, Path(tempfile.mkdtemp(dir=temporary))),
            "filled": lambda: first_update(flags, filled),
        }
        runs = take_turns(actions, args.repeat)
        programs = [path.stat().st_size for path in filled.rglob("*") if path.is_file()]
    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    figures = {
        "flags_of_training": flags,
        "ratio": medians["filled"] / medians["empty"],
        "median_s": medians,
        "cache": {"files": len(programs), "bytes": sum(programs)},
        "seconds": runs,
    }
    write("startup", figures, rows(figures), args.results)


if __name__ == "__main__":
    main()
