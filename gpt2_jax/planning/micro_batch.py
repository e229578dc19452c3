"""Finds the largest micro-batch that fits, with the least rematerialization: `micro_batch_size = "auto"`.

The compiler says what a program requires. A formula chooses what to compile first, and what was compiled corrects it:
memory is nearly linear in the micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.config import GPT2Config, Remat, TrainConfig
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.hardware import hardware_of
from gpt2_jax.planning.estimate import Memory, TooLargeError, compile_step
from gpt2_jax.resolve import resolve
from gpt2_jax.sharding import make_mesh, num_micro_batches

REMATS: tuple[Remat, ...] = ("none", "dots", "full")
USABLE = 0.95  # of the memory: the allocator of a device does not fill it without gaps
MAX_COMPILATIONS = 3

# Tokens per device and forward pass from which a larger micro-batch is less than 1% faster. Accumulation moves 12 bytes
# per parameter for each micro-batch: it reads the gradient, and reads and writes the sum. The matmuls take 6 FLOPs per
# parameter and token. At half of the peak, an H100 (3.35 TB/s, 989 TFLOP/s) takes 100 times as long for the matmuls
# from 30,000 tokens on, a T4 from 20,000 on, and a CPU with 20 GB/s and 0.5 TFLOP/s from 5,000 on.
_ENOUGH_TOKENS, _ENOUGH_TOKENS_ON_CPU = 2**15, 2**12

# Arrays [tokens, n_embd] that the backward pass of a block needs from the forward pass. Korthikanti et al. 2022 count
# 34 bytes per element for all, in 16 bits. Saved matmuls are q, k, v, two projections and the four of the MLP.
_SAVED_ARRAYS = {"none": 17, "dots": 10, "full": 1}
_SAVED_SCORES = 2.5  # arrays [heads, time, time] per sequence, by the same count, of attention that stores them
_SAFE = 0.9  # of the memory: all that the last compilation may be expected to need, if nothing has fit before
_FORMULA_OFF = 0.3  # of what a program requires: tests/planning/test_micro_batch.py
_STATE = 12  # bytes per parameter: parameters and two moments
_WORK = 8  # bytes per parameter: the gradient, and its sum over micro-batches
_LOGITS = 4  # bytes per logit of a chunk


@dataclasses.dataclass(frozen=True)
class Change:
    """New values for keys of a config; None leaves a key unchanged. `str` gives the flags to type."""

    micro_batch_size: int | None = None
    remat: Remat | None = None
    fsdp: int | None = None

    def apply(self, config: TrainConfig) -> TrainConfig:
        """`config` with this change."""
        if self.micro_batch_size is not None:
            config = dataclasses.replace(config, micro_batch_size=self.micro_batch_size)
        if self.remat is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=self.remat))
        if self.fsdp is not None:
            config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=-1, fsdp=self.fsdp))
        return config

    def __str__(self) -> str:
        flags = {
            "--micro_batch_size": self.micro_batch_size,
            "--model.remat": self.remat,
            "--mesh.data -1 --mesh.fsdp": self.fsdp,
        }
        return " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)


class Fit(NamedTuple):
    """Settings that fit, the memory of their program, and the number of compilations that it took to find them."""

    micro_batch_size: int
    remat: Remat
    memory: Memory
    compilations: int

    def apply(self, config: TrainConfig) -> TrainConfig:
        """`config` with these settings."""
        return Change(self.micro_batch_size, self.remat).apply(config)


Measured = dict[tuple[Remat, int], Memory]  # by rematerialization and micro-batch size


def is_open(config: TrainConfig) -> bool:
    """True if the config leaves the micro-batch size or the rematerialization to the device's memory."""
    return config.micro_batch_size == "auto" or config.model.remat == "auto"


def fit(config: TrainConfig, devices: Sequence[jax.Device], available: int | None, note: Callable[[str], None]) -> Fit:
    """The values for "auto" in a config, the other ones as they are.

    Raises:
        TooLargeError: not even micro-batches of one sequence fit.
        UserError: as `compile_step`.
    """
    automatic = config.micro_batch_size == "auto"
    sizes = _sizes(config, devices) if automatic else [config.micro_batch_limit]
    remats: tuple[Remat, ...] = (config.model.remat,)
    if config.model.remat == "auto":
        # Scanned layers without rematerialization store and read so much that "dots" is estimated to be faster.
        remats = REMATS[1:] if config.model.scan_layers else REMATS
    if not available:  # unknown
        return Fit(sizes[0], remats[0], Memory(0, None), 0)
    return largest_fit(config, devices, available, sizes, remats, note)


def largest_fit(
    config: TrainConfig,
    devices: Sequence[jax.Device],
    available: int,
    sizes: Sequence[int],
    remats: Sequence[Remat],
    note: Callable[[str], None],
    known: Measured | None = None,
) -> Fit:
    """The largest of some micro-batch sizes with the first of some rematerializations with which one fits.

    It compiles at most three programs, and more only until one fits.

    Args:
        config: validated.
        devices: attached ones, or those of `topologies.devices_of`.
        available: bytes on each device.
        sizes: micro-batch sizes, largest first.
        remats: rematerializations, the least first.
        note: is called with a line for each program that is compiled.
        known: what some settings require, if that is known.

    Raises:
        TooLargeError: nothing fits.
        UserError: as `compile_step`.
    """
    resolved, choice = resolve(config, hardware_of(devices[0]))
    itemsize, fsdp = jnp.dtype(resolved.dtype).itemsize, make_mesh(config.mesh, devices).shape["fsdp"]
    formulas = {remat: formula(config.model, remat, itemsize, fsdp, choice.backend == "xla") for remat in remats}
    limit = int(USABLE * available)
    measured = dict(known or {})
    compilations = 0
    while True:
        found = [key for key, memory in measured.items() if memory.fits]
        is_last = compilations == MAX_COMPILATIONS - 1 and not found
        best = _most_promising(sizes, formulas, measured, int(_SAFE * limit) if is_last else limit)
        if best in measured or (compilations >= MAX_COMPILATIONS and found):
            break
        remat, size = best
        try:
            memory = compile_step(Change(size, remat).apply(config), devices, limit).memory
        except TooLargeError as error:
            memory = error.memory
        measured[best], compilations = memory, compilations + 1
        note(f"micro-batches of {size}, remat {remat}: {memory}, {'fits' if memory.fits else 'does not fit'}")
    if not found:
        raise TooLargeError(measured[best])
    remat, size = min(found, key=lambda key: (remats.index(key[0]), -key[1]))
    return Fit(size, remat, Memory(measured[remat, size].required, available), compilations)


def _most_promising(
    sizes: Sequence[int],
    formulas: dict[Remat, tuple[float, float]],
    measured: Measured,
    limit: int,
) -> tuple[Remat, int]:
    """The settings to compile next; those that were compiled already, once nothing better is expected to fit."""
    off = _last_over_formula(formulas, measured)
    for remat, (fixed, per_sequence) in formulas.items():
        known = {size: memory for (other, size), memory in measured.items() if other == remat}
        expected = (fixed, per_sequence) if known else (off * fixed, off * per_sequence)
        too_large = min((size for size, memory in known.items() if not memory.fits), default=sizes[0] + 1)
        for size in sizes:
            if size < too_large and (size in known or _expected(size, expected, known) <= limit):
                return remat, size
        # No size is expected to fit. Memory may fall in proportion to the size, but not faster: then try the smallest.
        if known and too_large > sizes[-1] and sizes[-1] / too_large * known[too_large].required <= limit:
            return remat, sizes[-1]
    return remat, sizes[-1]


def _last_over_formula(formulas: dict[Remat, tuple[float, float]], measured: Measured) -> float:
    """What the program that was compiled last requires, over what its formula says; 1 before any is compiled.

    Within the limits of what the formulas are off by together. What exceeds them tells nothing about the others.
    """
    for (remat, size), memory in reversed(measured.items()):
        fixed, per_sequence = formulas[remat]
        return min(max(memory.required / (fixed + per_sequence * size), 1 - _FORMULA_OFF), 1 + _FORMULA_OFF)
    return 1.0


def _expected(size: int, by_formula: tuple[float, float], known: dict[int, Memory]) -> float:
    """Bytes that the step is expected to require on one device, by the formula and by what was compiled.

    With one compiled program the slope may be the formula's, or such that the formula's `fixed` is right. The one that
    expects less memory counts: what was expected to fit is compiled, what was not would never be found.
    """
    fixed, per_sequence = by_formula
    if not known:
        return fixed + per_sequence * size
    nearest, *others = sorted(known, key=lambda other: abs(other - size))
    required = known[nearest].required
    if others:
        per_sequence = (required - known[others[0]].required) / (nearest - others[0])
    else:
        slopes = per_sequence, (required - fixed) / nearest
        per_sequence = max(slopes) if size < nearest else max(min(slopes), 0.0)
    return required + per_sequence * (size - nearest)


def formula(model: GPT2Config, remat: Remat, itemsize: int, fsdp: int, stores_scores: bool) -> tuple[float, float]:
    """Bytes on one device that do not depend on the micro-batch, and bytes per sequence.

    Args:
        itemsize: bytes of an activation.
        fsdp: devices that share one copy of the parameters.
        stores_scores: attention keeps its weights for the backward pass.
    """
    vocab, time = model.vocab_size or GPT2Config.vocab_size, model.block_size
    parameters = (12 * model.n_layer * model.n_embd + vocab + time) * model.n_embd
    scores = _SAVED_SCORES * model.n_head * time * time if stores_scores else 0.0
    whole_block = _SAVED_ARRAYS["none"] * time * model.n_embd + scores  # also what one block recomputes
    saved = whole_block if remat == "none" else _SAVED_ARRAYS[remat] * time * model.n_embd
    logits = _LOGITS * vocab * (model.loss_chunk or time)
    fixed, per_sequence = parameters * (_STATE + _WORK) / fsdp, (model.n_layer * saved + whole_block) * itemsize
    return (fixed + logits, per_sequence) if model.loss_chunk else (fixed, per_sequence + logits)


def _sizes(config: TrainConfig, devices: Sequence[jax.Device]) -> list[int]:
    """Micro-batch sizes that divide each device's share of every batch, largest first, up to `_ENOUGH_TOKENS`.

    Raises:
        UserError: a batch does not divide over the devices.
    """
    mesh = make_mesh(config.mesh, devices)
    batches = BatchSchedule(config.batch_size, config.batch_ramp, config.model.block_size).sizes()
    shares = [num_micro_batches(batch, 1, mesh) for batch in batches]
    enough = _ENOUGH_TOKENS_ON_CPU if devices[0].platform == "cpu" else _ENOUGH_TOKENS
    most = max(enough // config.model.block_size, 1)
    largest = min(most, max(shares))
    return [size for size in range(largest, 0, -1) if all(share % min(size, share) == 0 for share in shares)]
