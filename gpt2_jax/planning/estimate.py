"""What an update costs on some devices: compiles the training step for them, and reads memory, collectives and FLOPs.

What it says of time is arithmetic on the makers' data sheets, not a measurement.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gpt2_jax import attention
from gpt2_jax.config import TrainConfig
from gpt2_jax.data.tokenizer import vocab_size
from gpt2_jax.hardware import Chip, chip_of, hardware_of, host_of
from gpt2_jax.metrics import flops_per_token
from gpt2_jax.model import n_params
from gpt2_jax.planning.hlo import Collective, Part, Program, flops
from gpt2_jax.resolve import build_model, matmul_precision, resolve
from gpt2_jax.sharding import abstract_batch, make_mesh
from gpt2_jax.step import abstract_state, make_train_step


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
        compiled: products and memory together, as the TPU compiler estimates them, and at the peak the attention
            kernels, of which it has no estimate; None for GPUs.
    """

    compute: float
    memory: float
    links: float
    compiled: float | None

    @property
    def least(self) -> float:
        """If all overlaps."""
        return max(self.compiled or max(self.compute, self.memory), self.links)

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
        attention_copies: arrays that are copied around them into another layout, in one update on each device.
        parameters: name, shape and placement of each.
        micro_batches: per update.
        model_flops: of one update, on all devices, by 6 N + 12 L C T.
        hardware_flops: of one update, on all devices: of the products in the program.
        traffic: bytes that a device reads and writes in its memory in one update.
        cycles: of a TPU core in one update outside attention kernels, by the compiler's estimate; 0 for other chips.
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
    attention_copies: int
    parameters: tuple[tuple[str, tuple[int, ...], str], ...]
    micro_batches: int
    memory: Memory
    model_flops: float
    hardware_flops: float
    traffic: int
    cycles: int
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
    config, choice = resolve(config, hardware_of(devices[0]))
    if not config.model.vocab_size:
        n_vocab = vocab_size(config.data.tokenizer, config.data.characters)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=n_vocab))
    mesh = make_mesh(config.mesh, devices)
    tokens = abstract_batch(config, mesh)
    model = build_model(config, choice)
    state = abstract_state(model, config.optimizer, mesh)
    with jax.default_matmul_precision(matmul_precision(config.dtype)):
        step = make_train_step(model, config.optimizer, mesh, config.seed)
        traced = step.trace(state, tokens)
        arguments = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
        )
        compiled = _compile(traced.lower(), arguments)
    memory = _memory(compiled, devices[0])
    program = Program(compiled.as_text() or "")
    traffic, cycles = program.memory_traffic(), program.estimated_cycles()
    products = flops(traced.jaxpr)
    collectives = tuple(program.collectives(dict(mesh.shape)))
    size = n_params(state.params, config.model)
    per_token = flops_per_token(config.model, size)
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
        attention_copies=program.relayouts(IN_ATTENTION),
        parameters=tuple(_parameters(state.params)),
        micro_batches=tokens.shape[0],
        memory=memory,
        model_flops=per_token * config.batch_size * config.model.block_size,
        hardware_flops=sum(products.values()),
        traffic=traffic,
        cycles=cycles,
        collectives=collectives,
        estimate=_estimate(chip, traffic, cycles, products, collectives, mesh) if chip else None,
    )


ATTENTION_KERNELS = r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w+)"'
IN_ATTENTION = r'op_name="[^"]*/attn/'

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
    traffic: int,
    cycles: int,
    products: dict[Part, float],
    collectives: Sequence[Collective],
    mesh: Mesh,
) -> Estimate:
    kernels = products["attention"] / mesh.size / chip.flops
    return Estimate(
        compute=sum(products.values()) / mesh.size / chip.flops,
        memory=traffic / chip.bandwidth,
        links=sum(one.sent() / _speed(chip, one.axes, mesh) for one in collectives),
        compiled=cycles / chip.clock + kernels if cycles else None,
    )


def _speed(chip: Chip, axes: tuple[str, ...], mesh: Mesh) -> float:
    """Bytes per second that each of the devices along some mesh axes can send to the others at the same time."""
    group = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)]
    hosts = collections.Counter(host_of(device) for device in group.flat)
    if not chip.network or len(hosts) == 1:
        return chip.link
    return min(chip.link, chip.network * min(hosts.values()))  # the ring runs in parallel through all ports of a host
