"""Fingerprints of arrays: one number that changes with any bit, whatever the placement or layout of the arrays.

The fingerprint of a tree is the sum of a hash of every element, modulo 2^32. The hash mixes the element's bits with its
place in the array and the array's name, by the finalizer of MurmurHash3 (Appleby 2011), a bijection. So a change of one
element always changes the sum, and any other change goes unnoticed once in 2^32 times. Integers add up to the same sum
in any order: on any mesh, with any number of processes, with layers stacked or not. Zeros count 0, so the padding of
the vocabulary changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.layers import STACKED, is_stacked

CHUNK = 1 << 16  # elements hashed at once on the host: its arrays fit the processor's cache

Array = TypeVar("Array", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class StateFingerprint:
    """The fingerprint of a training state, with what each device contributes to it.

    Attributes:
        table: uint32 [data, fsdp, 2, 2]: of each device, its sums over parameters and over the rest of the state, each
            over the arrays that `fsdp` shards and over those that are replicated.
    """

    table: np.ndarray

    @property
    def params(self) -> str:
        """The fingerprint of the parameters, eight hex digits: that of their exports too."""
        return self._total(slice(0, 1))

    @property
    def state(self) -> str:
        """The fingerprint of parameters, optimizer state and step, eight hex digits."""
        return self._total(slice(None))

    def _total(self, part: slice) -> str:
        sharded, replicated = self.table[0, :, part, 0].sum(), self.table[0, 0, part, 1].sum()
        return to_hex(int(sharded) + int(replicated))

    def deviating(self) -> list[int]:
        """Positions in the flattened mesh of the devices whose copies differ from those of most others.

        With two replicas there is no majority: then both are named.
        """
        data, fsdp = self.table.shape[:2]
        # Shards have a copy on each device along `data`, replicated arrays on all devices.
        sharded = np.broadcast_to(self.table[..., 0].transpose(1, 0, 2)[:, :, None], (fsdp, data, 1, 2))
        odd: set[int] = set()
        for shard in range(fsdp):
            odd |= {row * fsdp + shard for row in _minority(sharded[shard].reshape(data, -1))}
        return sorted(odd | set(_minority(self.table[..., 1].reshape(data * fsdp, -1))))


def _minority(copies: np.ndarray) -> list[int]:
    """The rows that differ from the most frequent one; all if two kinds are equally frequent."""
    _, kind, counts = np.unique(copies, axis=0, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return []
    most = np.flatnonzero(counts == counts.max())
    return [row for row, which in enumerate(kind.flatten()) if len(most) > 1 or which != most[0]]


def make_state_fingerprint(mesh: Mesh, abstract_state: Any) -> Callable[[Any], StateFingerprint]:
    """A function from a training state to its fingerprint, computed where the arrays are.

    It reads the state once. The only collective gathers 16 bytes of each device.

    Args:
        mesh: the mesh of the state, with the axes `data` and `fsdp`.
        abstract_state: shapes and shardings of the state: a named tuple with the field `params`.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_state)
    by_device, replicated = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    zeros = jax.jit(lambda: jnp.zeros((mesh.size, 2, 2), jnp.uint32), out_shardings=by_device)
    gather = jax.jit(lambda table: table, out_shardings=replicated)
    salts = [_salts(path, leaf.shape) for path, leaf in leaves]
    cells = [np.array([path[0].name != "params", "fsdp" not in leaf.sharding.spec], np.int32) for path, leaf in leaves]
    placed = list(zip(*jax.device_put((salts, cells), replicated), strict=True))  # once: it takes longer than hashing

    def fingerprint(state: Any) -> StateFingerprint:
        table = zeros()
        for (path, leaf), array, (salt, cell) in zip(leaves, jax.tree.leaves(state), placed, strict=True):
            table = _add(table, array, salt, cell, leaf.sharding, is_stacked(path))
        return StateFingerprint(np.asarray(gather(table)).reshape(*mesh.devices.shape, 2, 2))

    return fingerprint


# A program per shape, not one for all arrays, which would take 10 s to compile for 124M on CPU.
@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def _add(
    table: jax.Array, array: jax.Array, salts: jax.Array, cell: jax.Array, sharding: NamedSharding, stacked: bool
) -> jax.Array:
    """Adds the hash of each device's shard of an array to a cell of the device's row: `table` is [devices, 2, 2]."""
    mesh, spec = sharding.mesh, sharding.spec
    by_device = P(mesh.axis_names)

    def add(table: jax.Array, shard: jax.Array, salts: jax.Array, cell: jax.Array) -> jax.Array:
        place = _places(array.shape, spec, shard.shape, stacked)
        salts = salts.reshape(-1, *(1,) * (shard.ndim - 1)) if stacked else salts[0]
        total = jnp.sum(_hash(_bits(shard), place, salts), dtype=jnp.uint32)
        return table.at[0, cell[0], cell[1]].add(total)

    # check_vma would demand that replicas are equal, which is the question here.
    specs = (by_device, spec, P(), P())
    added = jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=by_device, check_vma=False)
    return added(table, array, salts, cell)


def array_hash(name: str, array: np.ndarray) -> int:
    """The part of an array on the host in a fingerprint: `to_hex` of the sum of all parts is the fingerprint.

    Args:
        name: such as "h_0/attn/c_attn/kernel".
        array: C-contiguous, with elements of 4 bytes.
    """
    flat = array.reshape(-1).view(np.uint32)
    salt = np.uint32(zlib.crc32(name.encode()))
    total = 0
    for start in range(0, len(flat), CHUNK):
        bits = flat[start : start + CHUNK]
        place = np.arange(start, start + len(bits)).astype(np.uint32)
        total += int(_hash(bits, place, salt).sum(dtype=np.uint64))
    return total


def to_hex(total: int) -> str:
    """A sum of hashes as a fingerprint, eight hex digits."""
    return f"{total % 2**32:08x}"


def _salts(path: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A hash of the array's name, uint32 [1]; of each layer's for stacked layers, uint32 [n_layer]."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    keys = keys[1:] if keys[0] == "params" else keys  # the names in exports

    def name(layer: int) -> str:
        return "/".join(f"{STACKED}_{layer}" if key == STACKED else key for key in keys)

    layers = shape[0] if is_stacked(path) else 1
    return np.array([zlib.crc32(name(layer).encode()) for layer in range(layers)], np.uint32)


def _places(shape: tuple[int, ...], spec: P, local: tuple[int, ...], stacked: bool) -> jax.Array:
    """The row-major index of each element of a shard in the whole array, uint32; in its layer for stacked layers."""
    place = jnp.zeros(local, jnp.uint32)
    for axis in range(int(stacked), len(local)):
        index = jax.lax.broadcasted_iota(jnp.uint32, local, axis)
        if axis < len(spec) and spec[axis] == "fsdp":
            index += jax.lax.axis_index("fsdp").astype(jnp.uint32) * jnp.uint32(local[axis])
        place += index * jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    return place


def _bits(leaf: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)


def _hash(bits: Array, place: Array, salt: Any) -> Array:
    """The hash of each element; 0 for zeros."""
    return _mix(bits ^ _mix(place ^ salt)) * (bits != 0)


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3: a bijection of uint32; all bits affect all bits."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
