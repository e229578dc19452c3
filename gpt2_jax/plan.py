"""What a config will do on chips that need not be there: `python -m gpt2_jax.plan --config NAME --topology v5e:4x4`.

Compiles the training step for them and reads memory, collectives and FLOPs from the program. What it says of time is
arithmetic on the makers' data sheets, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax import attention
from gpt2_jax.chips import Chip, chip_of, devices_of, host_of
from gpt2_jax.cli import parse_args, run_command
from gpt2_jax.config import TrainConfig, UserError
from gpt2_jax.data.tokenizer import vocab_size
from gpt2_jax.display import duration, si
from gpt2_jax.metrics import flops_per_token
from gpt2_jax.model import GPT2, n_params
from gpt2_jax.program import Collective, Part, Program, flops
from gpt2_jax.sharding import batch_sharding, make_mesh, micro_batches
from gpt2_jax.step import abstract_state, make_train_step
from gpt2_jax.train import resolve

PROG = "python -m gpt2_jax.plan"
GIB = 2.0**30
REMATS = ("none", "dots", "full")
FLAGS = """
  --topology T   v5e:4x4, v5p:2x2x4, v6e:2x4, h100:8, cpu:8 and the like; without it the devices of this machine
  --find         look for the micro-batch size and the rematerialisation that take the least time and fit
  --json         everything, for programs
"""


class Memory(NamedTuple):
    """Of one device, in bytes: what the program needs at its peak, and what there is; None where nobody knows."""

    needed: int
    available: int | None

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.available is None or self.needed <= self.available


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds that one update takes each part of a device, if it did nothing else.

    Attributes:
        compute: matrix products at the peak.
        memory: everything read and written, at the bandwidth.
        links: everything sent, by ring algorithms.
        compiled: the TPU compiler's estimate of all but kernels, copies and collectives, and the kernels at the peak.
    """

    compute: float
    memory: float
    links: float
    compiled: float | None

    @property
    def least(self) -> float:
        """If all overlaps."""
        return max(self.compute, self.memory, self.links, self.compiled or 0.0)

    @property
    def most(self) -> float:
        """If nothing overlaps, but at these speeds."""
        return (self.compiled or self.compute + self.memory) + self.links


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config does on some devices.

    Attributes:
        config: resolved.
        where: topology or machine.
        attention: the backend, and what speaks against the others.
        attention_kernels: how often they run in one update on each device.
        parameters: name, shape and placement of each.
        micro_batches: per update.
        model_flops: of one update, on all devices, by 6 N + 12 L C T.
        hardware_flops: of one update, on all devices: of the products in the program.
        traffic: bytes that a device reads and writes in its memory in one update.
    """

    config: TrainConfig
    where: str
    kind: str
    devices: int
    hosts: int
    mesh: dict[str, int]
    n_params: int
    attention: attention.Choice
    attention_kernels: int
    parameters: tuple[tuple[str, tuple[int, ...], str], ...]
    micro_batches: int
    memory: Memory
    model_flops: float
    hardware_flops: float
    traffic: int
    collectives: tuple[Collective, ...]
    estimate: Estimate | None

    @property
    def tokens(self) -> int:
        """Per update."""
        return self.config.batch_size * self.config.model.block_size

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of an update that takes so long."""
        assert self.estimate is not None
        return self.model_flops / self.hardware_flops * self.estimate.compute / seconds


class TooLargeError(Exception):
    """The program does not fit; `memory` says by how much."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory


def make_plan(config: TrainConfig, devices: Sequence[jax.Device], where: str) -> Plan:
    """Compiles the training step and reads what it does.

    Args:
        config: validated.
        devices: real ones, or of `chips.devices_of`.
        where: their name.

    Raises:
        UserError: config and devices do not fit together.
        TooLargeError: the program needs more memory than a device has.
    """
    config, choice = resolve(config, attention.hardware_of(devices[0]))
    if not config.model.vocab_size:
        n_vocab = vocab_size(config.data.tokenizer, config.data.characters)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=n_vocab))
    mesh = make_mesh(config.mesh, devices)
    accumulation = micro_batches(config.batch_size, config.micro_batch_size, mesh)
    model = GPT2(dataclasses.replace(config.model, attention=choice.backend), jnp.dtype(config.dtype))
    state = abstract_state(model, config.optimizer, mesh)
    shape = (accumulation, config.batch_size // accumulation, config.model.block_size + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, micro_batches=True))
    with jax.default_matmul_precision("highest" if config.dtype == "float32" else None):
        step: Any = make_train_step(model, config.optimizer, mesh, config.seed)
        traced = step.trace(state, tokens)
        arguments = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
        )
        compiled = _compile(traced.lower(), arguments)
    memory = _memory(compiled, devices[0])
    program = Program(compiled.as_text() or "")
    products = flops(traced.jaxpr)
    collectives = tuple(program.collectives(dict(mesh.shape)))
    size = n_params(state.params, config.model)
    in_products = size - config.model.block_size * config.model.n_embd
    per_token = flops_per_token(in_products, config.model.n_layer, config.model.n_embd, config.model.block_size)
    chip = chip_of(devices[0])
    return Plan(
        config=config,
        where=where,
        kind=devices[0].device_kind,
        devices=len(devices),
        hosts=len({host_of(device) for device in devices}),
        mesh=dict(mesh.shape),
        n_params=size,
        attention=choice,
        attention_kernels=program.count(ATTENTION_KERNELS),
        parameters=tuple(_parameters(state.params)),
        micro_batches=accumulation,
        memory=memory,
        model_flops=per_token * config.batch_size * config.model.block_size,
        hardware_flops=sum(products.values()),
        traffic=program.memory_traffic(),
        collectives=collectives,
        estimate=_estimate(chip, program, products, collectives, mesh) if chip else None,
    )


ATTENTION_KERNELS = r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w+)"'

# What the TPU compiler says when a program is too large.
TOO_LARGE = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT])\)?(?: of | exceeds available HBM \()([\d.]+)([KMGT])")


def _compile(lowered: jax.stages.Lowered, arguments: int) -> jax.stages.Compiled:
    """Compiles, with the bytes of the arguments on one device for the error."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        numbers = TOO_LARGE.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or numbers is None:
            raise
        units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        used, used_unit, limit, limit_unit = numbers.groups()
        needed = arguments + int(float(used) * units[used_unit])
        raise TooLargeError(Memory(needed, int(float(limit) * units[limit_unit]))) from error


def _memory(compiled: jax.stages.Compiled, device: jax.Device) -> Memory:
    stats: Any = compiled.memory_analysis()
    needed = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    chip = chip_of(device)
    memory = Memory(needed, int(chip.memory) if chip else None)
    if not memory.fits:
        raise TooLargeError(memory)
    return memory


def _parameters(params: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(str(key.key) for key in path)
        split = [f"dimension {axis} over {part}" for axis, part in enumerate(leaf.sharding.spec) if part]
        yield name, tuple(leaf.shape), ", ".join(split) or "whole on each device"


def _estimate(
    chip: Chip,
    program: Program,
    products: dict[Part, float],
    collectives: Sequence[Collective],
    mesh: Mesh,
) -> Estimate:
    kernels = products["attention"] / mesh.size / chip.flops
    cycles = program.estimated_cycles()
    return Estimate(
        compute=sum(products.values()) / mesh.size / chip.flops,
        memory=program.memory_traffic() / chip.bandwidth,
        links=sum(one.sent() / _speed(chip, one.axes, mesh) for one in collectives),
        compiled=cycles / chip.clock + kernels if cycles else None,
    )


def _speed(chip: Chip, axes: tuple[str, ...], mesh: Mesh) -> float:
    """Bytes per second between the devices along some mesh axes: the slowest way that they have to take."""
    if not chip.network:
        return chip.link
    first = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = mesh.devices[first]
    return chip.network if len({host_of(device) for device in group.flat}) > 1 else chip.link


# --- finding what fits -----------------------------------------------------------------------------------------


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
    now = min(config.micro_batch_size or per_device, per_device)
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
        ("attention", f"{plan.attention}; {plan.attention_kernels} kernel calls per update"),
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


if __name__ == "__main__":
    run_command(main)
