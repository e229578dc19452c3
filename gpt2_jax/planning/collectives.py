"""The collectives of a compiled program: between which devices, how many bytes, and what runs beside them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gpt2_jax.planning.hlo import COLLECTIVES, HloModule, Instruction, called_by, n_bytes_of

# For example mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}: the devices of a mesh, grouped along some of its axes.
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{((?:'\w+',? ?)+)\}"
)
# Between TPU slices, the runtime exchanges what each device sends to its host.
BETWEEN_SLICES = re.compile(r'"xla_megascale_runtime",_xla_host_transfer_rendezvous="([a-z\-]+)')
WORK = {"fusion", "custom-call", "while", "call", "conditional", "dot", "convolution"}
MATMULS = {"dot", "convolution"}  # On TPU, matmuls are convolutions.
# Libraries' matmuls and convolutions, and attention kernels.
MATMUL_KERNELS = re.compile(
    r'custom_call_target="(__cublas\$(gemm|lt)|__cudnn\$(conv|fmha)|__onednn\$matmul|__triton_gemm|tpu_custom_call)'
)


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


def read_collectives(module: HloModule, mesh_shape: dict[str, int], slices: Sequence[int] = ()) -> list[Collective]:
    """The collectives of one run of a program, most bytes first.

    Args:
        mesh_shape: axis names and sizes. The program numbers its devices in the order of the mesh.
        slices: the slice of each device, in the order of the mesh; by default there is one.
    """
    slice_of = np.array(slices or [0] * math.prod(mesh_shape.values())).reshape(list(mesh_shape.values()))
    found: dict[tuple[str, tuple[str, ...], int, int], np.ndarray] = {}
    for name, times in module.runs.items():
        for computation, instruction, *overlapped in _calls(module, name):
            if not (group := _group(instruction, mesh_shape, slice_of)):
                continue
            operands = module.computations[computation]
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


def _multiplies(module: HloModule, instruction: Instruction) -> bool:
    """Whether an instruction, or one that it calls, is a matmul, a convolution or an attention kernel."""
    if instruction.opcode in MATMULS:
        return True
    if instruction.opcode == "custom-call":
        return bool(MATMUL_KERNELS.search(instruction.attributes))
    called = re.findall(r"body=%?([\w.\-]+)", instruction.attributes) + called_by(instruction)
    return instruction.opcode in WORK and any(
        _multiplies(module, inner) for name in called for inner in module.computations[name].values()
    )


def _calls(module: HloModule, name: str) -> Iterator[tuple[str, Instruction, bool, bool]]:
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
    for outer in module.computations[name].values():
        fused = [module.within(called) for called in called_by(outer)] if outer.opcode == "fusion" else []
        inside = [(name, outer), *itertools.chain.from_iterable(fused)]
        collectives = [each for each in inside if each[1].opcode.removesuffix("-start") in (*COLLECTIVES, "send")]
        for computation, instruction in collectives:
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            call = f"chain {chain[1]}" if chain else instruction.name
            if call in calls and "estimated_cycles" in outer.attributes:
                overlapped.add(call)
                beside_matmuls |= {call} if _multiplies(module, outer) else set()
            calls.setdefault(call, (computation, instruction))
            if instruction.opcode.endswith("-start") or instruction.opcode == "send":
                running.add(call)
        if outer.opcode in WORK and not collectives:
            overlapped |= running
            beside_matmuls |= running if _multiplies(module, outer) else set()
        running -= set(outer.operands) if outer.opcode.endswith("-done") else set()
    for call, (computation, instruction) in calls.items():
        yield computation, instruction, call in overlapped, call in beside_matmuls


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
