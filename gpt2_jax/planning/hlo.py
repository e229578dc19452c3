"""Reads a compiled program from its HLO text: how often its instructions run, bytes through memory, estimated cycles.

XLA's own cost analysis counts the body of a loop once, whatever its trip count. Here every instruction counts as often
as it runs. `jax.stages.Compiled.as_text()` prints the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)
} | {"bf16": 16}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]+[0-9]+[a-z0-9]*|pred)\[([\d,]*)\](\{[^{}]*\})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$", re.DOTALL)
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
# Opcodes that move no bytes themselves: new names for existing arrays, control flow (the computations that it calls are
# counted), and the ends of asynchronous instructions, which count at their start.
FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
    *("while", "conditional", "call", "after-all", "opt-barrier", "domain", "async-update", "async-done", "copy-done"),
    *("call-start", "call-done", "send", "send-done", "recv", "recv-done"),
}


class Instruction(NamedTuple):
    """One instruction of HLO."""

    name: str
    shape: str  # of the result, with layouts
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class HloModule:
    """An optimized HLO module.

    Attributes:
        computations: the instructions by name, of each computation by name.
        runs: how often each computation outside fusions runs.

    Args:
        text: the module's text.

    Raises:
        ValueError: the text has a form that this reader does not know.
    """

    def __init__(self, text: str) -> None:
        self.computations, entry = _parse(text)
        self.runs: dict[str, int] = {}
        self._add_runs(entry, 1)

    def _add_runs(self, name: str, times: int) -> None:
        """Adds up how often each computation outside fusions runs. Every branch counts as often as its conditional."""
        self.runs[name] = self.runs.get(name, 0) + times
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                condition, body = (
                    re.findall(rf"{role}=%?([\w.\-]+)", instruction.attributes)[0] for role in ("condition", "body")
                )
                self._add_runs(body, times * self._trip_count(instruction, condition))
            elif instruction.opcode in ("call", "call-start", "conditional", "async-start"):
                for called in called_by(instruction):
                    self._add_runs(called, times)

    def _trip_count(self, loop: Instruction, condition: str) -> int:
        """Iterations of a loop: XLA's annotation, or the bound in the condition of JAX's counted loops."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        constants = [
            int(match[1])
            for instruction in self.computations[condition].values()
            if instruction.opcode == "constant" and (match := re.match(r"(\d+)\)", instruction.attributes))
        ]
        if len(constants) != 1:
            raise ValueError(f"the loop {loop.name} has no trip count: {len(constants)} constants in its condition")
        return constants[0]

    def _executed(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction outside fusions, with its computation and how often it runs."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield name, instruction, times

    def within(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """The instructions of a computation, and those inside its fusions."""
        for instruction in self.computations[name].values():
            yield name, instruction
            if instruction.opcode == "fusion":
                for called in called_by(instruction):
                    yield from self.within(called)

    def hbm_bytes(self) -> int:
        """Bytes that one device reads from and writes to its main memory in one run.

        Counts operands and results of every instruction. A slice counts as its result, not as the array that it reads.
        Arrays that a TPU holds on the chip (`S(n)` in their layout) do not count.
        """
        return sum(
            times * self._moved(self.computations[name], instruction)
            for name, instruction, times in self._executed()
            if instruction.opcode not in FREE and not instruction.opcode.removesuffix("-done").endswith(COLLECTIVES)
        )

    def _moved(self, computation: dict[str, Instruction], instruction: Instruction) -> int:
        operands = [computation[operand].shape for operand in instruction.operands]
        sizes = [n_bytes_of(shape, on_chip=False) for shape in operands]
        result = n_bytes_of(instruction.shape, on_chip=False)
        if instruction.opcode == "fusion":
            (called,) = called_by(instruction)
            return self._moved_by_fusion(self.computations[called], sizes, result)
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
                before = self.computations[name][instruction.operands[0]].shape
                if instruction.opcode == "transpose" or _order(before) != _order(instruction.shape):
                    total += times
        return total


def called_by(instruction: Instruction) -> list[str]:
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
