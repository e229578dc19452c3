"""Compiles the training step for given devices and reads memory, collectives, FLOPs and estimated times from it.

The times are arithmetic on data-sheet figures, not measurements.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gpt2_jax import attention
from gpt2_jax.compiler_options import compiler_options
from gpt2_jax.config import TrainConfig
from gpt2_jax.data.tokenizer import vocab_size
from gpt2_jax.hardware import GIB, Chip, chip_of, hardware_of, host_of, slice_of
from gpt2_jax.metrics import flops_per_token
from gpt2_jax.model import n_params
from gpt2_jax.planning.collectives import Collective, read_collectives
from gpt2_jax.planning.flops import Part, flops
from gpt2_jax.planning.hlo import HloModule
from gpt2_jax.resolve import build_model, matmul_precision, resolve
from gpt2_jax.sharding import abstract_batch, make_mesh
from gpt2_jax.step import abstract_state, make_train_step

ATTENTION_KERNELS = r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w+)"'
IN_ATTENTION = r'op_name="[^"]*/attn/'


class Memory(NamedTuple):
    """Bytes on one device: the peak that the program requires, and the capacity, None where that is unknown."""

    required: int
    available: int | None

    @property
    def fits(self) -> bool:
        """True if the capacity suffices or is unknown."""
        return self.available is None or self.required <= self.available

    def __str__(self) -> str:
        available = f" of {self.available / GIB:.3g}" if self.available else ""
        return f"{self.required / GIB:.3g}{available} GiB"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds that one update keeps each resource of a device busy.

    Attributes:
        compute: matmuls at the chip's peak.
        memory: all reads and writes at the memory bandwidth.
        communication: all collectives at the link speed, with ring algorithms.
        compiler_estimate: the TPU compiler's estimate of compute and memory together, plus the attention kernels at the
            peak, for which the compiler has no estimate. None for GPUs.
    """

    compute: float
    memory: float
    communication: float
    compiler_estimate: float | None

    @property
    def lower_bound(self) -> float:
        """Seconds if everything overlaps."""
        return max(self.compiler_estimate or max(self.compute, self.memory), self.communication)

    @property
    def upper_bound(self) -> float:
        """Seconds if nothing overlaps, still at these speeds."""
        return (self.compiler_estimate or self.compute + self.memory) + self.communication

    def __str__(self) -> str:
        return f"{1000 * self.lower_bound:.0f} to {1000 * self.upper_bound:.0f} ms"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one update of a config on given devices.

    Attributes:
        config: resolved.
        where: the topology, or this machine.
        kind: JAX's name of the chip.
        attention: the chosen backend, and why the others were rejected.
        attention_kernels: calls of attention kernels on each device.
        attention_copies: copies around those kernels that change an array's layout, on each device.
        parameters: name, shape and placement of each parameter.
        micro_batches: number of micro-batches.
        memory: required and available on one device.
        model_flops: by 6 N + 12 L C T per token, on all devices together.
        hardware_flops: FLOPs of the matmuls in the program, on all devices together.
        hbm_bytes: bytes that one device reads from and writes to its main memory.
        cycles: TPU cycles outside attention kernels, as the compiler estimates them; 0 for other chips.
        estimate: None if the chip's figures are unknown.
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
    hbm_bytes: int
    cycles: int
    collectives: tuple[Collective, ...]
    estimate: Estimate | None

    @property
    def tokens(self) -> int:
        """Tokens per update."""
        return self.config.batch_size * self.config.model.block_size

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilization of an update that takes `seconds`."""
        assert self.estimate is not None
        return self.model_flops / self.hardware_flops * self.estimate.compute / seconds


class TooLargeError(Exception):
    """The program requires more memory than a device has."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory


class CompiledStep(NamedTuple):
    """The training step of a config, compiled for given devices.

    Attributes:
        config: resolved.
        attention: the chosen backend.
        params, tokens: shapes and placements of the parameters and of the batch.
        jaxpr: the traced step.
        program: the compiled step.
        memory: what it requires on each device, and what there is.
    """

    config: TrainConfig
    attention: attention.Choice
    mesh: Mesh
    params: Any
    tokens: jax.ShapeDtypeStruct
    jaxpr: Any
    program: jax.stages.Compiled
    memory: Memory


def compile_step(config: TrainConfig, devices: Sequence[jax.Device], available: int | None = None) -> CompiledStep:
    """Compiles the training step of a config.

    Args:
        config: validated, without "auto" in the place of micro-batch size and rematerialization.
        devices: attached ones, or those of `topologies.devices_of`.
        available: bytes on each device; by default the memory of the chip.

    Raises:
        UserError: config and devices do not fit together.
        TooLargeError: the program requires more memory than a device has.
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
        options = compiler_options(config, hardware_of(devices[0]))
        measured = config.log.noise_scale, config.log.layers > 0
        step = make_train_step(model, config.optimizer, mesh, config.seed, options, *measured)
        traced = step.trace(state, tokens)
        program = _compile(traced.lower(), state)
    chip = chip_of(devices[0])
    memory = Memory(program_memory(program), available or (int(chip.memory) if chip else None))
    if not memory.fits:
        raise TooLargeError(memory)
    return CompiledStep(config, choice, mesh, state.params, tokens, traced.jaxpr, program, memory)


def make_plan(config: TrainConfig, devices: Sequence[jax.Device], where: str) -> Plan:
    """Compiles the training step of a config and reads its cost from the program.

    Args:
        config: as for `compile_step`.
        devices: as for `compile_step`.
        where: name of the devices.

    Raises:
        UserError: config and devices do not fit together.
        TooLargeError: the program requires more memory than a device has.
    """
    config, choice, mesh, params, tokens, jaxpr, program, memory = compile_step(config, devices)
    module = HloModule(program.as_text() or "")
    hbm_bytes, cycles = module.hbm_bytes(), module.estimated_cycles()
    parts = flops(jaxpr)
    collectives = tuple(read_collectives(module, dict(mesh.shape), [slice_of(device) for device in mesh.devices.flat]))
    size = n_params(params, config.model)
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
        attention_kernels=module.count(ATTENTION_KERNELS),
        attention_copies=module.relayouts(IN_ATTENTION),
        parameters=tuple(_parameters(params)),
        micro_batches=tokens.shape[0],
        memory=memory,
        model_flops=per_token * config.batch_size * config.model.block_size,
        hardware_flops=sum(parts.values()),
        hbm_bytes=hbm_bytes,
        cycles=cycles,
        collectives=collectives,
        estimate=_estimate(chip, hbm_bytes, cycles, parts, collectives, mesh.size) if chip else None,
    )


def required_memory(lowered: jax.stages.Lowered, state: Any) -> int:
    """Bytes that a program requires on one device. It is compiled for that.

    Args:
        lowered: the program.
        state: shapes and placements of its largest arguments, which count if the compiler refuses the program.
    """
    try:
        return program_memory(_compile(lowered, state))
    except TooLargeError as error:
        return error.memory.required


def _compile(lowered: jax.stages.Lowered, state: Any) -> jax.stages.Compiled:
    """Compiles a program with a given state among its arguments.

    Raises:
        TooLargeError: the compiler refuses a program that the device has no memory for.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        numbers = parse_out_of_memory(str(error))
        if numbers is None:
            raise
        temporaries, available = numbers
        raise TooLargeError(Memory(_bytes_on_device(state) + temporaries, available)) from error


def _bytes_on_device(tree: Any) -> int:
    """Bytes of arrays on one device, by their shapes and placements."""
    leaves = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in leaves)


def parse_out_of_memory(message: str) -> tuple[int, int] | None:
    """(bytes of temporaries, bytes of the device) from the TPU compiler's error for a program that is too large.

    Returns:
        None for any other error.
    """
    number = r"([\d.]+)([KMGT])"
    found = re.search(rf"(?:Used |temporaries \(){number}\)?(?: of | exceeds available HBM \(){number}", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, used_unit, limit, limit_unit = found.groups()
    return int(float(used) * units[used_unit]), int(float(limit) * units[limit_unit])


def program_memory(program: jax.stages.Compiled) -> int:
    """Bytes on one device while a program runs: arguments, results, temporaries and code."""
    stats: Any = program.memory_analysis()
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


def _parameters(params: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and placement of each parameter."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(str(key.key) for key in path)
        split = [f"dimension {axis} over {part}" for axis, part in enumerate(leaf.sharding.spec) if part]
        yield name, tuple(leaf.shape), ", ".join(split) or "whole on each device"


def _estimate(
    chip: Chip,
    hbm_bytes: int,
    cycles: int,
    parts: dict[Part, float],
    collectives: Sequence[Collective],
    devices: int,
) -> Estimate:
    kernels = parts["attention"] / devices / chip.flops
    return Estimate(
        compute=sum(parts.values()) / devices / chip.flops,
        memory=hbm_bytes / chip.bandwidth,
        communication=sum(collective.sent() / _link_speed(chip, collective) for collective in collectives),
        compiler_estimate=cycles / chip.clock + kernels if cycles and chip.clock else None,
    )


def _link_speed(chip: Chip, collective: Collective) -> float:
    """Bytes per second that each device can send in a collective while all others send as well."""
    if not chip.network or collective.slices == 1:
        return chip.link
    # Parallel rings use all network ports of a slice.
    return min(chip.link, chip.network * collective.devices / collective.slices)
