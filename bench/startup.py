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

from record import arguments, median_ratio, python_path, slug, write

LIMIT = 600.0  # seconds until the first row


def first_update(flags: list[str], cache: Path, directory: Path) -> float:
    """Seconds from the start of the command to its first row."""
    out = Path(tempfile.mkdtemp(dir=directory))
    command = [sys.executable, "-m", "gpt2_jax.train", *flags, "--log.every", "1", "--out", str(out),
               "--compilation_cache", str(cache)]  # fmt: skip
    # Variables that would override the flag are left out.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    rows = out / "metrics.jsonl"
    start = time.perf_counter()
    with open(out / "output", "w") as output:
        environment["PYTHONPATH"] = python_path()
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


def main() -> None:
    """Measures, prints the figures and writes the file."""
    parser = arguments(__doc__)
    parser.add_argument("--config", default="quickstart", help="preset or TOML file")
    parser.add_argument("--repeat", type=int, default=7, help="pairs")
    args, extra = parser.parse_known_args()
    flags = ["--config", args.config, *extra]

    runs: dict[str, list[float]] = {"empty": [], "filled": []}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        filled = directory / "filled"
        first_update(flags, filled, directory)
        for repetition in range(args.repeat):
            runs["empty"].append(first_update(flags, directory / f"empty-{repetition}", directory))
            runs["filled"].append(first_update(flags, filled, directory))
            print(f"empty {runs['empty'][-1]:6.2f} s, filled {runs['filled'][-1]:6.2f} s", flush=True)
        programs = [path.stat().st_size for path in filled.iterdir() if path.is_file()]
    figures = {
        "flags_of_training": flags,
        "ratio": median_ratio(runs["filled"], runs["empty"]),
        "median_s": {name: statistics.median(seconds) for name, seconds in runs.items()},
        "cache": {"files": len(programs), "bytes": sum(programs)},
        "seconds": runs,
    }
    print(f"filled/empty {figures['ratio']:.3f}")
    import jax  # late: on a GPU it would reserve memory that the command needs

    print(write(f"startup-{slug(jax.devices()[0].device_kind)}", figures, results=args.results))


if __name__ == "__main__":
    main()
