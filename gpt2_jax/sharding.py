"""The device mesh, and where parameters and batches live on it.

Axes: `data` replicates the model and splits the batch; `fsdp` splits the batch too, and the parameters,
gradients and optimizer state. Plain data parallelism is `fsdp` = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import MeshConfig, UserError

BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all by default).

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp = config.data, config.fsdp
    if data == -1:
        data = len(devices) // fsdp
    elif fsdp == -1:
        fsdp = len(devices) // data
    if data * fsdp != len(devices):
        raise UserError(
            f"mesh.data = {config.data} × mesh.fsdp = {config.fsdp} does not make the {len(devices)} devices here; "
            "type --mesh.data -1 --mesh.fsdp 1"
        )
    # Auto axes: Flax modules know nothing of explicit ones, and `nn.Embed`'s gather fails under them.
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def state_sharding(mesh: Mesh, shapes: Any) -> Any:
    """One `NamedSharding` per array of a tree of shapes: parameters, moments or a whole state.

    The largest dimension that `fsdp` divides is split. Vectors stay whole (unless layers are stacked): they are
    small, and a layer norm's gather costs more than its memory.
    """
    fsdp = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
        if fsdp == 1 or len(leaf.shape) < 2 or not divisible:
            return NamedSharding(mesh, P())
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*(None,) * largest, "fsdp"))

    return jax.tree.map(place, shapes)


def batch_sharding(mesh: Mesh, *, micro_batches: bool) -> NamedSharding:
    """Of [batch, time] arrays, or with `micro_batches` of [micro_batches, batch, time] ones."""
    return NamedSharding(mesh, P(None, BATCH_AXES) if micro_batches else P(BATCH_AXES))


def micro_batches(batch_size: int, micro_batch_size: int, mesh: Mesh) -> int:
    """How many micro-batches each device computes one after the other to make a global batch.

    Args:
        batch_size: global sequences.
        micro_batch_size: the most sequences per device at a time; 0 for no limit.

    Raises:
        UserError: the batch does not divide over devices and micro-batches.
    """
    per_device, left = divmod(batch_size, mesh.size)
    if left:
        below = batch_size - left
        choices = f"{below} or {below + mesh.size}" if below else f"{mesh.size}"
        raise UserError(
            f"a batch of {batch_size} sequences does not divide over {mesh.size} devices; take {choices} in batch_size "
            "or batch_ramp"
        )
    micro = min(micro_batch_size or per_device, per_device)
    if per_device % micro:
        divisor = next(size for size in range(micro, 0, -1) if per_device % size == 0)
        raise UserError(
            f"micro_batch_size = {micro} does not divide the {per_device} sequences per device of a batch of "
            f"{batch_size} over {mesh.size} devices; type --micro_batch_size {divisor}"
        )
    return per_device // micro


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The numbers of the sequences of a batch that the devices of this process hold, in order.

    They need not follow on one another: on TPU, `jax.make_mesh` orders devices by the wires between them, so that
    those of one host may stand apart.
    """
    sharding = batch_sharding(mesh, micro_batches=False)
    numbers = np.arange(batch_size)
    parts = [numbers[index] for index in sharding.addressable_devices_indices_map((batch_size,)).values()]
    return np.unique(np.concatenate(parts))


def put_batch(batch: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """This process's rows of a global batch, as `local_rows` has them -> the global array, each device its share."""
    with jax.transfer_guard_host_to_device("allow"):  # explicit, though JAX counts it so in a single process only
        return jax.make_array_from_process_local_data(sharding, batch)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps the batch of an activation split where the compiler chooses placements.

    Without it GSPMD splits the residual stream by features, after the weights, and moves activations
    all-to-all in every block.
    """
    axes = tuple(axis for axis in jax.sharding.get_abstract_mesh().auto_axes if axis in BATCH_AXES)
    return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x
