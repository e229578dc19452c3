"""The order of the training sequences: pure functions of a seed and an index, the same on every machine.

Memory does not grow with the data, and the only state is one integer: the number of sequences consumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

FEISTEL_ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: its multiples are spread evenly
PERIOD = 1 << 16  # Sequences in which a mixture takes exact shares: weights are rounded to 1 / 65,536.


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of uint64; all bits affect all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Applies the permutation of 0 … size−1 that (seed, epoch) selects.

    The permutation is a Feistel network over the smallest even number of bits that can hold `size`. Results outside
    the range are encrypted again until they fall inside ("cycle walking", Black and Rogaway 2002). It needs no table.
    It is defined here because NumPy may change its random streams between versions, and a data order must not change.

    Args:
        index: int [n], positions in [0, size).
        size: number of items.
        seed: selects the orders of a run.
        epoch: selects one of them.

    Returns:
        int64 [n], the items at these positions, in [0, size).
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
    """The number of sequences in each update.

    Attributes:
        batch_size: sequences per update after the ramp.
        ramp: (until_tokens, size) pairs: updates have `size` sequences until `until_tokens` tokens are consumed.
        block_size: tokens per sequence.
    """

    batch_size: int
    ramp: tuple[tuple[int, int], ...]
    block_size: int

    def sizes(self) -> list[int]:
        """All batch sizes, in the order in which they are used."""
        return [size for _, size in self.ramp] + [self.batch_size]

    def tokens_after(self, updates: int) -> int:
        """The number of tokens that the first `updates` updates consume."""
        return self.at(updates)[0] * self.block_size

    def at(self, update: int) -> tuple[int, int]:
        """The number of sequences consumed before update `update` (0, 1, …), and the number that it consumes."""
        consumed = 0
        for until_tokens, size in self.ramp:
            left = max(until_tokens - consumed * self.block_size, 0)
            updates = -(-left // (size * self.block_size))  # the update that reaches `until_tokens` still has this size
            if update < updates:
                return consumed + update * size, size
            consumed, update = consumed + updates * size, update - updates
        return consumed + update * self.batch_size, self.batch_size


class Mixture:
    """Assigns sequences 0, 1, 2, … to sources in proportion to their weights, with each source's turns spread evenly.

    In every `PERIOD` sequences a source has the same number of turns: its weight, rounded by largest remainder, and at
    least one. So a table of one period is enough to look up the source of any sequence.

    Args:
        weights: one weight above 0 per source, in any unit.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [weight / sum(weights) * PERIOD for weight in weights]
        shares = [max(int(share), 1) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: (shares[source] - exact[source], source))
        for turn in range(abs(PERIOD - sum(shares))):
            if sum(shares) < PERIOD:
                shares[by_remainder[turn % len(shares)]] += 1
            else:  # compensates for sources that were rounded up to one turn
                shares[shares.index(max(shares))] -= 1
        # A source with s turns takes them at the fractions (1/2, 3/2, …) / s of the period.
        times = np.concatenate([(2 * np.arange(share) + 1) / (2 * share) for share in shares])
        source = np.repeat(np.arange(len(shares)), shares)
        index = np.concatenate([np.arange(share) for share in shares])
        order = np.argsort(times, kind="stable")
        self._source, self._index, self._shares = source[order], index[order], np.array(shares)

    def assign(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps sequences, int [n], to their sources, int64 [n], and their indices within the source, int64 [n]."""
        period, turn = np.divmod(sequence, PERIOD)
        source = self._source[turn]
        return source, period * self._shares[source] + self._index[turn]
