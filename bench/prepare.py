"""Speed of `python -m gpt2_jax.prepare`, beside a bare loop of tiktoken's `encode_ordinary`.

    python bench/prepare.py [--text FILE ...]

The command runs with gigatoken as installed, and with tiktoken in a virtual environment that has every package but
gigatoken. The text repeats the standard library, or the files of --text, with lines in other orders. It takes 4 GB of
disk in the temporary directory.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiktoken
from record import arguments, python_path, timed, write

from gpt2_jax.data.corpus import stdlib_files
from gpt2_jax.data.sources import FileSource
from gpt2_jax.data.workers import BlockTokenizer, TokenizeOptions

BIG = 2_000_000_000  # bytes of the text for which memory is measured


def environment_without(package: str, directory: Path) -> str:
    """Creates a virtual environment that has every installed package but one, by links, and returns its Python."""
    venv.create(directory)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(package) and path.name != "__pycache__":
            (site / path.name).symlink_to(path)
    return str(directory / "bin" / "python")


def read_texts(files: Sequence[str]) -> list[str]:
    """The documents to tokenize."""
    paths = [Path(file) for file in files] or list(stdlib_files().values())
    return [text for path in paths if (text := path.read_text(encoding="utf-8", errors="replace"))]


def write_text(path: Path, documents: Sequence[str], size: int) -> Path:
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


def resident(pid: int | str) -> int:
    """Bytes that a process has in memory."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def prepare(source: Path, python: str, workers: int) -> dict[str, float]:
    """Runs the command: MB of text per second from start to end, and the peak memory of all its processes."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        command = [python, "-m", "gpt2_jax.prepare", str(source), "--out", out, "--workers", str(workers)]
        peak, start = 0, time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": python_path()})
        while True:
            try:
                code = process.wait(0.05)
                break
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                    peak = max(peak, sum(map(resident, [process.pid, *children])))
        seconds = time.perf_counter() - start
        if code:
            raise SystemExit(f"{' '.join(command)} failed with exit code {code}")
        size = json.loads((Path(out) / "manifest.json").read_text())["text_bytes"]
    return {"mb_per_second": size / seconds / 1e6, "seconds": seconds, "peak_mb": peak / 2**20}


def tokenizing(directory: Path, documents: Sequence[str], plain: str, repeat: int, megabytes: int) -> dict[str, Any]:
    """The command and a worker beside a loop of `encode_ordinary` on one core.

    On a shared machine cores change their speed within seconds. So a worker is compared block by block, and each run of
    the command with the loop just before and just after it.

    Args:
        plain: the Python of an environment without gigatoken.
    """
    lines = write_text(directory / "text.jsonl", documents, megabytes * 1_000_000)
    encoding = tiktoken.get_encoding("gpt2")
    # By its name gpt2_jax chooses gigatoken. Another name keeps tiktoken.
    renamed = tiktoken.Encoding(
        "gpt2-with-tiktoken",
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=encoding._special_tokens,
    )
    worker = BlockTokenizer(TokenizeOptions("gpt2", "text", 0.1, False), renamed)
    blocks = list(itertools.islice(FileSource([str(lines)], "text", 0.1, "gpt2", False).blocks(None), 30))
    sample = [[json.loads(line)["text"] for line in block.content.read().splitlines()] for block in blocks]
    size = sum(len(document.encode()) for part in sample for document in part)

    def loop(part: Sequence[str]) -> float:
        return timed(lambda: collections.deque(map(encoding.encode_ordinary, part), maxlen=0))

    def loop_speed() -> float:
        return size / sum(map(loop, sample)) / 1e6

    pairs = [(loop(part), timed(lambda block=block: worker(block))) for part, block in zip(sample, blocks, strict=True)]
    looped, worked = map(sum, zip(*pairs, strict=True))
    # gigatoken gets eight times the text, or it would be done before it is at full speed.
    more = write_text(directory / "more.jsonl", documents, 8 * megabytes * 1_000_000)
    tiny = write_text(directory / "tiny.jsonl", ["a document\n"], 1)
    cases = {
        f"{engine}, {workers} worker{'s' * (workers > 1)}": (source, python, workers)
        for engine, source, python in (("tiktoken", lines, plain), ("gigatoken", more, sys.executable))
        for workers in (1, 2)
    }
    start_up = {
        name: statistics.median(prepare(tiny, python, workers)["seconds"] for _ in range(5))
        for name, (_, python, workers) in cases.items()
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    together = []
    before = loop_speed()
    for _ in range(repeat):
        for name, (source, python, workers) in cases.items():
            run = prepare(source, python, workers)
            run["mb_per_second"] *= run["seconds"] / (run["seconds"] - start_up[name])
            after = loop_speed()
            runs[name].append({**run, "encode_ordinary_mb_per_second": (before + after) / 2})
            before = after
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # `encode_ordinary` releases Python's lock
            both = timed(lambda pool=pool: list(pool.map(lambda _: loop_speed(), range(2))))
        after = loop_speed()
        together.append({"two": 2 * size / both / 1e6, "one": (before + after) / 2})
        before = after
    # Medians of the speeds, each relative to the loop around it.
    relative = {
        name: statistics.median(run["mb_per_second"] / run["encode_ordinary_mb_per_second"] for run in runs[name])
        for name in cases
    }
    return {
        "megabytes": megabytes,
        "start_up_s": start_up,
        "runs": runs,
        "encode_ordinary_mb_per_second": together,
        "a worker's blocks over encode_ordinary": looped / worked,
        "tiktoken, 1 worker over encode_ordinary": relative["tiktoken, 1 worker"],
        "tiktoken, 2 workers over 1": relative["tiktoken, 2 workers"] / relative["tiktoken, 1 worker"],
        "encode_ordinary, 2 at once over 1": statistics.median(pair["two"] / pair["one"] for pair in together),
        "gigatoken, 1 worker over tiktoken's": relative["gigatoken, 1 worker"] / relative["tiktoken, 1 worker"],
    }


def main() -> None:
    """Measures, prints the figures and writes the file."""
    parser = arguments(__doc__)
    parser.add_argument("--text", nargs="*", default=[], help="text files instead of the standard library")
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument(
        "--megabytes", type=int, default=40, help="of text for tiktoken; gigatoken gets 8 times as much"
    )
    parser.add_argument("--big", type=int, default=BIG, help="bytes of the text for which memory is measured")
    args = parser.parse_args()
    documents = read_texts(args.text)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        plain = environment_without("gigatoken", directory / "plain")
        text = tokenizing(directory, documents, plain, args.repeat, args.megabytes)
        big = {}
        for name, file in (("2 GB in one text", "big.txt"), ("2 GB of lines", "big.jsonl")):
            path = write_text(directory / file, documents, args.big)
            big[name] = prepare(path, sys.executable, 2)
            path.unlink()
    for name, runs in text["runs"].items():
        print(f"{name:40}{statistics.median(run['mb_per_second'] for run in runs):.1f} MB/s once started")
    for name, value in text["start_up_s"].items():
        print(f"{'start-up, ' + name:40}{value:.2f} s")
    for name, value in text.items():
        if isinstance(value, float):
            print(f"{name:40}{value:.2f}")
    for name, figures in big.items():
        print(f"{name:40}{figures['mb_per_second']:.0f} MB/s, at most {figures['peak_mb']:.0f} MB")
    print(write("prepare-cpu", {"text": text, **big, "big_bytes": args.big}, results=args.results))


if __name__ == "__main__":
    main()
