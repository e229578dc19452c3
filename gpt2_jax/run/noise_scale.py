"""The gradient noise scale: the batch size above which more sequences help little (McCandlish et al. 2018, arXiv
1812.06162, appendix A.1).

A gradient over b sequences has the expected squared norm |G|² + tr(Σ)/b: the true gradient, and noise that falls with
b. An update knows it for two sizes: the micro-batches of its devices, and all of them together. So both terms follow,
without bias, and their ratio tr(Σ)/|G|² is the simple noise scale. With batches of that many sequences, training takes
about twice the updates that it takes with the largest batches, and twice the sequences that it takes with the smallest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import UserError

SHARE = 0.05  # of the rows: both terms are means over so many before their ratio is taken
MIN_ROWS = 20  # of an estimate


def check_several_gradients(config: TrainConfig, gradients: Mapping[int, int]) -> None:
    """Checks that each update has several gradients to compare, if `log.noise_scale` is set.

    Args:
        config: of the run.
        gradients: the number of micro-batches on all devices of `data`, by the batch size.

    Raises:
        UserError: an update has one.
    """
    if config.log.noise_scale and (size := next((size for size, count in gradients.items() if count < 2), None)):
        raise UserError(
            f"log.noise_scale compares gradients of micro-batches and devices, and a batch of {size} sequences has one "
            f"here; type --micro_batch_size {max(1, size // 2)} or less"
        )


def noise_columns(micro_grad_norm: float, sequences: int, gradients: int) -> dict[str, float]:
    """The keys of a row from which the noise scale follows.

    Args:
        micro_grad_norm: the root mean square of the norms of the gradients that an update averages.
        sequences: of the update.
        gradients: how many it averages.
    """
    return {"micro_grad_norm": micro_grad_norm, "sequences": sequences, "micro_sequences": sequences // gradients}


class NoiseScale(NamedTuple):
    """The estimate over a run: float64 arrays of equal length."""

    tokens: np.ndarray
    sequences: np.ndarray
    """Of the updates."""
    critical: np.ndarray
    """The noise scale, in sequences; not a number where noise hides the gradient."""


def estimate(
    tokens: np.ndarray, grad_norm: np.ndarray, micro_grad_norm: np.ndarray, sequences: np.ndarray, micro: np.ndarray
) -> NoiseScale | None:
    """The noise scale from the rows of a run; None for fewer than `MIN_ROWS`.

    Args:
        tokens, grad_norm, micro_grad_norm, sequences: columns of the rows.
        micro: the column `micro_sequences`.
    """
    if len(tokens) < MIN_ROWS:
        return None
    large, small = grad_norm**2, micro_grad_norm**2
    signal = (sequences * large - micro * small) / (sequences - micro)
    noise = (small - large) / (1 / micro - 1 / sequences)
    width = max(MIN_ROWS, round(SHARE * len(tokens)))
    signal, noise, tokens, sequences = (_means(column, width) for column in (signal, noise, tokens, sequences))
    critical = np.divide(noise, signal, out=np.full(len(noise), np.nan), where=signal > 0)
    return NoiseScale(tokens, sequences, critical)


def _means(column: np.ndarray, width: int) -> np.ndarray:
    """The mean of each stretch of `width` values, one after the other. The last one may be up to twice as long."""
    starts = np.arange(0, max(1, len(column) // width) * width, width)
    return np.add.reduceat(column, starts) / np.diff([*starts, len(column)])


def propose_ramp(found: NoiseScale, batch_size: int) -> list[tuple[int, int]]:
    """A `batch_ramp`: halves of the batch size as long as they are not below the noise scale.

    Args:
        found: the noise scale of a run of the same model on the same data.
        batch_size: at the end of the ramp, in sequences.

    Returns:
        Pairs of tokens and sequences: until so many tokens, batches have so many sequences. Empty if the noise scale is
        above `batch_size` from the start.
    """
    critical = np.maximum.accumulate(np.nan_to_num(found.critical, nan=0.0))  # it grows; the estimate is noisy
    ramp: list[tuple[int, int]] = []
    halves = [batch_size]
    while halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    for half in reversed(halves[1:]):
        reached = np.flatnonzero(critical >= 2 * half)
        until = int(found.tokens[reached[0]] if len(reached) else found.tokens[-1])
        if reached.size and reached[0] == 0:
            continue
        if not ramp or until > ramp[-1][0]:
            ramp.append((until, half))
        if not reached.size:
            break
    return ramp


def describe_ramp(found: NoiseScale | None, run: Path, batch_size: int) -> list[str]:
    """Lines about the noise scale of a run, with the `batch_ramp` that it proposes.

    Raises:
        UserError: the run did not measure it.
    """
    if found is None or np.isnan(found.critical).all():
        raise UserError(
            f"{run} has too few rows of the noise scale; train it with --log.noise_scale true --log.every 1"
        )
    known = found.critical[~np.isnan(found.critical)]
    lines = [
        f"{'noise':12}a scale of {known[0]:.3g} sequences at the start, {known[-1]:.3g} at the end; batches have "
        f"{found.sequences[-1]:.0f}"
    ]
    ramp = propose_ramp(found, batch_size)
    if not ramp:
        return [*lines, f"{'ramp':12}none: batches of {batch_size} sequences are worth it from the start"]
    words = " ".join(f"{tokens} {sequences}" for tokens, sequences in ramp)
    return [*lines, f"{'ramp':12}type --batch_ramp {words}"]
