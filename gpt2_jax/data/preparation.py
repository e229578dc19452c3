"""Tokenizes a source into a directory of token files, and shows the progress."""

from __future__ import annotations

import os
import time

import numpy as np

from gpt2_jax.data.encode import uses_gigatoken
from gpt2_jax.data.manifest import Split
from gpt2_jax.data.sources import Source
from gpt2_jax.data.workers import MAX_WORKERS, TokenizeOptions, tokenize_blocks
from gpt2_jax.data.writer import ShardWriter
from gpt2_jax.display import Display, count, duration, si
from gpt2_jax.errors import UserError

SECONDS_BETWEEN_SAVES = 2.0


def write_tokens(source: Source, writer: ShardWriter, options: TokenizeOptions, limit: int, workers: int) -> None:
    """Tokenizes the rest of a source. Call `writer.finish` afterwards.

    If it is interrupted or fails, the progress saved last remains, and another call resumes from there.

    Args:
        source: the documents.
        writer: writes the directory; its cursor is the position to resume from.
        options: how to tokenize.
        limit: stop after this many tokens in the directory; 0 for all.
        workers: processes that tokenize; 0 for one per core.

    Raises:
        UserError: the source cannot be read, a document is damaged, or a worker was killed.
        OSError: the directory cannot be written.
    """
    workers = workers or min(_n_cores(), MAX_WORKERS)
    cursor = writer.cursor
    writer.save_progress(cursor)
    meter = _Meter(writer, source.total, limit)
    engine = " (gigatoken)" if uses_gigatoken(options.tokenizer) else ""
    with meter.display as display:
        display.print(f"{'tokenizer':10}{options.tokenizer}{engine}, {count(workers, 'worker')}")
        if cursor is not None:
            display.print(f"resumes after {writer.tokens():,} tokens")
        saved = time.perf_counter()
        try:
            for block, tokenized in tokenize_blocks(source.blocks(cursor), options, workers):
                splits: list[tuple[Split, np.ndarray]] = [("train", tokenized.train), ("val", tokenized.val)]
                for split, tokens in splits:
                    writer.append(split, tokens[: limit - writer.tokens()] if limit else tokens)
                writer.text_bytes += tokenized.text_bytes
                writer.skipped += tokenized.skipped
                cursor = block.cursor
                meter.show(block.progress)
                if limit and writer.tokens() == limit:
                    break
                if time.perf_counter() - saved > SECONDS_BETWEEN_SAVES:
                    writer.save_progress(cursor)
                    saved = time.perf_counter()
        except UserError:  # of the source or a worker, raised between two blocks, so the state can be saved
            if writer.tokens():
                writer.save_progress(cursor)
            else:
                writer.discard()
            raise


def _n_cores() -> int:
    """The number of cores that this process may use; on macOS and Windows, all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Meter:
    """Shows documents, tokens, and the speed and the time left since this process started.

    Args:
        writer: writes the directory.
        total: the size of the source in its units; 0 if unknown.
        limit: stop after this many tokens; 0 for no limit.
    """

    def __init__(self, writer: ShardWriter, total: int, limit: int) -> None:
        self.display = Display(0, 1 if total or limit else 0, "starting the workers", counts=False)
        self._writer, self._total, self._limit = writer, total, limit
        self._start, self._start_bytes = time.perf_counter(), writer.text_bytes
        self._start_share: float | None = None  # done after the first block

    def show(self, progress: int) -> None:
        """Shows the state after a block; `progress` is in the units of the source."""
        seconds = time.perf_counter() - self._start
        tokens, text_bytes = self._writer.tokens(), self._writer.text_bytes
        shares = [progress / self._total] if self._total else []
        shares += [tokens / self._limit] if self._limit else []
        share = max(shares, default=0.0)
        parts = [
            count(self._writer.documents(), "document"),
            f"{si(tokens)} tokens",
            f"{(text_bytes - self._start_bytes) / seconds / 1e6:.1f} MB/s",
        ]
        if self._start_share is None:
            self._start_share = share
        elif share > self._start_share:
            parts.append(f"{duration(seconds * (1 - share) / (share - self._start_share))} left")
        self.display.show(share, f"{share:.0%}" if shares else "so far", parts)
