"""The device mesh, and the placement of parameters and batches on it.

The axis `data` replicates the model and shards the batch. The axis `fsdp` shards the batch too, and the parameters,
gradients and optimizer state. Plain data parallelism is `fsdp` = 1. `gather` all-gathers sharded parameters.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import MeshConfig, TrainConfig
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import slice_of
from gpt2_jax.layers import is_stacked

BATCH_AXES = ("data", "fsdp")


def devices_for(batch_sizes: Sequence[int], config: MeshConfig) -> Sequence[jax.Device]:
    """The devices that a run takes: all, or as many as its batches divide over.

    A batch of 4 sequences trains on 4 of 8 devices, rather than on none. A mesh that the config names is taken as it
    is, and so are the devices of several processes, which all have to take part.
    """
    devices = jax.devices()
    if config != MeshConfig() or jax.process_count() > 1:
        return devices
    sizes = [size for size in range(len(devices), 0, -1) if all(batch % size == 0 for batch in batch_sizes)]
    if devices[0].platform == "tpu":  # other parts of a slice may not be boxes, which its links need
        sizes = [size for size in sizes if len(devices) % size == 0]
    return devices[: sizes[0]]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all by default).

    Where several slices are joined by a slower network (TPU slices, hosts of GPUs), `fsdp` stays within a slice and
    `data` crosses them, as in JAX's `create_hybrid_device_mesh`. Only an `fsdp` of whole slices crosses them too.

    Raises:
        UserError: the axes do not multiply to the number of devices, or do not map onto a slice or onto whole slices.
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
    slices = [list(group) for _, group in itertools.groupby(sorted(devices, key=slice_of), slice_of)]
    sizes = {len(group) for group in slices}
    within = math.gcd(*sizes)  # the largest `fsdp` within every slice
    if within % fsdp == 0:
        parts = [_slice_mesh(len(group) // fsdp, fsdp, group) for group in slices]
    elif len(sizes) == 1 and fsdp % within == 0:
        parts = [_slice_mesh(1, within, group) for group in slices]
    else:
        raise UserError(
            f"mesh.fsdp = {fsdp} neither fits into a slice or host of {within} devices nor fills several; "
            f"type --mesh.data -1 --mesh.fsdp {within}"
        )
    # Auto axes: `nn.Embed`'s gather fails under explicit ones.
    return Mesh(np.concatenate(parts).reshape(data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def _slice_mesh(data: int, fsdp: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice in the order of its physical links: [data, fsdp]."""
    try:
        return jax.make_mesh((data, fsdp), BATCH_AXES, devices=devices).devices
    except NotImplementedError as error:  # on most TPUs, JAX gives a mesh axis only whole dimensions of the slice
        dims = [len(set(coordinates)) for coordinates in zip(*(device.coords for device in devices), strict=True)]
        sizes = {math.prod(some) for count in range(len(dims) + 1) for some in itertools.combinations(dims, count)}
        raise UserError(
            f"mesh.fsdp = {fsdp} does not map onto a {'x'.join(map(str, dims))} slice; type "
            f"--mesh.data -1 --mesh.fsdp {min(size for size in sizes if size > fsdp)}"
        ) from error


def state_sharding(mesh: Mesh, shapes: Any) -> Any:
    """One `NamedSharding` per array of a tree of shapes: parameters, moments or a whole state.

    The largest dimension that `fsdp` divides is sharded. An array without such a dimension is replicated. So are
    vectors: gathering them costs more than their memory. The layer axis of stacked layers is not sharded or counted.
    """
    fsdp = mesh.shape["fsdp"]

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        stacked = is_stacked(path)
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0 and axis >= stacked]
        if fsdp == 1 or len(leaf.shape) - stacked < 2 or not divisible:
            return NamedSharding(mesh, P())
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*(None,) * largest, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, shapes)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct` from a tree of shapes and dtypes and a tree of shardings."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)


def gather(params: Any, specs: Any, dtype: jnp.dtype) -> Any:
    """All-gathers parameters over `fsdp`, in a function that is manual over it.

    The backward pass is a reduce-scatter of the gradients.

    Args:
        params: tree of shards.
        specs: tree of `PartitionSpec` from `state_sharding`.
        dtype: compute dtype. Values are rounded to it before they are sent. The gathered arrays keep the dtype of the
            shards, so that the model and its gradients are those of a single device.
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
    # Sum in float32, like the gradients over `data`. JAX's own transpose would round every partial sum to `dtype`.
    return (jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def batch_sharding(mesh: Mesh, *, leading_axis: bool) -> NamedSharding:
    """The sharding of [batch, time] arrays, or with `leading_axis` of [micro_batches, batch, time] arrays."""
    return NamedSharding(mesh, P(None, BATCH_AXES) if leading_axis else P(BATCH_AXES))


def abstract_batch(config: TrainConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape and sharding of the tokens of one update: int32 [micro_batches, sequences, block_size + 1].

    Raises:
        UserError: as `num_micro_batches`.
    """
    count = num_micro_batches(config.batch_size, config.micro_batch_limit, mesh)
    shape = (count, config.batch_size // count, config.model.block_size + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, leading_axis=True))


def micro_batch_size(batch_size: int, limit: int, n_devices: int) -> int:
    """Sequences per device and forward pass for a global batch: at most `limit`, where 0 means no limit."""
    per_device = batch_size // n_devices
    return min(limit or per_device, per_device)


def num_micro_batches(batch_size: int, limit: int, mesh: Mesh) -> int:
    """The number of micro-batches that each device runs, one after the other, in an update.

    Args:
        batch_size: global sequences.
        limit: the most sequences per device and forward pass, `micro_batch_size` in a config; 0 for no limit.

    Raises:
        UserError: the batch does not divide over devices and micro-batches.
    """
    per_device, left = divmod(batch_size, mesh.size)
    if left:
        below = batch_size - left
        choices = f"{below} or {below + mesh.size}" if below else f"{mesh.size}"
        raise UserError(
            f"a batch of {batch_size} sequences does not divide over {mesh.size} devices; set batch_size or "
            f"batch_ramp to {choices}"
        )
    size = micro_batch_size(batch_size, limit, mesh.size)
    if per_device % size:
        divisor = next(smaller for smaller in range(size, 0, -1) if per_device % smaller == 0)
        raise UserError(
            f"micro_batch_size = {size} does not divide the {per_device} sequences per device of a batch of "
            f"{batch_size} over {mesh.size} devices; type --micro_batch_size {divisor}"
        )
    return per_device // size


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices of the sequences of a global batch that are on this process's devices, in ascending order.

    They are not always contiguous: on TPU, `jax.make_mesh` orders devices by the physical links, so devices of one
    host may be apart.
    """
    sharding = batch_sharding(mesh, leading_axis=False)
    indices = np.arange(batch_size)
    parts = [indices[index] for index in sharding.addressable_devices_indices_map((batch_size,)).values()]
    return np.unique(np.concatenate(parts))


def put_batch(batch: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Makes the global array from this process's rows of a batch, in the order of `local_rows`."""
    with jax.transfer_guard_host_to_device("allow"):  # JAX counts this transfer as explicit in a single process only
        return jax.make_array_from_process_local_data(sharding, batch)
