"""The device mesh, and where parameters and batches live on it.

Axes: `data` replicates the model and splits the batch; `fsdp` splits the batch too, and the parameters,
gradients and optimizer state. Plain data parallelism is `fsdp` = 1. Where split parameters are needed whole,
`gather` makes them so.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import MeshConfig, TrainConfig, UserError

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

    The largest dimension that `fsdp` divides is split; an array without one stays whole. So do vectors: they are
    small, and to gather one costs more than its memory. Scanned layers stand under `h` with one axis more, which is
    neither counted nor split.
    """
    fsdp = mesh.shape["fsdp"]

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        stacked = any(getattr(key, "key", None) == "h" for key in path)
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0 and axis >= stacked]
        if fsdp == 1 or len(leaf.shape) - stacked < 2 or not divisible:
            return NamedSharding(mesh, P())
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*(None,) * largest, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, shapes)


def gather(params: Any, specs: Any, dtype: jnp.dtype) -> Any:
    """Whole parameters from one device's parts of them, in a function that is manual over `fsdp`.

    Args:
        params: tree of arrays, each the part that its spec leaves on a device.
        specs: tree of `PartitionSpec`, as of `state_sharding`.
        dtype: what parameters are computed with. The values are rounded to it and travel in it; the arrays keep
            their own dtype, so that the model and its gradients are as they are on one device.

    The gradient of a part is the sum over the devices of their gradients of the whole.
    """
    return jax.tree.map(
        lambda part, spec: _gather(part, spec.index("fsdp"), dtype) if "fsdp" in spec else part, params, specs
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True).astype(part.dtype)


def _gather_forward(part: jax.Array, axis: int, dtype: jnp.dtype) -> tuple[jax.Array, None]:
    return _gather(part, axis, dtype), None


def _gather_backward(axis: int, dtype: jnp.dtype, _: None, grad: jax.Array) -> tuple[jax.Array]:
    # Summed in float32, as gradients are over `data`: JAX's own transpose would round every partial sum to `dtype`.
    return (jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def batch_sharding(mesh: Mesh, *, micro_batches: bool) -> NamedSharding:
    """Of [batch, time] arrays, or with `micro_batches` of [micro_batches, batch, time] ones."""
    return NamedSharding(mesh, P(None, BATCH_AXES) if micro_batches else P(BATCH_AXES))


def abstract_batch(config: TrainConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Of the tokens of an update: int32 [micro_batches, sequences, block_size + 1].

    Raises:
        UserError: as `micro_batches`.
    """
    count = micro_batches(config.batch_size, config.micro_batch_size, mesh)
    shape = (count, config.batch_size // count, config.model.block_size + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, micro_batches=True))


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
