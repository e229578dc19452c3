"""What a config will do on chips that need not be there: `python -m gpt2_jax.plan --config NAME --topology v5e:4x4`.

Says what `cost.py` reads from the compiled program, and looks for what fits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gpt2_jax.cli import run_command
from gpt2_jax.config import TrainConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.display import duration, si
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import chip_of
from gpt2_jax.planning.estimate import Estimate, Memory, Plan, TooLargeError, make_plan
from gpt2_jax.planning.topologies import devices_of
from gpt2_jax.sharding import micro_batch_size

PROG = "python -m gpt2_jax.plan"
GIB = 2.0**30
REMATS = ("none", "dots", "full")
FLAGS = """
  --topology T   v5e:4x4, v5p:2x2x4, v6e:2x4, h100:8, cpu:8 and the like; without it the devices of this machine
  --find         look for the micro-batch size and the rematerialisation that take the least time and fit
  --json         everything, for programs
"""


def with_changes(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`config` with other values; `remat` and `fsdp` are those of its sections."""
    remat, fsdp = changes.pop("remat", None), changes.pop("fsdp", None)
    if remat:
        changes["model"] = dataclasses.replace(config.model, remat=remat)
    if fsdp:
        changes["mesh"] = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp)
    return dataclasses.replace(config, **changes)


def _divisors(number: int) -> list[int]:
    """In falling order."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def smallest_change(config: TrainConfig, devices: Sequence[jax.Device], where: str) -> str | None:
    """Flags that make a config fit which does not: smaller micro-batches, then recomputation, then splitting."""
    per_device = config.batch_size // len(devices)
    now = micro_batch_size(config.batch_size, config.micro_batch_size, len(devices))
    changes: list[dict[str, Any]] = [{"micro_batch_size": size} for size in _divisors(per_device) if size < now]
    smallest = {"micro_batch_size": 1} if now > 1 else {}
    if config.model.remat != "full":
        changes.append({**smallest, "remat": "full"})
    changes += [{"fsdp": fsdp} for fsdp in reversed(_divisors(len(devices))) if fsdp > max(config.mesh.fsdp, 1)]
    if config.mesh.fsdp == 1 and len(devices) > 1:
        changes.append({**smallest, "remat": "full", "fsdp": len(devices)})
    for change in changes:
        print(f"trying {_as_flags(change)}", file=sys.stderr)
        try:
            make_plan(with_changes(config, **change), devices, where)
        except TooLargeError:
            continue
        return _as_flags(change)
    return None


def _as_flags(change: dict[str, Any]) -> str:
    keys = {"remat": "model.remat", "fsdp": "mesh.data -1 --mesh.fsdp"}
    return " ".join(f"--{keys.get(key, key)} {value}" for key, value in change.items())


def find(config: TrainConfig, devices: Sequence[jax.Device], where: str) -> tuple[str, Plan]:
    """The flags, of micro-batch size and rematerialisation, with the least estimated time of all that fits.

    Of each policy the largest micro-batch that fits is searched by bisection: larger ones never take longer.

    Raises:
        UserError: nothing fits, or there is nothing to estimate by.
    """
    if chip_of(devices[0]) is None:
        raise UserError(f"--find compares estimates, and nothing is known of {where}; give --topology v5e:4x4, say")
    best: tuple[str, Plan] | None = None
    for remat in REMATS:
        sizes, plan = _divisors(config.batch_size // len(devices)), None
        low, high = 0, len(sizes)  # sizes[:low] do not fit, sizes[high:] do
        while low < high:
            middle = (low + high) // 2
            change = {"micro_batch_size": sizes[middle], "remat": remat}
            try:
                plan = make_plan(with_changes(config, **change), devices, where)
            except TooLargeError as error:
                low = middle + 1
                print(f"{_as_flags(change):45}does not fit: {_gib(error.memory)}", file=sys.stderr)
                continue
            high = middle
            assert plan.estimate is not None
            print(f"{_as_flags(change):45}{_gib(plan.memory)}, {_milliseconds(plan.estimate)}", file=sys.stderr)
            if best is None or best[1].estimate is None or plan.estimate.most < best[1].estimate.most:
                best = _as_flags(change), plan
    if best is None:
        raise UserError(f"nothing fits on {where}, not even micro-batches of one; type --mesh.data 1 --mesh.fsdp -1")
    return best


# --- the command -----------------------------------------------------------------------------------------------


def main(args: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--topology", default="")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--find", action="store_true")
    try:
        flags, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; such as --topology v5e:4x4") from error
    config = parse_args(PROG, f"What a config will do, on chips that need not be there.\n{FLAGS}", rest)
    devices = devices_of(flags.topology) if flags.topology else jax.devices()
    where = flags.topology or f"this machine's {len(devices)} × {devices[0].device_kind}"
    found = ""
    try:
        if flags.find:
            found, plan = find(config, devices, where)
        else:
            plan = make_plan(config, devices, where)
    except TooLargeError as error:
        change = smallest_change(config, devices, where)
        over = error.memory.needed - (error.memory.available or 0)
        raise UserError(
            f"{config.out} needs {_gib(error.memory)} on {where}, {over / GIB:.1f} GiB too much; "
            + (f"type {change}" if change else "nothing smaller fits; take more chips")
        ) from error
    if flags.json:
        print(json.dumps(to_json(plan) | ({"found": found} if found else {}), indent=2))
    else:
        print(describe(plan))
        if found:
            print(f"{'best':12}{found}")
    return 0


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything in JSON types."""
    table = dataclasses.asdict(plan)
    table["memory"] = plan.memory._asdict()
    table["tokens"] = plan.tokens
    table["collectives"] = [{**dataclasses.asdict(one), "sent": one.sent()} for one in plan.collectives]
    if plan.estimate:
        least, most = plan.estimate.least, plan.estimate.most
        table["estimate"] |= {"least": least, "most": most, "mfu": [plan.mfu(most), plan.mfu(least)]}
    return table


def describe(plan: Plan) -> str:
    """The plan for people."""
    config, shape = plan.config, plan.config.model
    per_device = config.batch_size // plan.devices // plan.micro_batches
    lines = [
        ("on", f"{plan.where}: {plan.devices} × {plan.kind}, {plan.hosts} host{'s' * (plan.hosts > 1)}; mesh data "
               f"{plan.mesh['data']} × fsdp {plan.mesh['fsdp']}; {config.dtype}"),
        ("model", f"{plan.n_params:,} parameters: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide"
                  f"{', scanned' * shape.scan_layers}; remat {shape.remat}"),
        ("attention", f"{plan.attention}; {plan.attention_kernels} kernel calls per update, "
                      f"{plan.attention_copies} copies around them"),
        ("batch", f"{config.batch_size} sequences = {plan.tokens:,} tokens per update ({plan.devices} devices × "
                  f"{plan.micro_batches} micro-batches × {per_device} sequences)"),
        ("memory", f"{_gib(plan.memory)} per device"),
        ("FLOPs", f"{plan.model_flops:.3g} per update by 6 N + 12 L C T, {plan.hardware_flops:.3g} in the program"),
    ]  # fmt: skip
    for index, one in enumerate(plan.collectives):
        what = f"{one.kind} over {' and '.join(one.axes)}: {si(one.n_bytes)}B per update in {one.times} calls"
        among = f"{one.devices} devices each; a device sends {si(int(one.sent()))}B"
        lines.append(("" if index else "collectives", f"{what} of {among}"))
    if not plan.collectives:
        lines.append(("collectives", "none"))
    for index, (name, where, count) in enumerate(_grouped(plan.parameters)):
        lines.append(("" if index else "parameters", f"{name}{where}{f'  × {count}' if count > 1 else ''}"))
    if plan.estimate:
        lines += _estimate_lines(plan, plan.estimate)
    return "\n".join(f"{name:12}{text}" for name, text in lines)


def _estimate_lines(plan: Plan, estimate: Estimate) -> Iterator[tuple[str, str]]:
    steps, least, most = plan.config.steps, estimate.least, estimate.most
    yield "estimate", f"an update takes {_milliseconds(estimate)}, MFU {plan.mfu(most):.0%} to {plan.mfu(least):.0%}"
    yield (
        "",
        (
            f"{si(int(plan.tokens / most))} to {si(int(plan.tokens / least))} tokens/s; {steps:,} updates = "
            f"{si(steps * plan.tokens)} tokens: {duration(steps * least)} to {duration(steps * most)}"
        ),
    )
    parts = {"products at the peak": estimate.compute, "memory": estimate.memory, "links": estimate.links,
             "XLA's cycles and kernels": estimate.compiled}  # fmt: skip
    yield "", ", ".join(f"{name} {1000 * part:.1f} ms" for name, part in parts.items() if part is not None)
    yield "", "assumed: data sheet speeds; all of it overlaps (least) or nothing (most); evaluation, saves not counted"


def _grouped(parameters: Sequence[tuple[str, tuple[int, ...], str]]) -> Iterator[tuple[str, str, int]]:
    """Layers that are placed alike in one line."""
    counts: dict[tuple[str, str], int] = {}
    for name, shape, where in parameters:
        key = f"{re.sub(r'h_[0-9]+/', 'h_*/', name)} {list(shape)} ", where
        counts[key] = counts.get(key, 0) + 1
    for (name, where), count in counts.items():
        yield f"{name:36}", where, count


def _gib(memory: Memory) -> str:
    available = f" of {memory.available / GIB:.3g}" if memory.available else ""
    return f"{memory.needed / GIB:.3g}{available} GiB"


def _milliseconds(estimate: Estimate) -> str:
    return f"{1000 * estimate.least:.0f} to {1000 * estimate.most:.0f} ms"


def command() -> None:
    """Entry point of `gpt2-plan`."""
    run_command(main)


if __name__ == "__main__":
    command()
