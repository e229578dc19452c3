"""From tokens to batches: batch k is a pure function of (seed, k), read ahead by one Grain thread.

A stream of tokens is cut into windows of block_size + 1 tokens with stride block_size (the last token of one is the
first of the next: it is a target there and an input here). Each epoch visits every window once, in an order of its
own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt2_jax.config import IGNORE
from gpt2_jax.data.order import BatchSchedule, Mixture, permute
from gpt2_jax.data.shards import Tokens
from gpt2_jax.errors import UserError

if TYPE_CHECKING:  # Grain imports JAX: a second that preparing and inspecting data do not need
    import grain

PEEK_TOKENS = 1 << 16  # Checked against the vocabulary before anything starts: 128 KB of each file.


class TokenWindows:
    """Windows of block_size + 1 tokens over one or more streams; none crosses from one stream to the next.

    Args:
        streams: the tokens.
        names: of the streams, for errors.
        block_size: predicted tokens per window.
        vocab_size: tokens must be below it.
        document_start: the token that stands before each document. A window in whose stride a document starts is
            moved forward to the first that does, unless it would cross the end of its stream then. So some tokens
            are skipped and others come twice in an epoch. None moves nothing.

    Raises:
        UserError: no stream is as long as a window, or one starts with a token beyond the vocabulary.
    """

    def __init__(
        self,
        streams: Sequence[Tokens],
        names: Sequence[str],
        block_size: int,
        vocab_size: int,
        document_start: int | None = None,
    ) -> None:
        self.streams, self.names, self.block_size, self.vocab_size = streams, names, block_size, vocab_size
        self.document_start = document_start
        longest = max(map(len, streams))
        if longest <= block_size:
            raise UserError(
                f"{', '.join(names)}: {longest:,} tokens are too few for one window of model.block_size + 1 = "
                f"{block_size + 1:,}; give more text, or type --model.block_size {max(longest // 4, 1)}"
            )
        for stream, name in zip(streams, names, strict=True):
            self._check(stream[:PEEK_TOKENS], name)
        if len(dtypes := {stream.dtype for stream in streams}) > 1:
            raise UserError(f"{names[0]} and others hold {' and '.join(map(str, dtypes))}; give files of one kind")
        (self._dtype,) = dtypes
        self.n_tokens = sum(map(len, streams))
        self._first = np.cumsum([0, *(max(len(stream) - 1, 0) // block_size for stream in streams)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def _check(self, tokens: np.ndarray, name: str) -> None:
        if (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise UserError(
                f"{name} has the token {largest}, beyond model.vocab_size = {self.vocab_size}; it was made with "
                "another tokenizer"
            )

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Windows number `index`, int [n] -> int32 [n, block_size + 1].

        Raises:
            UserError: one holds a token beyond the vocabulary, or cannot be read.
        """
        stream_of = np.searchsorted(self._first, index, side="right") - 1
        starts = (index - self._first[stream_of]) * self.block_size
        groups = [(stream, np.flatnonzero(stream_of == stream)) for stream in np.unique(stream_of)]
        if self.document_start is not None:
            for stream, rows in groups:
                starts[rows] = self._moved(self.streams[stream], starts[rows])
        windows = np.empty((len(index), self.block_size + 1), self._dtype)
        for stream, rows in groups:
            self.streams[stream].read(starts[rows], windows, rows)
        if windows.max(initial=0) >= self.vocab_size:
            for stream, rows in groups:
                self._check(windows[rows], self.names[stream])
        return windows.astype(np.int32)

    def _moved(self, stream: Tokens, starts: np.ndarray) -> np.ndarray:
        """Each start, or the first document start of the stride behind it."""
        strides = np.empty((len(starts), self.block_size), self._dtype)
        stream.read(starts, strides, np.arange(len(starts)))
        moved = starts + (strides == self.document_start).argmax(axis=1)
        return np.where(moved + self.block_size < len(stream), moved, starts)

    def all_targets(self, limit: int = 0) -> Iterator[tuple[int, int]]:
        """Places of windows, (stream, start), in order: every token but the first of each stream is a target once.

        Args:
            limit: stops after that many targets (rounded up to a window); 0 means all.
        """
        seen = 0
        for number, stream in enumerate(self.streams):
            for start in range(0, len(stream) - 1, self.block_size):
                if limit and seen >= limit:
                    return
                seen += min(self.block_size, len(stream) - 1 - start)
                yield number, start

    def at(self, stream: int, start: int) -> np.ndarray:
        """The window at a place of `all_targets`, int32 [block_size + 1], filled up with `IGNORE`.

        Raises:
            UserError: it holds a token beyond the vocabulary, or cannot be read.
        """
        window = np.full(self.block_size + 1, IGNORE, dtype=np.int32)
        piece = self.streams[stream][start : start + self.block_size + 1]
        self._check(piece, self.names[stream])
        window[: len(piece)] = piece
        return window


class ShuffledWindows:
    """The endless sequence of training windows: number n is a pure function of (seed, n).

    Args:
        sources: each is visited epoch after epoch, each epoch in another order.
        weights: of the sources.
        seed: keys the orders.
    """

    def __init__(self, sources: Sequence[TokenWindows], weights: Sequence[float], seed: int) -> None:
        self.sources, self.seed, self._mixture = sources, seed, Mixture(weights)

    def __getitem__(self, number: np.ndarray) -> np.ndarray:
        """Sequences number `number`, int [n] -> int32 [n, block_size + 1]."""
        if len(self.sources) == 1:
            return self._windows(0, number)
        source_of, own = self._mixture.deal(number)
        out = np.empty((len(number), self.sources[0].block_size + 1), dtype=np.int32)
        for source in np.unique(source_of):
            rows = source_of == source
            out[rows] = self._windows(int(source), own[rows])
        return out

    def _windows(self, source: int, number: np.ndarray) -> np.ndarray:
        """A source's own sequences number `number`."""
        windows = self.sources[source]
        epochs, position = np.divmod(number, len(windows))
        index = np.empty_like(position)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            index[now] = permute(position[now], len(windows), self.seed + (source << 32), int(epoch))
        return windows[index]


Rows = Callable[[int], np.ndarray]  # Of so many sequences, the numbers of those that this process holds, in order.


class BatchSource:
    """Record k is this process's part of global batch k.

    Sequence s of micro-batch m is number m · (sequences per micro-batch) + s of its batch, whatever the number of
    processes and devices; only its own sequences are read.

    Args:
        sequences: of training windows.
        schedule: sequences per update.
        micro_batches: of each batch size, into how many micro-batches it is cut.
        rows: of a micro-batch, what this process holds.
    """

    def __init__(
        self,
        sequences: ShuffledWindows,
        schedule: BatchSchedule,
        micro_batches: dict[int, int],
        rows: Rows = np.arange,
    ) -> None:
        self.sequences, self.schedule, self.micro_batches, self.rows = sequences, schedule, micro_batches, rows

    def __len__(self) -> int:
        return 1 << 62  # epochs never end

    def __getitem__(self, update: int) -> np.ndarray:
        """int32 [micro_batches, rows of this process, block_size + 1]."""
        first, size = self.schedule.at(int(update))
        count = self.micro_batches[size]
        starts = np.arange(first, first + size, size // count)
        numbers = starts[:, None] + self.rows(size // count)
        windows = self.sequences[numbers.flatten()]
        return windows.reshape(*numbers.shape, windows.shape[-1])


def read_ahead(source: BatchSource, start: int, stop: int) -> grain.DatasetIterator[np.ndarray]:
    """The batches of updates `start` … `stop` − 1, two of them prefetched by one thread. Close it after use."""
    import grain

    records = grain.MapDataset.source(source)[start:stop]
    return iter(records.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def eval_batches(
    windows: TokenWindows, batch_size: int, limit: int = 0, rows: Rows = np.arange
) -> Iterator[np.ndarray]:
    """Batches that cover the windows in order, int32 [rows of this process, block_size + 1] of `batch_size` each.

    The last batch is filled up with windows of `IGNORE`, so that all have one shape. Only the windows of this
    process are read.
    """
    own = rows(batch_size)
    nothing = np.full(windows.block_size + 1, IGNORE, dtype=np.int32)
    places = windows.all_targets(limit)
    while batch := list(itertools.islice(places, batch_size)):
        yield np.stack([windows.at(*batch[row]) if row < len(batch) else nothing for row in own])
