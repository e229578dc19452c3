"""Speed of `python -m gpt2_jax.prepare`, beside a bare loop of tiktoken's `encode_ordinary`.

    python bench/prepare.py

The command runs with gigatoken, and with tiktoken, where gigatoken is hidden from Python. The text repeats the standard
library with lines in other orders. It takes 4 GB of disk in the temporary directory. On a shared machine cores change
their speed within seconds. So each speed is relative to that of the loop just before and just after it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tiktoken
from first_batch import resident
from record import Figures, Rows, arguments, median_of, python_path, timed, write

from gpt2_jax.data.corpus import stdlib_files
from gpt2_jax.data.sources import FileSource
from gpt2_jax.data.workers import BlockTokenizer, TokenizeOptions

HIDE_GIGATOKEN = "import sys; sys.modules['gigatoken'] = None"


def write_text(path: Path, documents: Sequence[str], size: float) -> Path:
    """Writes about `size` bytes, JSON lines or one text: the documents repeatedly, their lines in other orders."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            for document in documents:
                lines = document.splitlines(keepends=True)
                rng.shuffle(lines)
                text = "".join(lines)
                file.write(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text)
    return path


def prepare(source: Path, engine: str, workers: int) -> dict[str, float]:
    """Runs the command: MB of text per second from start to end, and the peak memory of all its processes."""
    # The directory of the source has a sitecustomize.py, which every Python runs at its start.
    path = os.pathsep.join([str(source.parent)] * (engine == "tiktoken") + [python_path()])
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        command = [sys.executable, "-m", "gpt2_jax.prepare", str(source), "--out", out, "--workers", str(workers)]
        peak, start = 0, time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path})
        while process.poll() is None:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                peak = max(peak, sum(map(resident, [process.pid, *children])))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
        size = json.loads((Path(out) / "manifest.json").read_text())["text_bytes"]
    return {"mb_per_second": size / seconds / 1e6, "seconds": seconds, "peak_mb": peak / 2**20}


def tokenizing(directory: Path, documents: Sequence[str], repeat: int, megabytes: int) -> Figures:
    """The command and a worker beside a loop of `encode_ordinary` on one core."""
    lines = write_text(directory / "text.jsonl", documents, 1e6 * megabytes)
    # gigatoken gets eight times the text, or it would be done before it is at full speed.
    more = write_text(directory / "more.jsonl", documents, 8e6 * megabytes)
    tiny = write_text(directory / "tiny.jsonl", ["a document\n"], 1)
    (directory / "sitecustomize.py").write_text(HIDE_GIGATOKEN)
    sys.modules["gigatoken"] = None  # hidden from the worker in this process too
    encoding = tiktoken.get_encoding("gpt2")
    worker = BlockTokenizer(TokenizeOptions("gpt2", "text", 0.1, False), encoding)
    blocks = list(itertools.islice(FileSource([str(lines)], "text", 0.1, "gpt2", False).blocks(None), 30))
    sample = [json.loads(line)["text"] for block in blocks for line in block.content.read().splitlines()]
    size = sum(len(document.encode()) for document in sample)

    def loop() -> None:
        collections.deque(map(encoding.encode_ordinary, sample), maxlen=0)

    def two_loops() -> None:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # `encode_ordinary` releases Python's lock
            list(pool.map(lambda _: loop(), range(2)))

    def speed(n_bytes: int, action: Callable[[], object]) -> dict[str, float]:
        return {"mb_per_second": n_bytes / timed(action) / 1e6}

    def once_started(source: Path, engine: str, workers: int) -> dict[str, float]:
        start_up, run = (prepare(path, engine, workers) for path in (tiny, source))
        share = (run["seconds"] - start_up["seconds"]) / run["seconds"]
        return {**run, "mb_per_second": run["mb_per_second"] / share, "start_up_s": start_up["seconds"]}

    actions: dict[str, Callable[[], dict[str, float]]] = {
        f"{engine}, {workers} worker{'s' * (workers > 1)}": functools.partial(once_started, source, engine, workers)
        for engine, source in (("tiktoken", lines), ("gigatoken", more))
        for workers in (1, 2)
    }
    actions["encode_ordinary, 2 at once"] = lambda: speed(2 * size, two_loops)
    actions["a worker's blocks"] = lambda: speed(size, lambda: list(map(worker, blocks)))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in actions}
    before = speed(size, loop)["mb_per_second"]
    for _ in range(repeat):
        for name, action in actions.items():
            run, after = action(), speed(size, loop)["mb_per_second"]
            runs[name].append({**run, "encode_ordinary_mb_per_second": (before + after) / 2})
            before = after
    # Medians of the speeds, each relative to the loop around it.
    relative = {
        name: statistics.median(run["mb_per_second"] / run["encode_ordinary_mb_per_second"] for run in runs[name])
        for name in actions
    }
    return {
        "megabytes": megabytes,
        "runs": runs,
        "a worker's blocks over encode_ordinary": relative["a worker's blocks"],
        "tiktoken, 1 worker over encode_ordinary": relative["tiktoken, 1 worker"],
        "tiktoken, 2 workers over 1": relative["tiktoken, 2 workers"] / relative["tiktoken, 1 worker"],
        "encode_ordinary, 2 at once over 1": relative["encode_ordinary, 2 at once"],
        "gigatoken, 1 worker over tiktoken's": relative["gigatoken, 1 worker"] / relative["tiktoken, 1 worker"],
    }


def rows(figures: Figures) -> Rows:
    """The speeds of both engines."""
    text = figures["text"]
    peak = max(figures[name]["peak_mb"] for name in ("2 GB in one text", "2 GB of lines"))
    speeds = {name: f"{median_of(runs, 'mb_per_second'):.0f} MB/s" for name, runs in text["runs"].items()}
    tiktoken, gigatoken = (
        f"{speeds[f'{engine}, 1 worker']}, with two workers {speeds[f'{engine}, 2 workers']}"
        for engine in ("tiktoken", "gigatoken")
    )
    memory = f"at most {peak:.0f} MB of memory for a text of 2 GB"
    ratios = ("tiktoken, 1 worker over encode_ordinary", "gigatoken, 1 worker over tiktoken's")
    return {ratios[0]: (text[ratios[0]], tiktoken), ratios[1]: (text[ratios[1]], f"{gigatoken}; {memory}")}


def main() -> None:
    """Measures and writes the file."""
    parser = arguments(__doc__, repeat=11)
    parser.add_argument("--megabytes", type=int, default=40, help="of text for tiktoken; 8 times as much for gigatoken")
    parser.add_argument("--big", type=float, default=2e9, help="bytes of the text for which memory is measured")
    args = parser.parse_args()
    documents = [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files().values()]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        figures: Figures = {"text": tokenizing(directory, documents, args.repeat, args.megabytes)}
        for name, file in (("2 GB in one text", "big.txt"), ("2 GB of lines", "big.jsonl")):
            path = write_text(directory / file, documents, args.big)
            figures[name] = prepare(path, "gigatoken", 2)
            path.unlink()
    write("prepare", {**figures, "big_bytes": args.big}, rows(figures), args.results, "cpu")


if __name__ == "__main__":
    main()
