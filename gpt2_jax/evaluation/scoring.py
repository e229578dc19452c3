"""Scores requests on all devices: packed rows through the model, and logits only where a token is predicted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.activity import tracked
from gpt2_jax.attention import choose
from gpt2_jax.attention.backend import Problem
from gpt2_jax.attention.packed import Packed
from gpt2_jax.compiler_options import Options
from gpt2_jax.evaluation.packing import Rows, Slot, Tree, layout, make_trees, pack
from gpt2_jax.evaluation.requests import Request, Score
from gpt2_jax.hardware import current_hardware
from gpt2_jax.loss import head_logits
from gpt2_jax.model import GPT2, Params
from gpt2_jax.resolve import matmul_precision
from gpt2_jax.sharding import BATCH_AXES, local_rows, put_batch
from gpt2_jax.step import gather_params, mesh_axis, param_specs, shard_map

# Tokens that a device reads in a call.
TOKENS_PER_CALL = 16384
CPU_TOKENS_PER_CALL = 2048  # more do not speed up a CPU
CHUNK = 256  # targets whose logits exist at the same time


class Scorer:
    """Computes log-probabilities of continuations.

    The results are bit for bit the same for any number of devices of one kind: a device always computes the same
    number of rows at a time.

    Args:
        model: the model. The fastest attention backend computes rows with a single text.
        mesh: the devices. All processes score the same requests together.
        options: those of XLA.
    """

    def __init__(self, model: GPT2, mesh: Mesh, options: Options | None = None) -> None:
        self.model, self._mesh, self._step = model, mesh, make_score_step(model, mesh, options)

    def score(
        self,
        params: Params,
        requests: Sequence[Request],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Score]]:
        """Scores every continuation of every request, in their order.

        Args:
            params: the parameters of the model, placed on the mesh.
            progress: is called with the number of scored continuations. Empty ones are not scored.

        Raises:
            UserError: a request does not fit into the model's `block_size`.
        """
        trees = make_trees(requests, self.model.config.block_size)
        results = [[_EMPTY] * len(request.continuations) for request in requests]
        for done, (slot, score) in enumerate(self._run(params, trees), start=1):
            results[slot.request][slot.continuation] = score
            progress(done)
        return results

    def _run(self, params: Params, trees: Sequence[Tree]) -> Iterator[tuple[Slot, Score]]:
        length, rows = pack(trees, self.model.config.n_embd)
        if not rows:
            return
        at_once = self._mesh.size * self._rows_per_device(length, len(rows))
        # One program for all batches: which rows share one depends on the number of devices.
        single = length <= self.model.config.block_size and all(len(row) == 1 == len(row[0].slots) for row in rows)
        waiting: tuple[Any, list[list[tuple[Slot, int]]]] | None = None
        starts = range(0, len(rows), at_once)
        for start in tracked(starts, len(starts)):
            part = rows[start : start + at_once]
            arrays, scored = layout(part + [[]] * (at_once - len(part)), length)
            # One is computed and one waits. With many that wait, collectives on CPUs can block each other forever.
            running = self._step(params, self._put(arrays), single=single), scored
            if waiting:
                yield from _results(*waiting)
            waiting = running
        if waiting:
            yield from _results(*waiting)

    def _rows_per_device(self, length: int, n_rows: int) -> int:
        """Rows that a device computes in a call: as many as fit, or fewer if that leaves fewer empty in the last call.

        The number of devices has no influence, so that it has none on the results.
        """
        calls = -(-n_rows // max(1, _tokens_per_call(self._mesh) // length))
        return -(-n_rows // calls)

    def _put(self, arrays: Rows[np.ndarray]) -> Rows[jax.Array]:
        sharding = NamedSharding(self._mesh, P(BATCH_AXES))
        here = local_rows(self._mesh, len(arrays.tokens))
        return Rows(*(put_batch(array[here], sharding) for array in arrays))


_EMPTY = Score(np.zeros(0, np.float32), np.zeros(0, bool))


def _results(outputs: Any, scored: list[list[tuple[Slot, int]]]) -> Iterator[tuple[Slot, Score]]:
    log_probs, greedy = jax.device_get(outputs)
    for row, continuations in enumerate(scored):
        start = 0
        for slot, n_tokens in continuations:
            here = slice(start, start + n_tokens)
            yield slot, Score(log_probs[row, here], greedy[row, here])
            start += n_tokens


def make_score_step(model: GPT2, mesh: Mesh, options: Options | None = None) -> jax.stages.Wrapped:
    """The jitted step: (params, rows, single) -> log-probabilities in nats and whether no token is more probable than
    the target, float32 and bool [rows, length], in the order of `Rows.targets`.

    `single` says that every row holds one text, so that the attention backend of the model can compute it.
    """
    axes = mesh_axis(mesh, "data") + mesh_axis(mesh, "fsdp")
    specs = param_specs(model, mesh)
    replicated = NamedSharding(mesh, P())

    def score(params: Params, rows: Rows[jax.Array], *, model: GPT2, single: bool) -> tuple[jax.Array, jax.Array]:
        gathering, params = gather_params(model, params, specs)
        with jax.default_matmul_precision(matmul_precision(model.dtype)):
            if single:
                hidden: Any = gathering.apply({"params": params}, rows.tokens, method="hidden")
            else:
                packed = Packed(rows.positions, rows.segments, rows.parents)
                hidden = gathering.apply({"params": params}, rows.tokens, packed, method="packed_hidden")
            return _score_targets(hidden, params["wte"]["embedding"], rows, model.config.vocab_size)

    def step(params: Params, rows: Rows[jax.Array], single: bool) -> tuple[jax.Array, jax.Array]:
        config = model.config
        # The backend of a training run was chosen for its `block_size`. Rows have other lengths.
        problem = Problem(current_hardware(), model.dtype, rows.tokens.shape[1], config.n_embd // config.n_head, 0.0)
        backend = choose("auto", problem).backend if single else "xla"
        here = model.clone(config=dataclasses.replace(config, attention=backend))
        local = functools.partial(score, model=here, single=single)
        return shard_map(local, here, mesh, set(BATCH_AXES), (specs, P(axes)), P(axes))(params, rows)

    return jax.jit(step, static_argnames="single", out_shardings=(replicated, replicated), compiler_options=options)


def lower_score_step(model: GPT2, mesh: Mesh, params: Params) -> jax.stages.Lowered:
    """The step for the rows that take most memory, lowered to be compiled and not to be run.

    Args:
        params: shapes, dtypes and placements of the parameters.
    """
    length = model.config.block_size
    n_rows = mesh.size * max(1, _tokens_per_call(mesh) // length)
    arrays, _ = layout([[]] * n_rows, length)
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    rows = Rows(*(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for array in arrays))
    return make_score_step(model, mesh).lower(params, rows, single=False)


def _tokens_per_call(mesh: Mesh) -> int:
    return CPU_TOKENS_PER_CALL if mesh.devices.flat[0].platform == "cpu" else TOKENS_PER_CALL


def _score_targets(
    hidden: jax.Array, embedding: jax.Array, rows: Rows[jax.Array], vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Scores the targets of [rows, length, n_embd] in chunks, as many as are in use."""
    n_rows, length = rows.targets.shape
    starts = jnp.cumsum(rows.used) - rows.used
    # The targets in use first, in the order of the rows.
    place = jnp.arange(length)[None, :]
    in_use = place < rows.used[:, None]
    order = jnp.where(in_use, starts[:, None] + place, n_rows * length).reshape(-1)
    size = -(-n_rows * length // CHUNK) * CHUNK

    def compact(values: jax.Array) -> jax.Array:
        return jnp.zeros(size, values.dtype).at[order].set(values.reshape(-1), mode="drop")

    sources = compact(rows.sources + jnp.arange(n_rows)[:, None] * length)
    targets = compact(rows.targets)
    flat, ones = hidden.reshape(n_rows * length, -1), jnp.ones(embedding.shape[0])

    def add(index: jax.Array, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = index * CHUNK
        target = jax.lax.dynamic_slice_in_dim(targets, start, CHUNK)
        logits = head_logits(flat[jax.lax.dynamic_slice_in_dim(sources, start, CHUNK)], embedding, vocab_size)
        at_target = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        # log-softmax with its sum as a matmul, because XLA's CPU backend sums slowly: 0.60 ms per target with a sum,
        # 0.48 ms with a matmul. A token is greedy if none is more probable, which needs no second pass over the logits.
        largest = jnp.max(logits, axis=-1)
        total = jnp.dot(jnp.exp(logits - largest[:, None]), ones, precision="highest")
        return (
            jax.lax.dynamic_update_slice_in_dim(out[0], at_target - largest - jnp.log(total), start, axis=0),
            jax.lax.dynamic_update_slice_in_dim(out[1], at_target >= largest, start, axis=0),
        )

    n_chunks = -(-jnp.sum(rows.used) // CHUNK)
    # Like the results, the initial values have to vary over the devices.
    start = (targets * 0).astype(jnp.float32), targets < 0
    log_probs, greedy = jax.lax.fori_loop(0, n_chunks, add, start)
    place_of = jnp.minimum(order, size - 1).reshape(n_rows, length)
    return log_probs[place_of], greedy[place_of]
