"""Prints when the first batch of DIR/*.bin is there, directly and through Grain; the growth of memory; the tokens.

python bench/first_batch.py DIR

bench/data.py measures from the start of this process. Memory is in bytes, over 200 batches.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import BatchSource, ShuffledWindows, TokenWindows, read_ahead
from gpt2_jax.data.shards import find_token_files, open_token_files

BLOCK, BATCH = 1024, 512


def open_source(directory: Path) -> BatchSource:
    """The batches of the token files in a directory."""
    paths = find_token_files(f"{directory}/*.bin", "data.train")
    windows = TokenWindows(open_token_files(paths), list(map(str, paths)), BLOCK, 50257)
    return BatchSource(ShuffledWindows([windows], [1.0], 1337), BatchSchedule(BATCH, (), BLOCK), {BATCH: 1})


def resident(process: int | str = "self") -> int:
    """Bytes of memory that a process uses."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    source = open_source(Path(sys.argv[1]))
    source[0]
    first = time.time()
    batches = read_ahead(source, 0, 10**6)
    next(batches)
    ahead, before = time.time(), resident()
    for _ in range(200):
        next(batches)
    print(first, ahead, resident() - before)
    batches.close()
