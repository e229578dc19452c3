"""Searches for changes of a config that make its training step fit the memory of given devices.

Each attempt compiles the step. Progress goes to stderr.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Literal

import jax

from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import chip_of
from gpt2_jax.planning.estimate import Plan, TooLargeError, make_plan
from gpt2_jax.sharding import micro_batch_size

REMATS: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Change:
    """New values for keys of a config; None leaves a key unchanged. `str` gives the flags to type."""

    micro_batch_size: int | None = None
    remat: Literal["none", "dots", "full"] | None = None
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


def smallest_change(config: TrainConfig, devices: Sequence[jax.Device], where: str) -> Change | None:
    """The first change that makes a config fit: smaller micro-batches, then rematerialization, then sharding.

    Returns:
        None if nothing fits.
    """
    per_device = config.batch_size // len(devices)
    now = micro_batch_size(config.batch_size, config.micro_batch_size, len(devices))
    smallest = 1 if now > 1 else None
    changes = [Change(size) for size in _divisors(per_device) if size < now]
    if config.model.remat != "full":
        changes.append(Change(smallest, "full"))
    changes += [Change(fsdp=fsdp) for fsdp in reversed(_divisors(len(devices))) if fsdp > max(config.mesh.fsdp, 1)]
    if config.mesh.fsdp == 1 and len(devices) > 1:
        changes.append(Change(smallest, "full", len(devices)))
    for change in changes:
        print(f"trying {change}", file=sys.stderr)
        try:
            make_plan(change.apply(config), devices, where)
        except (TooLargeError, UserError):  # still too large, or a size of `fsdp` that does not map onto the slice
            continue
        return change
    return None


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
