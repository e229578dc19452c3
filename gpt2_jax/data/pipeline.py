"""Batches of training and validation windows. Batch k is a pure function of (seed, k).

A stream of tokens is cut into windows of block_size + 1 tokens with stride block_size: the last token of a window is a
target there and the first input of the next window. Each epoch visits every window once, in a different order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt2_jax.config import IGNORE
from gpt2_jax.data.order import BatchSchedule, Mixture, permute
from gpt2_jax.data.shards import Tokens
from gpt2_jax.errors import UserError

if TYPE_CHECKING:  # Grain imports JAX, which takes a second that the data commands do not need
    import grain

MIN_TOKENS = 4  # With fewer, shorter windows are no help: there is too little to train on.
PEEK_TOKENS = 1 << 16  # Checked against the vocabulary before training starts: 128 KB of each file.


class TokenWindows:
    """Windows of block_size + 1 tokens over one or more streams. No window crosses from one stream to the next.

    Args:
        streams: the tokens.
        names: the names of the streams, for errors.
        block_size: predicted tokens per window.
        vocab_size: all tokens must be below it.
        document_start: the token that precedes each document. If given, a window moves forward to the first document
            start in its stride, unless it would then cross the end of its stream. So in an epoch some tokens are
            skipped and others are seen twice.

    Raises:
        UserError: every stream is shorter than a window, or a stream starts with a token beyond the vocabulary.
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
            smaller = f", or type --model.block_size {longest // 4}" if longest >= MIN_TOKENS else ""
            raise UserError(
                f"{', '.join(names)}: {longest:,} tokens are too few for one window of model.block_size + 1 = "
                f"{block_size + 1:,}; give more text{smaller}"
            )
        for stream, name in zip(streams, names, strict=True):
            self._check_vocabulary(stream[:PEEK_TOKENS], name)
        if len(dtypes := {stream.dtype for stream in streams}) > 1:
            raise UserError(
                f"{names[0]} and others hold {' and '.join(map(str, dtypes))}; give files with tokens of one type"
            )
        (self._dtype,) = dtypes
        self.n_tokens = sum(map(len, streams))
        # The index of the first window of each stream, then the number of windows.
        self._first_window = np.cumsum([0, *(max(len(stream) - 1, 0) // block_size for stream in streams)])

    def __len__(self) -> int:
        return int(self._first_window[-1])

    def _check_vocabulary(self, tokens: np.ndarray, name: str) -> None:
        if (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise UserError(
                f"{name} has the token {largest}, beyond model.vocab_size = {self.vocab_size}; it was made with "
                "another tokenizer"
            )

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Reads the windows with these indices, int [n] -> int32 [n, block_size + 1].

        Raises:
            UserError: a window holds a token beyond the vocabulary, or cannot be read.
        """
        stream_of, starts = self.locate(index)
        groups = _rows_of_each(stream_of)
        windows = np.empty((len(index), self.block_size + 1), self._dtype)
        for stream, rows in groups:
            self.streams[stream].read(starts[rows], windows, rows)
        if windows.max(initial=0) >= self.vocab_size:
            for stream, rows in groups:
                self._check_vocabulary(windows[rows], self.names[stream])
        return windows.astype(np.int32)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds the windows with these indices, int [n]: their streams, int [n], and their starts in them, int [n].

        Raises:
            UserError: a stream cannot be read, where `document_start` needs it.
        """
        stream_of = np.searchsorted(self._first_window, index, side="right") - 1
        starts = (index - self._first_window[stream_of]) * self.block_size
        if self.document_start is not None:
            for stream, rows in _rows_of_each(stream_of):
                starts[rows] = self._move_to_documents(self.streams[stream], starts[rows])
        return stream_of, starts

    def _move_to_documents(self, stream: Tokens, starts: np.ndarray) -> np.ndarray:
        """Moves each start to the first document start in its stride, if there is one and the window still fits."""
        strides = np.empty((len(starts), self.block_size), self._dtype)
        stream.read(starts, strides, np.arange(len(starts)))
        moved = starts + (strides == self.document_start).argmax(axis=1)
        return np.where(moved + self.block_size < len(stream), moved, starts)

    def positions(self, limit: int = 0) -> Iterator[tuple[int, int]]:
        """Yields (stream, start) of windows in order. Every token except the first of a stream is a target once.

        Args:
            limit: stop after this many targets, rounded up to a window; 0 for all.
        """
        seen = 0
        for number, stream in enumerate(self.streams):
            for start in range(0, len(stream) - 1, self.block_size):
                if limit and seen >= limit:
                    return
                seen += min(self.block_size, len(stream) - 1 - start)
                yield number, start

    def padded_window(self, stream: int, start: int) -> np.ndarray:
        """Reads the window at one of `positions`, int32 [block_size + 1], padded with `IGNORE` at the end of a stream.

        Raises:
            UserError: it holds a token beyond the vocabulary, or cannot be read.
        """
        window = np.full(self.block_size + 1, IGNORE, dtype=np.int32)
        tokens = self.streams[stream][start : start + self.block_size + 1]
        self._check_vocabulary(tokens, self.names[stream])
        window[: len(tokens)] = tokens
        return window


def _rows_of_each(numbers: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each different number in int [n], and the rows that have it, int [any]."""
    return [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]


@dataclasses.dataclass(frozen=True)
class Location:
    """The place of a training sequence.

    Attributes:
        source: the number of its source.
        stream: the number of its stream in the source.
        start: the number of tokens before it in the stream.
    """

    source: int
    stream: int
    start: int


class ShuffledWindows:
    """The endless sequence of training windows. Window n is a pure function of (seed, n).

    Args:
        sources: each is visited epoch after epoch, each epoch in a different order.
        weights: one weight per source.
        seed: selects the orders.
    """

    def __init__(self, sources: Sequence[TokenWindows], weights: Sequence[float], seed: int) -> None:
        self.sources, self.seed, self._mixture = sources, seed, Mixture(weights)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Reads the windows at these positions of the sequence, int [n] -> int32 [n, block_size + 1]."""
        parts = self._assign(index)
        if len(parts) == 1:
            source, _, own_index = parts[0]
            return self.sources[source][own_index]
        windows = np.empty((len(index), self.sources[0].block_size + 1), dtype=np.int32)
        for source, rows, own_index in parts:
            windows[rows] = self.sources[source][own_index]
        return windows

    def locate(self, index: np.ndarray) -> list[Location]:
        """Finds the windows at these positions of the sequence, int [n].

        Raises:
            UserError: as `TokenWindows.locate`.
        """
        places = np.empty((len(index), 3), dtype=np.int64)
        for source, rows, own_index in self._assign(index):
            places[rows] = np.stack([np.full(len(rows), source), *self.sources[source].locate(own_index)], axis=1)
        return [Location(*place) for place in places.tolist()]

    def _assign(self, index: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Each source, the rows of `index` that it fills, int [any], and the index of its window for each of them."""
        source_of, own_index = self._mixture.assign(index)
        groups = _rows_of_each(source_of)
        return [(source, rows, self._shuffle(source, own_index[rows])) for source, rows in groups]

    def _shuffle(self, source: int, index: np.ndarray) -> np.ndarray:
        """The windows of one source at these positions, which count its windows over all epochs, int [n] -> int [n]."""
        size = len(self.sources[source])
        epochs, positions = np.divmod(index, size)
        shuffled = np.empty_like(positions)
        for epoch, rows in _rows_of_each(epochs):
            shuffled[rows] = permute(positions[rows], size, self.seed + (source << 32), epoch)
        return shuffled


LocalRows = Callable[[int], np.ndarray]
"""Maps a batch size to the indices of the sequences that this process loads, int [n], ascending."""


class BatchSource:
    """The batches of a run: item k is this process's part of global batch k.

    Sequence s of micro-batch m is sequence m · (sequences per micro-batch) + s of its batch, for any number of
    processes and devices. A process reads only its own sequences.

    Args:
        sequences: the training windows.
        schedule: sequences per update.
        num_micro_batches: the number of micro-batches for each batch size.
        local_rows: selects this process's sequences of a micro-batch; by default all.
    """

    def __init__(
        self,
        sequences: ShuffledWindows,
        schedule: BatchSchedule,
        num_micro_batches: dict[int, int],
        local_rows: LocalRows = np.arange,
    ) -> None:
        self.sequences, self.schedule = sequences, schedule
        self.num_micro_batches, self.local_rows = num_micro_batches, local_rows

    def __len__(self) -> int:
        return 1 << 62  # there is no last epoch

    def __getitem__(self, update: int) -> np.ndarray:
        """int32 [micro_batches, sequences of this process, block_size + 1]."""
        index = self._index(update)
        windows = self.sequences[index.flatten()]
        return windows.reshape(*index.shape, windows.shape[-1])

    def locate(self, update: int) -> list[Location]:
        """Finds the sequences of `self[update]`, micro-batch after micro-batch.

        Raises:
            UserError: as `TokenWindows.locate`.
        """
        return self.sequences.locate(self._index(update).flatten())

    def _index(self, update: int) -> np.ndarray:
        """The positions of the sequences in the order of the run, int [micro_batches, sequences of this process]."""
        first, size = self.schedule.at(int(update))
        micro_batch = size // self.num_micro_batches[size]
        starts = np.arange(first, first + size, micro_batch)
        return starts[:, None] + self.local_rows(micro_batch)


def read_ahead(source: BatchSource, start: int, stop: int) -> grain.DatasetIterator[np.ndarray]:
    """Iterates over the batches of updates `start` … `stop` − 1. A Grain thread prefetches two. Close the iterator."""
    import grain

    records = grain.MapDataset.source(source)[start:stop]
    return iter(records.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def eval_batches(
    windows: TokenWindows, batch_size: int, limit: int = 0, local_rows: LocalRows = np.arange
) -> Iterator[np.ndarray]:
    """Yields batches that cover the windows in order, int32 [sequences of this process, block_size + 1].

    A process reads only its own windows. The last batch is padded with windows of `IGNORE` to the shape of the others.

    Args:
        windows: the windows to evaluate.
        batch_size: global sequences per batch.
        limit: stop after this many targets, rounded up to a window; 0 for all.
        local_rows: selects this process's sequences of a batch; by default all.
    """
    rows = local_rows(batch_size)
    padding = np.full(windows.block_size + 1, IGNORE, dtype=np.int32)
    positions = windows.positions(limit)
    while batch := list(itertools.islice(positions, batch_size)):
        yield np.stack([windows.padded_window(*batch[row]) if row < len(batch) else padding for row in rows])
