"""The data pipeline: its speed beside nanoGPT's, its start-up and memory over 10 billion tokens, and how it resumes.

    python bench/data.py

The token files are made in a temporary directory: 400 M random tokens (1.6 GB of disk), and 10 B zeros in sparse files.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from first_batch import BATCH, BLOCK, open_source
from record import Figures, Rows, arguments, duration, median_of, python_path, take_turns, timed, write

from gpt2_jax.data.pipeline import read_ahead
from gpt2_jax.data.shards import header_bytes


def write_files(directory: Path, tokens: int) -> None:
    """Writes 100 sparse token files, and 4 with random tokens, which are also in one nanoGPT file."""
    rng, header = np.random.default_rng(0), header_bytes(tokens)
    for name in ("zeros", "random"):
        (directory / name).mkdir()
    for number in range(100):
        path = directory / "zeros" / f"{number:03}.bin"
        path.write_bytes(header)
        os.truncate(path, len(header) + 2 * tokens)
    with open(directory / "random.raw", "wb") as raw:
        for number in range(4):
            content = rng.integers(0, 50257, tokens, dtype=np.uint16).tobytes()
            (directory / "random" / f"{number}.bin").write_bytes(header + content)
            raw.write(content)


def start_up(directory: Path) -> Figures:
    """Seconds from the start of a process to its first batch, and memory growth after it."""
    start = time.time()
    command = [sys.executable, str(Path(__file__).with_name("first_batch.py")), str(directory)]
    printed = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": python_path()})
    first, ahead, grown = map(float, printed.split())
    return {"first_batch_s": first - start, "first_batch_read_ahead_s": ahead - start,
            "resident_growth_mb": grown / 2**20}  # fmt: skip


def nanogpt(path: Path) -> Iterator[list[torch.Tensor]]:
    """Batches as nanoGPT's `get_batch` makes them: a new memory map, a random place per sequence, int64, shifted."""
    rng = torch.Generator().manual_seed(0)
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        places = torch.randint(len(data) - BLOCK, (BATCH,), generator=rng)
        yield [
            torch.stack([torch.from_numpy(data[start : start + BLOCK].astype(np.int64)) for start in starts])
            for starts in (places, places + 1)
        ]


def speed(batches: Iterator[object], count: int) -> float:
    """Tokens per second of the next batches, from the page cache into host memory."""
    seconds = timed(lambda: collections.deque(itertools.islice(batches, count), maxlen=0))
    return count * BATCH * BLOCK / seconds


def restore(directory: Path, update: int = 100_000) -> Figures:
    """Seconds until the batch of an update is in memory, and whether it is the right one."""
    source, seconds = open_source(directory), []
    for _ in range(5):
        start = time.perf_counter()
        iterator = read_ahead(source, update, update + 10)
        batch = next(iterator)
        seconds.append(time.perf_counter() - start)
        iterator.close()
    return {"seconds": seconds, "exact": bool(np.array_equal(batch, source[update]))}


def rows(figures: Figures) -> Rows:
    """Our speed over nanoGPT's, and the seconds to the first batch."""
    ours, theirs = (statistics.median(figures["pipeline"]["tokens_per_second"][name]) for name in ("ours", "nanogpt"))
    restored = duration(statistics.median(figures["restore"]["seconds"]))
    rates = f"{ours / 1e6:.0f} M and {theirs / 1e6:.0f} M tokens/s"
    runs = figures["start"]["runs"]
    first, ahead = (median_of(runs, name) for name in ("first_batch_s", "first_batch_read_ahead_s"))
    grown = f"memory grows by {max(run['resident_growth_mb'] for run in runs):.0f} MB in 200 batches"
    return {
        "tokens/s over nanoGPT's": (ours / theirs, f"{rates}; the batch of update 100,000 is restored in {restored}"),
        "seconds to the first batch": (first, f"{ahead:.2f} s through Grain's thread; {grown}"),
    }


def main() -> None:
    """Measures and writes the file."""
    parser = arguments(__doc__, repeat=11)
    parser.add_argument("--batches", type=int, default=200, help="of 512 × 1,024 tokens, in each repetition")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="in each file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_files(directory, args.tokens)
        start = take_turns({"runs": lambda: start_up(directory / "zeros")}, args.repeat)
        iterator = read_ahead(open_source(directory / "random"), 0, 10**6)
        actions = {
            "ours": functools.partial(speed, iterator, args.batches),
            "nanogpt": functools.partial(speed, nanogpt(directory / "random.raw"), -(-args.batches // 10)),
        }
        speeds = take_turns(actions, args.repeat)
        iterator.close()
        figures = {
            "start": {"tokens": 100 * args.tokens, **start},
            "pipeline": {"tokens_per_second": speeds},
            "restore": restore(directory / "random"),
        }
    write("data", figures, rows(figures), args.results, "cpu")


if __name__ == "__main__":
    main()
