"""From token streams to batches: batch k is a pure function of (seed, k), read ahead by one Grain thread.

A stream is cut into windows of block_size + 1 tokens with stride block_size (the last token of one is the
first of the next: it is a target there and an input here). Each epoch visits every window once, in an order
of its own. The position in the data is one integer, the sequences consumed: nothing else is saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from gpt2_jax.config import UserError
from gpt2_jax.loss import IGNORE

FEISTEL_ROUNDS = 6
PEEK_TOKENS = 1 << 16  # Checked against the vocabulary before anything starts: 128 KB of each file.


# --- order ---------------------------------------------------------------------------------------------


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of uint64 in which every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where positions 0 … size−1 of an epoch point to: a permutation keyed by (seed, epoch).

    A Feistel network over the smallest even number of bits that holds `size`, walked along its cycles until
    it lands inside (Black and Rogaway 2002). It needs no table, and it is this project's own definition: NumPy
    does not promise its random streams across versions, and a data order must outlive them.

    Args:
        index: int [n], positions, each in [0, size).

    Returns:
        int64 [n], each in [0, size).
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    golden = 0x9E3779B97F4A7C15
    key = _mix(np.array([seed * golden + epoch & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    keys = _mix(key + np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64) * np.uint64(golden))

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << half) | right

    result = encrypt(index.astype(np.uint64))
    while (outside := result >= size).any():
        result[outside] = encrypt(result[outside])
    return result.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Sequences per update: `batch_size`, after the smaller batches of a ramp over tokens."""

    batch_size: int
    ramp: tuple[tuple[int, int], ...]
    block_size: int

    def sizes(self) -> list[int]:
        """All batch sizes that occur, in order."""
        return [size for _, size in self.ramp] + [self.batch_size]

    def at(self, update: int) -> tuple[int, int]:
        """Of update 0, 1, …: sequences consumed before it, and its own sequences."""
        consumed = 0
        for until_tokens, size in self.ramp:
            left = max(until_tokens - consumed * self.block_size, 0)
            updates = -(-left // (size * self.block_size))  # the update that reaches the mark still has this size
            if update < updates:
                return consumed + update * size, size
            consumed, update = consumed + updates * size, update - updates
        return consumed + update * self.batch_size, self.batch_size


# --- windows -------------------------------------------------------------------------------------------


class Windows:
    """Windows of block_size + 1 tokens over one or more streams; none crosses from one stream to the next.

    Args:
        streams: uint16 [tokens] each, in memory or memory-mapped.
        names: of the streams, for errors.
        block_size: predicted tokens per window.
        vocab_size: tokens must be below it.

    Raises:
        UserError: no stream is as long as a window, or one starts with a token beyond the vocabulary.
    """

    def __init__(self, streams: Sequence[np.ndarray], names: Sequence[str], block_size: int, vocab_size: int) -> None:
        self.streams, self.names, self.block_size, self.vocab_size = streams, names, block_size, vocab_size
        longest = max(map(len, streams))
        if longest <= block_size:
            raise UserError(
                f"{', '.join(names)}: {longest:,} tokens are too few for one window of model.block_size + 1 = "
                f"{block_size + 1:,}; give more text, or type --model.block_size {max(longest // 4, 1)}"
            )
        for stream, name in zip(streams, names, strict=True):
            self._check(stream[:PEEK_TOKENS], name)
        self.n_tokens = sum(map(len, streams))
        self._views = [
            np.lib.stride_tricks.sliding_window_view(stream, block_size + 1)[::block_size]
            if len(stream) > block_size
            else np.empty((0, block_size + 1), dtype=np.uint16)
            for stream in streams
        ]
        self._starts = np.cumsum([0, *map(len, self._views)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _check(self, tokens: np.ndarray, name: str) -> None:
        if (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise UserError(
                f"{name} has the token {largest}, beyond model.vocab_size = {self.vocab_size}; it was made with "
                "another tokenizer"
            )

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Windows number `index`, int [n] -> int32 [n, block_size + 1].

        Raises:
            UserError: one holds a token beyond the vocabulary.
        """
        stream_of = np.searchsorted(self._starts, index, side="right") - 1
        out = np.empty((len(index), self.block_size + 1), dtype=np.int32)
        for stream in np.unique(stream_of):
            rows = stream_of == stream
            windows = self._views[stream][index[rows] - self._starts[stream]]
            self._check(windows, self.names[stream])
            out[rows] = windows
        return out

    def all_targets(self, limit: int = 0) -> Iterator[np.ndarray]:
        """Every window in order, int32 [block_size + 1], the last of each stream filled up with `IGNORE`.

        Every token but the first of each stream is a target exactly once. `limit` stops after that many
        targets (rounded up to a window); 0 means all.
        """
        seen = 0
        for stream, name in zip(self.streams, self.names, strict=True):
            for start in range(0, len(stream) - 1, self.block_size):
                if limit and seen >= limit:
                    return
                window = np.full(self.block_size + 1, IGNORE, dtype=np.int32)
                piece = stream[start : start + self.block_size + 1]
                self._check(piece, name)
                window[: len(piece)] = piece
                seen += len(piece) - 1
                yield window


class TrainBatches(grain.sources.RandomAccessDataSource):
    """Record k is this process's slice of global batch k, whatever the number of processes.

    Args:
        windows: the training windows.
        schedule: sequences per update.
        micro_batches: of each batch size, into how many micro-batches it is cut.
        seed: keys the order.
        process: (index, count) of this process.
    """

    def __init__(
        self,
        windows: Windows,
        schedule: BatchSchedule,
        micro_batches: dict[int, int],
        seed: int,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.windows, self.schedule, self.micro_batches = windows, schedule, micro_batches
        self.seed, self.process = seed, process

    def __len__(self) -> int:
        return 1 << 62  # epochs never end

    def __getitem__(self, update: int) -> np.ndarray:
        """int32 [micro_batches, sequences / micro_batches / processes, block_size + 1]."""
        first, size = self.schedule.at(int(update))
        index, count = self.process
        share = size // count
        sequence = np.arange(first + index * share, first + (index + 1) * share)
        epochs, position = np.divmod(sequence, len(self.windows))
        where = np.empty_like(sequence)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            where[rows] = permute(position[rows], len(self.windows), self.seed, int(epoch))
        return self.windows[where].reshape(self.micro_batches[size], -1, self.windows.block_size + 1)


def read_ahead(source: TrainBatches, start: int, stop: int) -> grain.DatasetIterator[np.ndarray]:
    """The batches of updates `start` … `stop` − 1, two of them prefetched by one thread. Close it after use."""
    records = grain.MapDataset.source(source)[start:stop]
    return iter(records.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def eval_batches(
    windows: Windows, batch_size: int, limit: int = 0, process: tuple[int, int] = (0, 1)
) -> Iterator[np.ndarray]:
    """Batches that cover the windows in order, int32 [batch_size / processes, block_size + 1] for this process.

    The last batch is filled up with windows of `IGNORE`, so that all have one shape.
    """
    index, count = process
    share = batch_size // count
    rows: list[np.ndarray] = []
    for window in windows.all_targets(limit):
        rows.append(window)
        if len(rows) == batch_size:
            yield np.stack(rows[index * share : (index + 1) * share])
            rows = []
    if rows:
        rows += [np.full(windows.block_size + 1, IGNORE, dtype=np.int32)] * (batch_size - len(rows))
        yield np.stack(rows[index * share : (index + 1) * share])
