"""Which sequence comes when: pure functions of a seed and a number, the same on every machine.

Nothing here holds memory that grows with the data, and no state is kept: the position in the data is one integer,
the sequences consumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

FEISTEL_ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: multiples of it are spread evenly
PERIOD = 1 << 16  # Sequences after which a mixture has its shares exactly: weights are met to 1 / 65,536.


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
    key = _mix(np.array([seed * GOLDEN + epoch & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    keys = _mix(key + np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64) * np.uint64(GOLDEN))

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

    def tokens_after(self, updates: int) -> int:
        """Tokens consumed by the first `updates` updates."""
        return self.at(updates)[0] * self.block_size

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


class Mixture:
    """Deals sequences 0, 1, 2, … to sources by weight, each source's turns spread evenly.

    Of every `PERIOD` sequences each source gets the same whole number, its weight to 1 / PERIOD (the largest
    remainders are rounded up), at least one. So which sequence is whose, and how many of its own came before, is a
    table lookup.

    Args:
        weights: above 0, in any unit.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [weight / sum(weights) * PERIOD for weight in weights]
        shares = [max(int(share), 1) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: (shares[source] - exact[source], source))
        for index in range(abs(PERIOD - sum(shares))):
            if sum(shares) < PERIOD:
                shares[by_remainder[index % len(shares)]] += 1
            else:  # sources that were rounded up to one
                shares[shares.index(max(shares))] -= 1
        # A source with s turns takes them at (1/2, 3/2, …) / s of the period.
        times = np.concatenate([(2 * np.arange(share) + 1) / (2 * share) for share in shares])
        source = np.repeat(np.arange(len(shares)), shares)
        number = np.concatenate([np.arange(share) for share in shares])
        order = np.argsort(times, kind="stable")
        self._source, self._number, self._shares = source[order], number[order], np.array(shares)

    def deal(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sequence, int64 [n], and its number among that source's own, int64 [n]."""
        period, turn = np.divmod(sequence, PERIOD)
        source = self._source[turn]
        return source, period * self._shares[source] + self._number[turn]
