"""The data pipeline: its speed beside nanoGPT's, its start-up and memory over 10 billion tokens, and how it resumes.

    python bench/data.py

The token files are made in a temporary directory: 400 M random tokens (1.6 GB of disk), and 10 B zeros in sparse files.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import arguments, median_ratio, write

from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import BatchSource, ShuffledWindows, TokenWindows, read_ahead
from gpt2_jax.data.shards import header_bytes, open_token_files

BLOCK, BATCH = 1024, 512
SHARD_TOKENS = 100_000_000

# A process from its start to the first batch, and then to the 200th. It prints the time of the first batch, that of the
# first batch through Grain, the growth of resident memory in MB, and the tokens.
FIRST_BATCH = """
import sys, time
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import BatchSource, ShuffledWindows, TokenWindows, read_ahead
from gpt2_jax.data.shards import find_token_files, open_token_files

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

paths = find_token_files(sys.argv[1] + "/*.bin", "data.train")
windows = TokenWindows(open_token_files(paths), list(map(str, paths)), 1024, 50257)
source = BatchSource(ShuffledWindows([windows], [1.0], 1337), BatchSchedule(512, (), 1024), {512: 1})
source[0]
first = time.time()
batches = read_ahead(source, 0, 10**6)
next(batches)
ahead, before = time.time(), resident()
for _ in range(200):
    next(batches)
print(first, ahead, resident() - before, windows.n_tokens)
batches.close()
"""


def open_source(paths: Sequence[Path]) -> BatchSource:
    """The batches of these token files."""
    windows = TokenWindows(open_token_files(paths), list(map(str, paths)), BLOCK, 50257)
    return BatchSource(ShuffledWindows([windows], [1.0], 1337), BatchSchedule(BATCH, (), BLOCK), {BATCH: 1})


def nanogpt(path: Path, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as nanoGPT's `get_batch` makes it: a new memory map, a random place per sequence, int64, shifted."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    places = torch.randint(len(data) - BLOCK, (BATCH,), generator=rng)

    def rows(shift: int) -> torch.Tensor:
        slices = (data[place + shift : place + shift + BLOCK].astype(np.int64) for place in places)
        return torch.stack([torch.from_numpy(row) for row in slices])

    return rows(0), rows(1)


def write_random(paths: Sequence[Path], raw: Path) -> None:
    """Writes random tokens twice, as token files and as one nanoGPT file."""
    rng = np.random.default_rng(0)
    with open(raw, "wb") as file:
        for path in paths:
            tokens = rng.integers(0, 50257, SHARD_TOKENS, dtype=np.uint16).tobytes()
            path.write_bytes(header_bytes(SHARD_TOKENS) + tokens)
            file.write(tokens)


def pipeline(paths: Sequence[Path], raw: Path, repeat: int, batches: int) -> dict[str, Any]:
    """Tokens per second from the page cache into host memory, in turns."""
    runs: dict[str, list[float]] = {"ours": [], "nanogpt": []}
    generator = torch.Generator().manual_seed(0)
    iterator = read_ahead(open_source(paths), 0, 10**6)
    actions = {
        "ours": (batches, lambda: next(iterator)),
        "nanogpt": (-(-batches // 10), lambda: nanogpt(raw, generator)),
    }
    for repetition in range(repeat + 1):  # the first warms up
        for name, (count, action) in actions.items():
            start = time.perf_counter()
            for _ in range(count):
                action()
            if repetition:
                runs[name].append(count * BATCH * BLOCK / (time.perf_counter() - start))
    iterator.close()
    return {"tokens_per_second": runs, "ratio": median_ratio(runs["ours"], runs["nanogpt"])}


def restore(paths: Sequence[Path], update: int = 100_000) -> dict[str, Any]:
    """Seconds until the batch of an update is in memory, and whether it is the right one."""
    source, seconds = open_source(paths), []
    for _ in range(5):
        start = time.perf_counter()
        iterator = read_ahead(source, update, update + 10)
        batch = next(iterator)
        seconds.append(time.perf_counter() - start)
        iterator.close()
    return {"seconds": seconds, "exact": bool(np.array_equal(batch, source[update]))}


def start_up(directory: Path, repeat: int) -> dict[str, Any]:
    """Seconds from the start of a process to its first batch, over 100 sparse files, and memory growth after it."""
    for number in range(100):
        with open(directory / f"{number:03}.bin", "wb") as file:
            header = header_bytes(SHARD_TOKENS)
            file.write(header)
            file.truncate(len(header) + 2 * SHARD_TOKENS)
    runs = []
    for repetition in range(repeat + 1):
        start = time.time()
        command = [sys.executable, "-c", FIRST_BATCH, str(directory)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        first, ahead, grown, tokens = map(float, output)
        if repetition:
            runs.append({"first_batch_s": first - start, "first_batch_read_ahead_s": ahead - start,
                         "resident_growth_mb": grown})  # fmt: skip
    return {"tokens": int(tokens), "runs": runs}


def main() -> None:
    """Measures, prints the figures and writes the file."""
    parser = arguments(__doc__)
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--batches", type=int, default=200, help="of 512 × 1,024 tokens, in each repetition")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        start = start_up(directory, args.repeat)
        paths, raw = [directory / f"random-{number}" for number in range(4)], directory / "random.raw"
        write_random(paths, raw)
        figures = {
            "start": start,
            "pipeline": pipeline(paths, raw, args.repeat, args.batches),
            "restore": restore(paths),
        }
    speeds = {name: statistics.median(runs) / 1e6 for name, runs in figures["pipeline"]["tokens_per_second"].items()}
    first, ahead = (
        statistics.median(run[key] for run in start["runs"]) for key in ("first_batch_s", "first_batch_read_ahead_s")
    )
    print(f"pipeline     {speeds['ours']:.0f} M tokens/s, nanoGPT's get_batch {speeds['nanogpt']:.0f} M: "
          f"{figures['pipeline']['ratio']:.1f} times")  # fmt: skip
    print(f"first batch  {first:.2f} s after the start of the process, through Grain {ahead:.2f} s; memory grows by "
          f"{max(run['resident_growth_mb'] for run in start['runs']):.0f} MB in 200 batches")  # fmt: skip
    seconds = statistics.median(figures["restore"]["seconds"])
    print(f"restore      {1000 * seconds:.1f} ms, exact: {figures['restore']['exact']}")
    print(write("data-cpu", figures, results=args.results))


if __name__ == "__main__":
    main()
