"""Reads a compiled program from its HLO text: collectives, bytes through memory, estimated cycles.

XLA's own cost analysis counts the body of a loop once, whatever its trip count. Here every instruction counts as often
as it runs. `jax.stages.Compiled.as_text()` prints the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)
} | {"bf16": 16}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]+[0-9]+[a-z0-9]*|pred)\[([\d,]*)\](\{[^{}]*\})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$", re.DOTALL)
# For example mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}: the devices of a mesh, grouped along some of its axes.
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{((?:'\w+',? ?)+)\}"
)
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
# Between TPU slices, the runtime exchanges what each device sends to its host.
BETWEEN_SLICES = re.compile(r'"xla_megascale_runtime",_xla_host_transfer_rendezvous="([a-z\-]+)')
# Opcodes that move no bytes themselves: new names for existing arrays, control flow (the computations that it calls are
# counted), and the ends of asynchronous instructions, which count at their start.
FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
    *("while", "conditional", "call", "after-all", "opt-barrier", "domain", "async-update", "async-done", "copy-done"),
    *("call-start", "call-done", "send", "send-done", "recv", "recv-done"),
}
WORK = {"fusion", "custom-call", "while", "call", "conditional", "dot", "convolution"}
MATMULS = {"dot", "convolution"}  # On TPU, matmuls are convolutions.
# Libraries' matmuls and convolutions, and attention kernels.
MATMUL_KERNELS = re.compile(
    r'custom_call_target="(__cublas\$(gemm|lt)|__cudnn\$(conv|fmha)|__onednn\$matmul|__triton_gemm|tpu_custom_call)'
)


class Instruction(NamedTuple):
    """One instruction of HLO."""

    name: str
    shape: str  # of the result, with layouts
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same mesh axes, among as many devices on as many slices.

    Attributes:
        kind: HLO opcode, such as "all-reduce".
        axes: mesh axes along which the devices communicate.
        devices: number of devices in each group.
        times: calls in one run of the program.
        n_bytes: bytes in all calls together, of the array that a group reduces or gathers, or that each device sends.
        slices: number of slices that the devices of a group are on.
        overlapped_bytes: those of the calls that any other work runs beside.
        matmul_overlapped_bytes: those of the calls that matmuls, convolutions or attention kernels run beside.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    times: int
    n_bytes: int
    slices: int = 1
    overlapped_bytes: int = 0
    matmul_overlapped_bytes: int = 0

    def sent(self) -> float:
        """Bytes that each device sends with ring algorithms (Patarasuk and Yuan 2009)."""
        share = (self.devices - 1) / self.devices
        return self.n_bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


class HloModule:
    """An optimized HLO module.

    Args:
        text: the module's text.

    Raises:
        ValueError: the text has a form that this reader does not know.
    """

    def __init__(self, text: str) -> None:
        self._computations, self._entry = _parse(text)
        self._runs: dict[str, int] = {}
        self._add_runs(self._entry, 1)

    def _add_runs(self, name: str, times: int) -> None:
        """Adds up how often each computation outside fusions runs. Every branch counts as often as its conditional."""
        self._runs[name] = self._runs.get(name, 0) + times
        for instruction in self._computations[name].values():
            if instruction.opcode == "while":
                condition, body = (
                    re.findall(rf"{role}=%?([\w.\-]+)", instruction.attributes)[0] for role in ("condition", "body")
                )
                self._add_runs(body, times * self._trip_count(instruction, condition))
            elif instruction.opcode in ("call", "call-start", "conditional", "async-start"):
                for called in _called(instruction):
                    self._add_runs(called, times)

    def _trip_count(self, loop: Instruction, condition: str) -> int:
        """Iterations of a loop: XLA's annotation, or the bound in the condition of JAX's counted loops."""
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
        """Every instruction outside fusions, with its computation and how often it runs."""
        for name, times in self._runs.items():
            for instruction in self._computations[name].values():
                yield name, instruction, times

    def _within(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """The instructions of a computation, and those inside its fusions."""
        for instruction in self._computations[name].values():
            yield name, instruction
            if instruction.opcode == "fusion":
                for called in _called(instruction):
                    yield from self._within(called)

    def collectives(self, mesh_shape: dict[str, int], slices: Sequence[int] = ()) -> list[Collective]:
        """The collectives of one run of the program, most bytes first.

        Args:
            mesh_shape: axis names and sizes. The program numbers its devices in the order of the mesh.
            slices: the slice of each device, in the order of the mesh; by default there is one.
        """
        slice_of = np.array(slices or [0] * math.prod(mesh_shape.values())).reshape(list(mesh_shape.values()))
        found: dict[tuple[str, tuple[str, ...], int, int], np.ndarray] = {}
        for name, times in self._runs.items():
            for computation, instruction, *overlapped in self._collective_calls(name):
                if not (group := _group(instruction, mesh_shape, slice_of)):
                    continue
                operands = self._computations[computation]
                used = instruction.operands[:1] if instruction.opcode == "send" else instruction.operands
                n_bytes = sum(n_bytes_of(operands[operand].shape) for operand in used)
                kind, _, devices, _ = group
                if kind == "all-gather":
                    n_bytes *= devices
                counts = times * np.array([1, n_bytes, *(n_bytes * beside for beside in overlapped)])
                found[group] = found.get(group, 0) + counts
        collectives = []
        for (kind, axes, devices, on_slices), counts in found.items():
            times, n_bytes, *overlapped_bytes = counts.tolist()
            collectives.append(Collective(kind, axes, devices, times, n_bytes, on_slices, *overlapped_bytes))
        return sorted(collectives, key=lambda collective: -collective.n_bytes)

    def _multiplies(self, instruction: Instruction) -> bool:
        """Whether an instruction, or one that it calls, is a matmul, a convolution or an attention kernel."""
        if instruction.opcode in MATMULS:
            return True
        if instruction.opcode == "custom-call":
            return bool(MATMUL_KERNELS.search(instruction.attributes))
        called = re.findall(r"body=%?([\w.\-]+)", instruction.attributes) + _called(instruction)
        return instruction.opcode in WORK and any(
            self._multiplies(inner) for name in called for inner in self._computations[name].values()
        )

    def _collective_calls(self, name: str) -> Iterator[tuple[str, Instruction, bool, bool]]:
        """The collectives in one run of a computation.

        Yields where each is, its instruction, whether other work runs beside it, and whether a matmul, a convolution or
        an attention kernel does.

        Other work may run between `all-reduce-start` and `all-reduce-done`. The TPU compiler also spreads a collective
        over a chain of fusions, each with the collective in it. The first starts it, the last waits for it, and those
        between compute something else meanwhile.
        """
        calls: dict[str, tuple[str, Instruction]] = {}
        running: set[str] = set()
        overlapped: set[str] = set()
        beside_matmuls: set[str] = set()
        for outer in self._computations[name].values():
            fused = [self._within(called) for called in _called(outer)] if outer.opcode == "fusion" else []
            inside = [(name, outer), *itertools.chain.from_iterable(fused)]
            collectives = [each for each in inside if each[1].opcode.removesuffix("-start") in (*COLLECTIVES, "send")]
            for computation, instruction in collectives:
                chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
                call = f"chain {chain[1]}" if chain else instruction.name
                if call in calls and "estimated_cycles" in outer.attributes:
                    overlapped.add(call)
                    beside_matmuls |= {call} if self._multiplies(outer) else set()
                calls.setdefault(call, (computation, instruction))
                if instruction.opcode.endswith("-start") or instruction.opcode == "send":
                    running.add(call)
            if outer.opcode in WORK and not collectives:
                overlapped |= running
                beside_matmuls |= running if self._multiplies(outer) else set()
            running -= set(outer.operands) if outer.opcode.endswith("-done") else set()
        for call, (computation, instruction) in calls.items():
            yield computation, instruction, call in overlapped, call in beside_matmuls

    def hbm_bytes(self) -> int:
        """Bytes that one device reads from and writes to its main memory in one run.

        Counts operands and results of every instruction. A slice counts as its result, not as the array that it reads.
        Arrays that a TPU holds on the chip (`S(n)` in their layout) do not count.
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
            (called,) = _called(instruction)
            return self._moved_by_fusion(self._computations[called], sizes, result)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * result
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        if instruction.opcode == "copy-start":
            return 2 * max(sizes)
        return sum(sizes) + result

    def _moved_by_fusion(self, fused: dict[str, Instruction], sizes: list[int], result: int) -> int:
        """Counts a parameter that is only sliced as its slices, and a parameter that is only updated as the update."""
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
        """The TPU compiler's own estimate for one run. It has none for Pallas kernels, copies and collectives."""
        cycles = re.compile(r'"estimated_cycles":"(\d+)"')
        return sum(
            times * int(match[1])
            for _, instruction, times in self._executed()
            if (match := cycles.search(instruction.attributes))
        )

    def count(self, pattern: str) -> int:
        """Runs of the instructions whose "opcode(attributes" matches a regular expression."""
        matches = re.compile(pattern)
        return sum(
            times
            for _, instruction, times in self._executed()
            if matches.search(f"{instruction.opcode}({instruction.attributes}")
        )

    def relayouts(self, pattern: str) -> int:
        """Runs of the copies and transposes that change the memory order of an array's axes.

        A copy in the same order does not count: it moves an array between a TPU's main memory and the chip.

        Args:
            pattern: regular expression that the attributes of an instruction have to match.
        """
        matches = re.compile(pattern)
        total = 0
        for name, instruction, times in self._executed():
            if instruction.opcode in ("copy", "transpose") and matches.search(instruction.attributes):
                before = self._computations[name][instruction.operands[0]].shape
                if instruction.opcode == "transpose" or _order(before) != _order(instruction.shape):
                    total += times
        return total


def _group(
    instruction: Instruction, mesh_shape: dict[str, int], slice_of: np.ndarray
) -> tuple[str, tuple[str, ...], int, int] | None:
    """Kind, mesh axes, devices and slices of the groups of a collective; None if nothing is sent."""
    if instruction.opcode == "send" and (between := BETWEEN_SLICES.search(instruction.attributes)):
        crossing = [(slice_of != slice_of.take([0], axis)).any() for axis in range(slice_of.ndim)]
        count = len(np.unique(slice_of))
        return between[1], tuple(itertools.compress(mesh_shape, crossing)), count, count
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    groups = _groups(instruction, slice_of.size)
    if groups.shape[1] == 1:
        return None
    places = np.stack(np.unravel_index(groups, slice_of.shape))  # [axes, groups, devices]
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    count = max(len(set(group)) for group in slice_of.reshape(-1)[groups].tolist())
    return kind, tuple(itertools.compress(mesh_shape, varies)), groups.shape[1], count


def _called(instruction: Instruction) -> list[str]:
    """The computations that an instruction other than a loop calls."""
    branches = BRANCHES.search(instruction.attributes)
    names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    return CALLED.findall(instruction.attributes) + names


def _order(shape: str) -> str:
    """The axes of an HLO array in memory order, such as "2,1,0", without axes of size 1."""
    (_, dims, layout), *_ = ARRAY.findall(shape)
    sizes = dims.split(",")
    axes = re.findall(r"\d+", layout.split(":")[0])
    return ",".join(axis for axis in axes if sizes[int(axis)] != "1")


def n_bytes_of(shape: str, *, on_chip: bool = True) -> int:
    """Bytes of an HLO shape or tuple of shapes. `on_chip=False` counts only arrays in a TPU's main memory."""
    bits = 0
    for dtype, dims, layout in ARRAY.findall(shape):
        if on_chip or not re.search(r"S\([1-9]", layout):
            width = BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])  # such as f8e4m3
            bits += width * math.prod(int(dim) for dim in dims.split(",") if dim)
    return bits // 8


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns {computation: {name: instruction}} and the name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    lines: list[str] = []
    for line in text.splitlines():  # the metadata of a kernel spans lines
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
            # Constants have their value in the parentheses, parameters their number; other opcodes have operands.
            attributes = rest if opcode in ("constant", "parameter") else rest[len(inside) :]
            current[name] = Instruction(name, shape, opcode, tuple(operands), attributes)
    if not entry:
        raise ValueError("no ENTRY computation: this is not HLO text")
    return computations, entry


def _balanced(text: str) -> str:
    """`text` up to the parenthesis that closes the one before it."""
    depth = 1
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return text[:place]
    return text


def _groups(instruction: Instruction, n_devices: int) -> np.ndarray:
    """int [groups, devices]: the devices of each group of a collective. The groups of a permutation are its pairs."""
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
        ids = ids.transpose([list(sizes).index(name) for name in names])
        return ids.reshape(-1, math.prod(sizes[name] for name in along))
    if groups := re.search(r"replica_groups=\{(.*?\})\}", attributes):
        return _table(groups[1])
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return np.arange(n_devices)[None]
    raise ValueError(f"{instruction.name} has replica groups of an unknown form: {attributes[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, … reshaped to `dims`, then transposed to `order` if there is one."""
    counted = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return counted.transpose(_numbers(order)) if order else counted


def _table(text: str) -> np.ndarray:
    return np.array([_numbers(group) for group in re.findall(r"\{?([\d,]+)\}", text)])
