"""The data pipeline beside nanoGPT's, start-up and memory over 10 billion tokens, and how fast `prepare` writes them.

    python bench/data.py [--text FILE ...]

Everything is made in a temporary directory (6 GB of disk): random tokens, files of zeros that take no disk, and text
that repeats the standard library's with its lines in other orders, or the files of --text.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
from record import arguments, median_ratio, write

from gpt2_jax.data.corpus import stdlib_files
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import BatchSource, ShuffledWindows, TokenWindows, read_ahead
from gpt2_jax.data.shards import header_bytes, open_token_files
from gpt2_jax.data.sources import Files
from gpt2_jax.data.workers import BlockTokenizer, Settings

PACKAGES = ("grain", "numpy", "torch", "tiktoken", "gigatoken")
BLOCK, BATCH = 1024, 512
BATCH_TOKENS = BLOCK * BATCH

# What a process does from its start to the first batch, and then to the 200th, over the files of a directory.
FIRST_BATCH = """
import sys, time
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import ShuffledWindows, BatchSource, TokenWindows, read_ahead
from gpt2_jax.data.shards import find_token_files, open_token_files

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

paths = find_token_files(sys.argv[1] + "/*.bin", "data.train")
windows = TokenWindows(open_token_files(paths), list(map(str, paths)), 1024, 50257)
source = BatchSource(ShuffledWindows([windows], [1.0], 1337), BatchSchedule(512, (), 1024), {512: 1})
source[0]
print(time.time(), flush=True)
batches = read_ahead(source, 0, 10**6)
next(batches)
print(time.time(), flush=True)
before = resident()
for _ in range(200):
    next(batches)
print(resident() - before, resident(), windows.n_tokens)
batches.close()
"""

# `prepare`, with gigatoken or as if it were not installed; workers import this file too.
PREPARE = """
import importlib.util, sys
FAST = {fast}
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gigatoken" and not FAST else find(name, *rest)
from gpt2_jax import prepare
if __name__ == "__main__":
    prepare.run_command(prepare.main)
"""


def ours(paths):
    """An iterator of batches, as training reads them."""
    windows = TokenWindows(open_token_files(paths), list(map(str, paths)), BLOCK, 50257)
    source = BatchSource(ShuffledWindows([windows], [1.0], 1337), BatchSchedule(BATCH, (), BLOCK), {BATCH: 1})
    return read_ahead(source, 0, 10**6)


def nanogpt(path, rng):
    """A batch as nanoGPT's `get_batch` makes it: mapped anew, one random place for each sequence, int64, shifted."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    places = torch.randint(len(data) - BLOCK, (BATCH,), generator=rng)
    inputs = torch.stack([torch.from_numpy(data[place : place + BLOCK].astype(np.int64)) for place in places])
    targets = torch.stack([torch.from_numpy(data[place + 1 : place + 1 + BLOCK].astype(np.int64)) for place in places])
    return inputs, targets


def pipeline(directory, repeat, batches):
    """Tokens per second into host memory, over 400 M random tokens in the page cache, alternating."""
    rng = np.random.default_rng(0)
    paths = [directory / f"{number}.bin" for number in range(4)]
    with open(directory / "all.raw", "wb") as raw:
        for path in paths:
            tokens = rng.integers(0, 50257, 100_000_000, dtype=np.uint16)
            path.write_bytes(header_bytes(tokens.size) + tokens.tobytes())
            raw.write(tokens.tobytes())
    runs = {"ours": [], "nanogpt": []}
    generator = torch.Generator().manual_seed(0)
    iterator = ours(paths)
    for repetition in range(repeat + 1):  # the first warms up
        start = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        seconds = {"ours": (time.perf_counter() - start) / batches}
        start = time.perf_counter()
        for _ in range(batches // 10):
            nanogpt(directory / "all.raw", generator)
        seconds["nanogpt"] = (time.perf_counter() - start) / (batches // 10)
        if repetition:
            for name, value in seconds.items():
                runs[name].append(BATCH_TOKENS / value)
    iterator.close()
    return {"tokens_per_second": runs, "ratio": median_ratio(runs["ours"], runs["nanogpt"])}


def restore(paths, update=100_000):
    """Seconds until the batch of an update is there, and whether it is the one that it has to be."""
    windows = TokenWindows(open_token_files(paths), list(map(str, paths)), BLOCK, 50257)
    source = BatchSource(ShuffledWindows([windows], [1.0], 1337), BatchSchedule(BATCH, (), BLOCK), {BATCH: 1})
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        iterator = read_ahead(source, update, update + 10)
        batch = next(iterator)
        seconds.append(time.perf_counter() - start)
        iterator.close()
    return {"seconds": seconds, "exact": bool(np.array_equal(batch, source[update]))}


def start_up(directory, repeat):
    """Seconds from the start of a process to its first batch, over 100 files of 100 M tokens, and memory after that."""
    for number in range(100):
        with open(directory / f"{number:03}.bin", "wb") as file:
            file.write(header_bytes(100_000_000))
            file.truncate(1024 + 2 * 100_000_000)
    results = []
    for repetition in range(repeat + 1):
        start = time.time()
        output = subprocess.run(
            [sys.executable, "-c", FIRST_BATCH, str(directory)], capture_output=True, text=True, check=True
        ).stdout.split()
        if repetition:
            first, ahead, grown, resident, tokens = map(float, output)
            results.append({"first_batch_s": first - start, "first_batch_read_ahead_s": ahead - start,
                            "resident_growth_mb": grown, "resident_mb": resident})  # fmt: skip
    return {"tokens": int(tokens), "runs": results}


def texts(files):
    """The documents to tokenize."""
    paths = [Path(file) for file in files] or list(stdlib_files().values())
    return [text for path in paths if (text := path.read_text(encoding="utf-8", errors="replace"))]


def write_lines(path, documents, size):
    """JSON lines of about `size` bytes: the documents over and over, their lines in other orders."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            for document in documents:
                lines = document.splitlines(keepends=True)
                rng.shuffle(lines)
                file.write(json.dumps({"text": "".join(lines)}) + "\n")
    return path


def write_text(path, documents, size):
    """One text of about `size` bytes."""
    rng = random.Random(1)
    lines = [line for document in documents for line in document.splitlines(keepends=True)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            rng.shuffle(lines)
            file.writelines(lines)
    return path


def prepare(directory, source, *, fast, workers):
    """Runs the command: MB of text per second, start to end, and the most memory that all its processes held."""
    script = directory / f"prepare_{'fast' if fast else 'tiktoken'}.py"
    script.write_text(PREPARE.format(fast=fast))
    out = Path(tempfile.mkdtemp(dir=directory))
    command = [sys.executable, str(script), str(source), "--out", str(out), "--workers", str(workers)]
    most = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def watch():
        nonlocal most
        while process.poll() is None:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                most = max(most, sum(resident(pid) for pid in [process.pid, *children]))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - start
    watcher.join()
    size = json.loads((out / "manifest.json").read_text())["text_bytes"]
    for path in out.iterdir():
        path.unlink()
    return {"mb_per_second": size / seconds / 1e6, "seconds": seconds, "peak_mb": most / 2**20}


def resident(pid):
    """Bytes that a process holds for itself and shares."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def tokenizing(directory, documents, repeat, megabytes):
    """`prepare` beside a loop of tiktoken's `encode_ordinary` on one core.

    Cores change their speed within seconds where others use the machine too. So a worker's work is compared block by
    block, and each run of the command with the loop just before and just after it.
    """
    lines = write_lines(directory / "text.jsonl", documents, megabytes * 1_000_000)
    encoding = tiktoken.get_encoding("gpt2")
    blocks = list(itertools.islice(Files([str(lines)], "text", 0.1, "gpt2", False).blocks(None), 30))
    sample = [[json.loads(line)["text"] for line in block.content.read().splitlines()] for block in blocks]
    sizes = [sum(len(document.encode()) for document in part) for part in sample]
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "gigatoken" else find_spec(name, *rest)
    worker = BlockTokenizer(Settings("gpt2", "text", 0.1, False), encoding)
    importlib.util.find_spec = find_spec

    def loop(part):
        start = time.perf_counter()
        for document in part:
            encoding.encode_ordinary(document)
        return time.perf_counter() - start

    def work(block):
        start = time.perf_counter()
        worker(block)
        return time.perf_counter() - start

    pairs = [(loop(part), work(block)) for part, block in zip(sample, blocks, strict=True)]
    looped, worked = map(sum, zip(*pairs, strict=True))
    # gigatoken gets eight times as much text: it would be done with the other before it has got going.
    more = write_lines(directory / "more.jsonl", documents, 8 * megabytes * 1_000_000)
    tiny = write_lines(directory / "tiny.jsonl", ["a document\n"], 1)
    cases = {"tiktoken, 1 worker": (False, 1, lines), "tiktoken, 2 workers": (False, 2, lines),
             "gigatoken, 1 worker": (True, 1, more), "gigatoken, 2 workers": (True, 2, more)}  # fmt: skip
    start_up = {
        name: statistics.median(prepare(directory, tiny, fast=fast, workers=workers)["seconds"] for _ in range(5))
        for name, (fast, workers, _) in cases.items()
    }
    runs = {name: [] for name in cases}
    size, together = sum(sizes), []
    before = size / sum(map(loop, sample)) / 1e6
    for _ in range(repeat):
        for name, (fast, workers, source) in cases.items():
            run = prepare(directory, source, fast=fast, workers=workers)
            run["mb_per_second"] *= run["seconds"] / (run["seconds"] - start_up[name])
            after = size / sum(map(loop, sample)) / 1e6
            runs[name].append({**run, "encode_ordinary_mb_per_second": (before + after) / 2})
            before = after
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # it works without Python's lock
            start = time.perf_counter()
            list(pool.map(lambda part: sum(map(loop, part)), [sample, sample]))
            both = 2 * size / (time.perf_counter() - start) / 1e6
        after = size / sum(map(loop, sample)) / 1e6
        together.append({"two": both, "one": (before + after) / 2})
        before = after

    def ratios(name, other=None):
        """Medians, each run in units of the loop around it."""
        relative = [run["mb_per_second"] / run["encode_ordinary_mb_per_second"] for run in runs[name]]
        return statistics.median(relative) / (ratios(other) if other else 1)

    return {
        "megabytes": megabytes,
        "start_up_s": start_up,
        "runs": runs,
        "encode_ordinary_mb_per_second": together,
        "a worker's blocks over encode_ordinary": looped / worked,
        "tiktoken, 1 worker over encode_ordinary": ratios("tiktoken, 1 worker"),
        "tiktoken, 2 workers over 1": ratios("tiktoken, 2 workers", "tiktoken, 1 worker"),
        "encode_ordinary, 2 at once over 1": statistics.median(pair["two"] / pair["one"] for pair in together),
        "gigatoken, 1 worker over tiktoken's": ratios("gigatoken, 1 worker", "tiktoken, 1 worker"),
    }


def main():
    """Measures and writes the table and the file."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=["read", "prepare"], help="the pipeline, or `prepare`; by default both")
    parser.add_argument("--text", nargs="*", default=[], help="text files to tokenize instead of the standard library")
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--batches", type=int, default=200, help="of 512 × 1,024 tokens, in each repetition")
    parser.add_argument("--megabytes", type=int, default=40, help="of text for `prepare`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.only != "prepare":
            report_reading(measure_reading(Path(temporary), args.repeat, args.batches), args.results)
        if args.only != "read":
            report_prepare(measure_prepare(Path(temporary), args.text, args.repeat, args.megabytes), args.results)


def measure_reading(root, repeat, batches):
    """All figures of the pipeline."""
    for name in ("random", "sparse"):
        (root / name).mkdir()
    figures = {"start": start_up(root / "sparse", repeat), "pipeline": pipeline(root / "random", repeat, batches)}
    figures["restore"] = restore([root / "random" / f"{number}.bin" for number in range(4)])
    for path in (root / "random").iterdir():
        path.unlink()
    return figures


def report_reading(figures, results):
    """Prints them, and writes the file."""
    median = statistics.median
    speeds, start = figures["pipeline"]["tokens_per_second"], figures["start"]["runs"]
    print(f"pipeline     {median(speeds['ours']) / 1e6:.0f} M tokens/s, nanoGPT's get_batch "
          f"{median(speeds['nanogpt']) / 1e6:.0f} M: {figures['pipeline']['ratio']:.1f} times")  # fmt: skip
    print(f"first batch  {median([run['first_batch_s'] for run in start]):.2f} s after the start of the process, read "
          f"ahead by Grain {median([run['first_batch_read_ahead_s'] for run in start]):.2f} s; memory grows by "
          f"{max(run['resident_growth_mb'] for run in start):.0f} MB in 200 batches")  # fmt: skip
    print(f"restore      {1000 * median(figures['restore']['seconds']):.1f} ms, exact: {figures['restore']['exact']}")
    print(write("data-cpu", PACKAGES, figures, results=results))


def measure_prepare(root, files, repeat, megabytes):
    """All figures of `prepare`."""
    (root / "text").mkdir()
    documents = texts(files)
    figures = {"text": tokenizing(root / "text", documents, repeat, megabytes)}
    for name, make in (("2 GB in one text", write_text), ("2 GB of lines", write_lines)):
        big = make(root / "text" / ("big.txt" if make is write_text else "big.jsonl"), documents, 2_000_000_000)
        figures[name] = prepare(root / "text", big, fast=True, workers=2)
        big.unlink()
    return figures


def report_prepare(figures, results):
    """Prints them, and writes the file."""
    for name, runs in figures["text"]["runs"].items():
        speed = statistics.median([run["mb_per_second"] for run in runs])
        print(f"{name:40}{speed:.1f} MB/s once started")
    for name, value in figures["text"]["start_up_s"].items():
        print(f"{'start-up, ' + name:40}{value:.2f} s")
    for name, value in figures["text"].items():
        if isinstance(value, float):
            print(f"{name:40}{value:.2f}")
    for name in ("2 GB in one text", "2 GB of lines"):
        print(f"{name:40}{figures[name]['mb_per_second']:.0f} MB/s, at most {figures[name]['peak_mb']:.0f} MB")
    print(write("prepare-cpu", PACKAGES, figures, results=results))


if __name__ == "__main__":
    main()
