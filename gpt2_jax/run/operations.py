"""Where the time of the traced updates went: the share of each part of the model, and the longest operations.

Reads what `jax.profiler` wrote (XSpace, tsl/profiler/protobuf/xplane.proto). Its events name HLO instructions. The
compiled program tells which line of the model each instruction comes from.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gpt2_jax.planning.hlo import COLLECTIVES, INSTRUCTION

N_LONGEST = 10
GAPS, COLLECTIVE, OTHER = "gaps", "collectives", "other"
# The first that is found in the name decides. Blocks add their residuals outside `attn` and `mlp`.
PARTS = {
    "attention": re.compile(r"/attn\b"),
    "MLP": re.compile(r"/mlp\b"),
    "norms and residuals": re.compile(r"/(ln_\w+|h(_\d+)?)/"),
    "embeddings": re.compile(r"/(wte|wpe)/"),
    "head and loss": re.compile(r"head_and_loss"),
    "optimizer": re.compile(r"/(optimizer|accumulation)\b"),
}
# Their events last as long as those of the instructions that they call.
_CALLERS = ("while", "call", "conditional", "async-start", "async-update", "async-done")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONTROL_FLOW = {"while", "body", "cond", "closed_call", "shard_map", "checkpoint", "rematted_computation"}


@dataclass(frozen=True)
class Operation:
    """All instructions that come from one line of the model, in every layer.

    Attributes:
        name: the path of the modules and JAX's primitive, with `h_*` for every layer.
        seconds: of one update on one device. Where several instructions run at the same time, each counts in part.
        calls: in one update on one device.
    """

    name: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """Where the time of an update went.

    Attributes:
        seconds: from the first to the last instruction of the traced updates, over their number.
        shares: of each part, in this order: they add up to 1. Collectives and gaps count only where no device computes.
        longest: the operations that take longest, in falling order.
    """

    seconds: float
    shares: Mapping[str, float]
    longest: list[Operation]

    def lines(self) -> list[str]:
        """The shares in a line, and a table of the longest operations."""
        shares = ", ".join(f"{share:.0%} {part}" for part, share in self.shares.items() if share >= 0.005)
        table = [
            f"{1000 * operation.seconds:9.3f}  {operation.seconds / self.seconds:5.1%}  {operation.calls:5.0f}  "
            + operation.name
            for operation in self.longest
        ]
        return [f"{1000 * self.seconds:.4g} ms an update: {shares}", "       ms  share  calls  operation", *table]


def read_profile(directory: Path, program: str, updates: int) -> Profile:
    """Reads the newest trace in a directory.

    Args:
        directory: that was given to `jax.profiler.start_trace`.
        program: HLO text of the compiled update.
        updates: the number of traced updates.

    Raises:
        ValueError: there is no trace, or none of its events belongs to the program.
    """
    file = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime, default=None)
    if file is None:
        raise ValueError(f"{directory}: no trace")
    module, instructions = _read_program(program)
    devices = _read_events(file, module)
    if not devices:
        raise ValueError(f"{file}: no event of the program {module}")
    seconds, part_seconds = 0.0, defaultdict[str, float](float)
    operation_seconds, calls = defaultdict[str, float](float), defaultdict[str, float](float)
    per_update = 1 / (len(devices) * updates)
    for events in devices.values():
        leaves = [event for event in events if instructions.get(event[2], ("", ""))[0] not in _CALLERS]
        seconds += per_update * (max(event[1] for event in leaves) - min(event[0] for event in leaves))
        names = {name: _describe(name, *instructions.get(name, ("", ""))) for *_, name in leaves}
        for *_, name in leaves:
            calls[names[name][1]] += per_update
        for name, duration in _exclusive_seconds(leaves, {name for name in names if names[name][0] == COLLECTIVE}):
            part, operation = names[name] if name else (GAPS, "")
            part_seconds[part] += per_update * duration
            operation_seconds[operation] += per_update * duration
    operation_seconds.pop("", None)
    longest = sorted(operation_seconds, key=operation_seconds.__getitem__, reverse=True)[:N_LONGEST]
    return Profile(
        seconds,
        {part: part_seconds[part] / seconds for part in (*PARTS, OTHER, COLLECTIVE, GAPS)},
        [Operation(name, operation_seconds[name], calls[name]) for name in longest],
    )


Event = tuple[float, float, str]  # start and end in seconds, name of the instruction


def _read_program(text: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """The name of the module, and the opcode and source of every instruction."""
    instructions = {}
    for line in text.splitlines():
        if found := INSTRUCTION.match(line):
            source = _OP_NAME.search(line)
            instructions[found[1]] = found[3], source[1] if source else ""
    return re.sub(r"HloModule ([\w.\-]+).*", r"\1", text.partition("\n")[0]), instructions


def _read_events(file: Path, module: str) -> dict[Any, list[Event]]:
    """The events of the module's instructions, for each device.

    On CPUs and GPUs an event names its instruction and its module in `hlo_op` and `hlo_module`. On TPUs the line
    "XLA Ops" has the instruction's text as the name.
    """
    devices = defaultdict[Any, list[Event]](list)
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        is_tpu = plane.name.startswith("/device:TPU")
        for line in plane.lines:
            if is_tpu and line.name != "XLA Ops":
                continue
            for event in line.events:
                stats = dict(event.stats)
                name = event.name.lstrip("%").partition(" ")[0] if is_tpu else stats.get("hlo_op")
                if name and not event.name.startswith("end: ") and stats.get("hlo_module", module) == module:
                    device = plane.name, stats.get("device_ordinal", 0)
                    devices[device].append((1e-9 * event.start_ns, 1e-9 * event.end_ns, name))
    return devices


def _describe(name: str, opcode: str, source: str) -> tuple[str, str]:
    """The part and the operation of an instruction."""
    if opcode.startswith(COLLECTIVES) or (not opcode and name.startswith(COLLECTIVES)):
        return COLLECTIVE, f"{opcode or name} {_shorten(source)}".strip()
    part = next((part for part, pattern in PARTS.items() if pattern.search(source)), OTHER)
    return part, _shorten(source) or name


def _shorten(source: str) -> str:
    """`jit(update)/transpose(jvp(GPT2.hidden))/GPT2._backbone/h_3/mlp/mul` becomes `h_*/mlp/mul, backward`."""
    words = [word for word in source.partition(";")[0].split("/") if not re.search(r"\(|GPT2", word)]
    path = "/".join(re.sub(r"^h_\d+$", "h_*", word) for word in words if word not in _CONTROL_FLOW)
    return path + ", backward" * ("transpose(jvp" in source)


def _exclusive_seconds(events: list[Event], collectives: set[str]) -> Iterator[tuple[str, float]]:
    """Splits the time from the first start to the last end among the instructions; the name is "" where none runs.

    Instructions that run at the same time share it. Collectives get only what no other instruction hides.
    """
    moments = sorted(
        [(start, 1, name) for start, end, name in events if end > start]
        + [(end, -1, name) for start, end, name in events if end > start]
    )
    running, before = defaultdict[str, int](int), moments[0][0] if moments else 0.0
    for moment, change, name in moments:
        if moment > before:
            chosen = [key for key in running if key not in collectives] or list(running)
            total = sum(running[key] for key in chosen)
            for key in chosen:
                yield key, (moment - before) * running[key] / total
            if not chosen:
                yield "", moment - before
        running[name] += change
        if not running[name]:
            del running[name]
        before = moment
