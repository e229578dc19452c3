"""From the start of `python -m gpt2_jax.train` to its first update, with an empty compilation cache and a filled one.

    python bench/startup.py

The command runs as a user types it, with another run directory each time, until metrics.jsonl has its first row: the
first update is done and its loss on the host. Then it is killed. Empty and filled alternate; files of Python and the
machine are warm in both. Flags that are not this program's are those of training.
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

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
LIMIT = 600.0  # seconds until the first row


def first_update(flags: list[str], cache: Path, directory: Path) -> float:
    """Seconds from the start of the command to its first row."""
    out = Path(tempfile.mkdtemp(dir=directory))
    command = [sys.executable, "-m", "gpt2_jax.train", *flags, "--log.every", "1", "--out", str(out),
               "--compilation_cache", str(cache)]  # fmt: skip
    rows = out / "metrics.jsonl"
    start = time.perf_counter()
    with open(out / "output", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
    try:
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None or time.perf_counter() - start > LIMIT:
                raise SystemExit(f"{' '.join(command)} made no row:\n{(out / 'output').read_text()[-2000:]}")
            time.sleep(0.002)
        return time.perf_counter() - start
    finally:
        process.kill()
        process.wait()


def environment() -> dict[str, str]:
    """This process's, with its path for Python and without what would decide about the cache instead of the flag."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    return {**kept, "PYTHONPATH": python_path()}


def main() -> None:
    """Measures, and writes the table and the file."""
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
    import jax  # late: on a GPU it would hold memory that the command needs

    name = f"startup-{slug(jax.devices()[0].device_kind)}"
    print(write(name, PACKAGES, figures, results=args.results))


if __name__ == "__main__":
    main()
