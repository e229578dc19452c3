"""What a compiled program does, read from its text: collectives, bytes through memory, estimated cycles, products.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; here everything counts as often as it
runs. The text is HLO as `jax.stages.Compiled.as_text()` prints it; products are counted in the jaxpr before it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)
} | {"bf16": 16}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]+[0-9]+[a-z0-9]*|pred)\[([\d,]*)\](\{[^{}]*\})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$", re.DOTALL)
# Such as mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}: devices in a mesh, of which those along some axes.
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{((?:'\w+',? ?)+)\}"
)
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
# What moves nothing by itself: names for parts of other things, control flow (what it calls is counted), and the ends
# of what was counted where it starts.
FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
    *("while", "conditional", "call", "after-all", "opt-barrier", "domain", "async-update", "async-done", "copy-done"),
}


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    shape: str  # of the result, with layouts
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same devices.

    Attributes:
        kind: of HLO, such as "all-reduce".
        axes: the mesh axes along which they communicate.
        devices: that take part in each group.
        times: how often they run in one run of the program.
        n_bytes: over all these runs, of what a group works on together: what is reduced, gathered or passed on by
            each device.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    times: int
    n_bytes: int

    def sent(self) -> float:
        """Bytes that a device sends, by the ring algorithms (Patarasuk and Yuan 2009)."""
        share = (self.devices - 1) / self.devices
        return self.n_bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


class Program:
    """An optimised HLO module.

    Args:
        text: HLO.

    Raises:
        ValueError: the text is of a form that this reader does not know.
    """

    def __init__(self, text: str) -> None:
        self._computations, self._entry = _parse(text)
        self._runs: dict[str, int] = {}
        self._count(self._entry, 1)

    def _count(self, name: str, times: int) -> None:
        """Adds up how often each computation runs, other than within a fusion."""
        self._runs[name] = self._runs.get(name, 0) + times
        for instruction in self._computations[name].values():
            called = CALLED.findall(instruction.attributes)
            if instruction.opcode == "while":
                condition, body = (
                    re.findall(rf"{role}=%?([\w.\-]+)", instruction.attributes)[0] for role in ("condition", "body")
                )
                self._count(body, times * self._trip_count(instruction, condition))
            elif instruction.opcode == "conditional":
                # The step has one, the optimizer's, which it enters once, in the last turn of a loop.
                branches = re.findall(r"branch_computations=\{(.*?)\}", instruction.attributes)
                for branch in re.findall(r"[\w.\-]+", branches[0]) if branches else called:
                    self._count(branch, 1)
            elif instruction.opcode in ("call", "async-start"):
                for computation in called:
                    self._count(computation, times)

    def _trip_count(self, loop: Instruction, condition: str) -> int:
        """How often the body of a loop runs: as XLA notes it, or for the counted loops that JAX makes its bound."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        constants = [
            int(match[1])
            for instruction in self._computations[condition].values()
            if instruction.opcode == "constant" and (match := re.match(r"(\d+)\)", instruction.attributes))
        ]
        if len(constants) != 1:
            raise ValueError(f"the loop {loop.name} has no trip count: {len(constants)} constants in its condition")
        return constants[0]

    def _executed(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that runs by itself, with its computation and how often."""
        for name, times in self._runs.items():
            for instruction in self._computations[name].values():
                yield name, instruction, times

    def _within(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """The instructions of a computation and, in fusions, of those that it calls."""
        for instruction in self._computations[name].values():
            yield name, instruction
            if instruction.opcode == "fusion":
                for called in CALLED.findall(instruction.attributes):
                    yield from self._within(called)

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """What the devices of a mesh say to each other in one run of the program, the most bytes first.

        Args:
            mesh_shape: axis names and sizes; the program's devices are the mesh's, in order.
        """
        found: dict[tuple[str, tuple[str, ...], int], tuple[int, int]] = {}
        for name, times in self._runs.items():
            for computation, instruction in self._within(name):
                kind = instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                groups = _groups(instruction, math.prod(mesh_shape.values()))
                devices = groups.shape[1]
                if devices == 1:
                    continue
                operands = self._computations[computation]
                n_bytes = sum(n_bytes_of(operands[operand].shape) for operand in instruction.operands)
                if kind == "all-gather":
                    n_bytes *= devices
                places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))  # [axes, groups, devices]
                varies = (places != places[:, :, :1]).any(axis=(1, 2))
                axes = tuple(axis for axis, along in zip(mesh_shape, varies, strict=True) if along)
                before = found.get((kind, axes, devices), (0, 0))
                found[kind, axes, devices] = before[0] + times, before[1] + times * n_bytes
        collectives = [Collective(*key, *counts) for key, counts in found.items()]
        return sorted(collectives, key=lambda collective: -collective.n_bytes)

    def memory_traffic(self) -> int:
        """Bytes that one device reads from and writes to its memory in one run: operands and results of everything
        that runs, of slices only what they take. What a TPU keeps on the chip (`S(n)` in its layouts) is not counted.
        """
        return sum(
            times * self._moved(self._computations[name], instruction)
            for name, instruction, times in self._executed()
            if instruction.opcode not in FREE and not instruction.opcode.removesuffix("-done").endswith(COLLECTIVES)
        )

    def _moved(self, computation: dict[str, Instruction], instruction: Instruction) -> int:
        operands = [computation[operand].shape for operand in instruction.operands]
        sizes = [n_bytes_of(shape, on_chip=False) for shape in operands]
        result = n_bytes_of(instruction.shape, on_chip=False)
        if instruction.opcode == "fusion":
            (called,) = CALLED.findall(instruction.attributes)
            return self._moved_by_fusion(self._computations[called], sizes, result)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * result
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        if instruction.opcode == "copy-start":
            return 2 * max(sizes)
        return sum(sizes) + result

    def _moved_by_fusion(self, fused: dict[str, Instruction], sizes: list[int], result: int) -> int:
        """Of a parameter that is only sliced the slices count, and of one that is only updated the update."""
        total = 0
        updated = 0
        for instruction in fused.values():
            if instruction.opcode != "parameter":
                continue
            size = sizes[int(instruction.attributes.split(")")[0])]
            users = [user for user in fused.values() if instruction.name in user.operands]
            if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
                total += min(size, sum(n_bytes_of(user.shape) for user in users))
            elif users and all(
                user.opcode == "dynamic-update-slice" and user.operands[0] == instruction.name for user in users
            ):
                update = sum(n_bytes_of(fused[user.operands[1]].shape) for user in users)
                total, updated = total + min(size, update), updated + max(size - update, 0)
            else:
                total += size
        return total + max(result - updated, 0)

    def estimated_cycles(self) -> int:
        """The TPU compiler's own estimate for one run; it has none for Pallas kernels, copies and collectives."""
        cycles = re.compile(r'"estimated_cycles":"(\d+)"')
        return sum(
            times * int(match[1])
            for _, instruction, times in self._executed()
            if (match := cycles.search(instruction.attributes))
        )

    def count(self, pattern: str) -> int:
        """How often instructions whose opcode and attributes match a regular expression run."""
        matches = re.compile(pattern)
        return sum(
            times
            for _, instruction, times in self._executed()
            if matches.search(f"{instruction.opcode}({instruction.attributes}")
        )

    def relayouts(self, pattern: str) -> int:
        """How often copies and transposes, whose attributes match a regular expression, write an array in another order
        of its axes. A copy in the same order moves it between a TPU's main memory and the chip."""
        matches = re.compile(pattern)
        total = 0
        for name, instruction, times in self._executed():
            if instruction.opcode in ("copy", "transpose") and matches.search(instruction.attributes):
                before = self._computations[name][instruction.operands[0]].shape
                if instruction.opcode == "transpose" or _order(before) != _order(instruction.shape):
                    total += times
        return total


def _order(shape: str) -> str:
    """The axes of an HLO array as they lie in memory, such as "2,1,0"; those of size 1 lie anywhere."""
    (_, dims, layout), *_ = ARRAY.findall(shape)
    sizes = dims.split(",")
    axes = re.findall(r"\d+", layout.split(":")[0])
    return ",".join(axis for axis in axes if sizes[int(axis)] != "1")


def n_bytes_of(shape: str, *, on_chip: bool = True) -> int:
    """Bytes of an HLO shape or tuple of shapes; without `on_chip` only of those in a TPU's main memory."""
    bits = 0
    for dtype, dims, layout in ARRAY.findall(shape):
        if on_chip or not re.search(r"S\([1-9]", layout):
            width = BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])  # f8e4m3 and the like
            bits += width * math.prod(int(dim) for dim in dims.split(",") if dim)
    return bits // 8


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {name: instruction}}, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    lines: list[str] = []
    for line in text.splitlines():  # the metadata of kernels spans lines
        if re.match(r"(ENTRY )?%?[\w.\-]+ \(.*\{$", line) or re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line)
        elif lines and line != "}":
            lines[-1] += " " + line
    for line in lines:
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif instruction := INSTRUCTION.match(line):
            name, shape, opcode, rest = instruction.groups()
            inside = _balanced(rest)
            operands = re.findall(r"%([\w.\-]+)", inside)
            # Constants and parameters have their value or number where others have operands.
            attributes = rest if opcode in ("constant", "parameter") else rest[len(inside) :]
            current[name] = Instruction(name, shape, opcode, tuple(operands), attributes)
    if not entry:
        raise ValueError("no ENTRY computation: this is not HLO text")
    return computations, entry


def _balanced(text: str) -> str:
    """`text` up to the parenthesis that closes one opened before it."""
    depth = 1
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return text[:place]
    return text


def _groups(instruction: Instruction, n_devices: int) -> np.ndarray:
    """int [groups, devices]: who takes part in a collective; of a permutation, its pairs."""
    attributes = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", attributes):
        return _table(pairs[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    if mesh := MESH_GROUPS.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2] or ",".join(map(str, sizes.values())), mesh[3]).reshape(list(sizes.values()))
        along = re.findall(r"'(\w+)'", mesh[4])
        names = [*(name for name in sizes if name not in along), *along]
        return ids.transpose([list(sizes).index(name) for name in names]).reshape(
            -1, math.prod(sizes[n] for n in along)
        )
    if groups := re.search(r"replica_groups=\{(.*?\})\}", attributes):
        return _table(groups[1])
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return np.arange(n_devices)[None]
    raise ValueError(f"{instruction.name} has replica groups of an unknown form: {attributes[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, … in the shape `dims`, its axes in another order if one is given."""
    counted = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return counted.transpose(_numbers(order)) if order else counted


def _table(text: str) -> np.ndarray:
    return np.array([_numbers(group) for group in re.findall(r"\{?([\d,]+)\}", text)])


# --- products ----------------------------------------------------------------------------------------------

# Products of [time, head_dim] by [head_dim, time] in the attention kernels, forward and backward, in units of one.
# Splash has a backward kernel for dq, and another for dk and dv, which both compute the weights again.
KERNELS = {"splash": {"fwd": 2, "dq": 3, "dkv": 4}, "cudnn": {"fwd": 2, "bwd": 5}}
Part = Literal["products", "attention"]


def flops(jaxpr: ClosedJaxpr) -> dict[Part, float]:
    """FLOPs of the matrix products in one run of a traced function on all its devices, recomputation included.

    "attention" are those of the attention kernels, whose causal half they compute; everything else is "products".
    Loops count as often as they turn; of the branches of a conditional the largest.
    """
    return _flops(jaxpr.jaxpr)


def _flops(jaxpr: Jaxpr) -> dict[Part, float]:
    total: dict[Part, float] = {"products": 0.0, "attention": 0.0}

    def add(part: dict[Part, float], times: float = 1.0) -> None:
        for name, value in part.items():
            total[name] += times * value

    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (lhs_contracting, _), _ = params["dimension_numbers"]
            lhs: Any = eqn.invars[0].aval
            result: Any = eqn.outvars[0].aval
            contracted = math.prod(lhs.shape[axis] for axis in lhs_contracting)
            add({"products": 2.0 * contracted * result.size})
        elif kernel := _attention_kernel(eqn):
            add({"attention": kernel})
        elif name == "scan":
            add(_flops(params["jaxpr"].jaxpr), params["length"])
        elif name == "cond":
            add(max((_flops(branch.jaxpr) for branch in params["branches"]), key=lambda part: sum(part.values())))
        elif name == "shard_map":
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            add(_flops(params["jaxpr"]), devices)
        else:
            for inner in _inner(params.values()):
                add(_flops(inner))
    return total


def _inner(values: Iterable[Any]) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation that is just a call."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _attention_kernel(eqn: Any) -> float:
    """FLOPs of an attention kernel, 0 for other equations. Blocks on the diagonal are computed whole; not counted."""
    name, params = eqn.primitive.name, eqn.params
    if name == "pallas_call":
        units = next(units for part, units in KERNELS["splash"].items() if f"_{part}_" in params["name"])
        *lead, head_dim, time = next(var.aval.shape for var in eqn.invars if var.aval.ndim == 4)  # q
    elif name.startswith("dot_product_attention_"):
        units = KERNELS["cudnn"][name.removeprefix("dot_product_attention_").removesuffix("_wrapper")]
        batch, time, heads, head_dim = eqn.invars[0].aval.shape
        lead = [batch, heads]
    else:
        return 0.0
    return units * math.prod(lead) * float(time) ** 2 * head_dim  # 2 FLOPs each, half of which are not computed
