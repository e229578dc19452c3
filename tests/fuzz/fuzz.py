"""Damages files of every kind that the package reads, and checks that a reader takes them or raises `UserError`.

    python tests/fuzz/fuzz.py                                  each reader for a minute
    python tests/fuzz/fuzz.py metrics npy --seconds 600 --seed 7
    python tests/fuzz/fuzz.py --cases 300                      as the slow tests do it

A case is a function of the seed and its number. A reader fails a case with any other exception, with more than
`MEMORY` bytes beyond what its imports take, or after `SECONDS`. The files of the case are then left in a directory that
is printed, and belong in `targets.py` once they are fixed.
"""

import argparse
import faulthandler
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
os.environ["JAX_PLATFORMS"] = "cpu"

from targets import TARGETS, Files  # noqa: E402

from gpt2_jax.errors import UserError  # noqa: E402

MEMORY = 1 << 30
SECONDS = 10
LENGTH = 5000  # characters of an error; a config of many keys is compared in one
PIECES = [
    *(b"", b"\0", b"\xff", b"\n", b'"', b"\\", b"[", b"{", b"]", b"}", b",", b":", b"=", b".", b"#", b"-"),
    *(
        b"null",
        b"true",
        b"NaN",
        b"1e999",
        b"-1",
        b"1.5",
        b"[]",
        b"{}",
        b'""',
        b'"x"',
        b'"\\ud800"',
        b'"\\u0000"',
        b"[[]]",
    ),
    *(b"\xef\xbb\xbf", b"\xed\xa0\x80", b"../../x", b"9" * 30, b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b" " * 5000),
    *(value.to_bytes(size, "little") for size in (2, 4, 8) for value in (1, 255, (1 << (8 * size - 1)) - 1)),
    *(b"\xff" * size for size in (2, 4, 8)),
]
NUMBER = re.compile(rb"-?\d+(\.\d+)?")
WORD = re.compile(rb"[\w.]+")


def damage(rng: random.Random, content: bytes) -> bytes:
    """Changes a few places, or cuts the content off."""
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        start = rng.randrange(len(content) + 1)
        if rng.random() < 0.3:  # headers are where the errors are
            start = min(start, rng.randrange(100))
        end = min(start + rng.choice([0, 1, 1, 2, 4, 8, 100]), len(content))
        kind = rng.randrange(8)
        if kind == 0:
            content = content[:start] + bytes([rng.randrange(256)]) + content[start + 1 :]
        elif kind == 1:
            content = content[:start] + rng.choice(PIECES) + content[end:]
        elif kind == 2:
            content = content[:start] + content[end:]
        elif kind == 3:
            content = content[:start] + content[start:end] * rng.choice([2, 3, 1000]) + content[end:]
        elif kind == 4 and rng.random() < 0.3:
            content = content[:start]
        elif kind == 5:
            other = rng.randrange(len(content) + 1)
            content = content[:start] + content[other : other + 50] + content[end:]
        elif found := list((NUMBER if kind == 6 else WORD).finditer(content[:20_000])):
            match = rng.choice(found)
            content = content[: match.start()] + rng.choice(PIECES) + content[match.end() :]
    return content


def case_of(name: str, seed: int, number: int) -> Files:
    """The files of a case: a sample as it is, and then samples of which one file is damaged."""
    samples = TARGETS[name].samples()
    if number < len(samples):
        return samples[number]
    rng = random.Random(f"{name} {seed} {number}")
    files = dict(rng.choice(samples))
    file = rng.choice(sorted(files))
    return {**files, file: damage(rng, files[file])}


def run_case(name: str, files: Files, folder: Path) -> str | None:
    """Reads the files. Returns the traceback if something else than a `UserError` came out."""
    for file, content in files.items():
        (folder / file).write_bytes(content)
    signal.alarm(SECONDS)
    start = time.process_time()
    try:
        TARGETS[name].read(folder)
    except UserError as error:
        if len(str(error)) > LENGTH:
            return f"the error has {len(str(error))} characters"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    seconds = time.process_time() - start
    return f"it took {seconds:.1f} s" if seconds > SECONDS else None


def fuzz(name: str, seed: int, cases: int, seconds: float) -> int:
    """Runs the cases of one reader. Returns the number of failures."""
    samples = TARGETS[name].samples()  # imports what the reader needs
    with tempfile.TemporaryDirectory() as warm:
        run_case(name, samples[0], Path(warm))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    number, failures, deadline = 0, 0, time.monotonic() + seconds
    while number < cases and time.monotonic() < deadline and failures < 10:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-{number}-"))
        problem = run_case(name, case_of(name, seed, number), folder)
        if problem:
            failures += 1
            print(f"{name}, case {number} of seed {seed}, in {folder}:\n{problem}", flush=True)
        else:
            shutil.rmtree(folder)
        number += 1
    resource.setrlimit(resource.RLIMIT_AS, before)
    print(f"{name}: {number} cases, {failures} failures", flush=True)
    return failures


def main() -> int:
    """Runs the readers that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help=", ".join(TARGETS), choices=[[], *TARGETS])
    parser.add_argument("--seconds", type=float, default=60, help="for each reader")
    parser.add_argument("--cases", type=int, default=1 << 60, help="for each reader, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faulthandler.enable()

    def too_long(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    return int(sum(fuzz(name, args.seed, args.cases, args.seconds) for name in args.readers or TARGETS) > 0)


if __name__ == "__main__":
    sys.exit(main())
