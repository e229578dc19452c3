"""Searches for changes of a config that make its training step fit the memory of given devices.

Each attempt compiles the step. Progress goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax

from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import chip_of
from gpt2_jax.planning.estimate import Memory, Plan, TooLargeError, make_plan
from gpt2_jax.planning.micro_batch import REMATS, Change, largest_fit
from gpt2_jax.sharding import micro_batch_size


def smallest_change(config: TrainConfig, devices: Sequence[jax.Device], memory: Memory) -> Change | None:
    """The first change that makes a config fit: smaller micro-batches, then rematerialization, then sharding.

    Args:
        config: validated. "auto" stands for the settings that need the least memory.
        memory: what the config requires on each device, and what there is.

    Returns:
        None if nothing fits.
    """
    assert memory.available
    open_keys = config.micro_batch_size == "auto", config.model.remat == "auto"
    config = Change(1 if open_keys[0] else None, "full" if open_keys[1] else None).apply(config)
    now, remat = micro_batch_size(config.batch_size, config.micro_batch_limit, len(devices)), config.model.remat
    sizes = [size for size in _divisors(config.batch_size // len(devices)) if size <= now]
    remats = REMATS[REMATS.index(remat) :]
    larger = [fsdp for fsdp in reversed(_divisors(len(devices))) if fsdp > config.mesh.fsdp > 0]
    for fsdp in (None, *larger):
        changed, known = Change(fsdp=fsdp).apply(config), {} if fsdp else {(remat, now): memory}
        try:
            fit = largest_fit(changed, devices, memory.available, sizes, remats, _to_stderr, known)
        except (TooLargeError, UserError):  # still too large, or a size of `fsdp` that does not map onto the slice
            continue
        return Change(fit.micro_batch_size if fit.micro_batch_size != now else None,
                      fit.remat if fit.remat != remat else None, fsdp)  # fmt: skip
    return None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def fastest_change(config: TrainConfig, devices: Sequence[jax.Device], where: str) -> tuple[Change, Plan]:
    """The micro-batch size and rematerialization with the least estimated time, among those that fit.

    A larger micro-batch never takes longer, so for each rematerialization policy the largest one that fits is found by
    bisection.

    Raises:
        UserError: nothing fits, or the chip's figures are unknown.
    """
    if chip_of(devices[0]) is None:
        raise UserError(
            f"--find compares estimated times, and the speed of {where} is unknown; give a known chip, such as "
            "--topology v5e:4x4"
        )
    best: tuple[float, Change, Plan] | None = None
    sizes = _divisors(max(config.batch_size // len(devices), 1))
    for remat in REMATS:
        low, high = 0, len(sizes)  # sizes[:low] do not fit, sizes[high:] do
        while low < high:
            middle = (low + high) // 2
            change = Change(sizes[middle], remat)
            try:
                plan = make_plan(change.apply(config), devices, where)
            except TooLargeError as error:
                low = middle + 1
                print(f"{change!s:45}does not fit: {error.memory}", file=sys.stderr)
                continue
            high = middle
            assert plan.estimate is not None
            print(f"{change!s:45}{plan.memory}, {plan.estimate}", file=sys.stderr)
            if best is None or plan.estimate.upper_bound < best[0]:
                best = plan.estimate.upper_bound, change, plan
    if best is None:
        raise UserError(
            f"nothing fits on {where}, not even micro-batches of one sequence; type --mesh.data 1 --mesh.fsdp -1"
        )
    return best[1:]


def _divisors(number: int) -> list[int]:
    """The divisors of a number, largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]
