"""Causal self-attention: one signature, three backends, and the choice among them with its reasons.

    xla     written out in jax.numpy: runs everywhere, in any dtype, with dropout; memory grows with time².
    cudnn   cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.
    splash  the Pallas flash-attention kernel for TPU that ships with JAX.

All compute softmax(q kᵀ / √head_dim + causal mask) v (Vaswani et al. 2017, section 3.2.1). `cached_attention` is
the same for generation, where keys and values of earlier tokens are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.config import AttentionBackend, UserError

Platform = Literal["cpu", "cuda", "rocm", "tpu"]

# Fastest first; `auto` takes the first that `why_not` has nothing against.
PREFERENCE: tuple[AttentionBackend, ...] = ("splash", "cudnn", "xla")
SPLASH_BLOCK = 128  # The kernel tiles time in multiples of 128, the lanes of a TPU vector register.


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend to use, and for each other one what speaks against it."""

    backend: AttentionBackend
    against: dict[str, str]

    def __str__(self) -> str:
        return "; ".join([self.backend, *(f"not {name}: {reason}" for name, reason in self.against.items())])


class Hardware(NamedTuple):
    """What a program is compiled for; `capability` is the compute capability of an NVIDIA GPU."""

    platform: Platform
    capability: float = 0.0


def hardware_of(device: jax.Device) -> Hardware:
    """The hardware that programs for a device run on."""
    if device.platform == "gpu":
        if "rocm" in device.client.platform_version.lower():
            return Hardware("rocm")
        return Hardware("cuda", float(device.compute_capability))
    return Hardware("tpu" if device.platform == "tpu" else "cpu")


def current_hardware() -> Hardware:
    """The hardware that jitted functions run on by default."""
    return hardware_of(jax.local_devices()[0])


def why_not(
    backend: AttentionBackend, *, hardware: Hardware, dtype: jnp.dtype, time: int, head_dim: int, dropout: float
) -> str | None:
    """What keeps `backend` from computing this attention, or None."""
    if backend == "xla":
        return None
    needs = {"cudnn": "cuda", "splash": "tpu"}[backend]
    if hardware.platform != needs:
        return f"needs {needs}, found {hardware.platform}"
    if dropout:
        return f"has no dropout, asked for {dropout:g}"
    if backend == "cudnn":
        if hardware.capability < 8.0:
            return f"needs compute capability 8.0 (Ampere), found {hardware.capability}"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"needs bfloat16 or float16, found {jnp.dtype(dtype)}"
        if head_dim % 8 or head_dim > 128:
            return f"needs a head dimension up to 128 and a multiple of 8, found {head_dim}"
    if backend == "splash":
        if time % SPLASH_BLOCK:
            return f"needs a length that is a multiple of {SPLASH_BLOCK}, found {time}"
        if head_dim % 64:
            return f"needs a head dimension that is a multiple of 64, found {head_dim}"
    return None


def choose(
    wanted: AttentionBackend, *, hardware: Hardware, dtype: jnp.dtype, time: int, head_dim: int, dropout: float
) -> Choice:
    """The backend for `wanted`, which may be "auto".

    Args:
        time: tokens per sequence.
        dropout: rate on the attention weights while training.

    Raises:
        UserError: `wanted` is a backend that cannot compute this attention.
    """
    reasons = {
        backend: why_not(backend, hardware=hardware, dtype=dtype, time=time, head_dim=head_dim, dropout=dropout)
        for backend in PREFERENCE
    }
    if wanted != "auto":
        if reason := reasons[wanted]:
            raise UserError(f"model.attention = {wanted!r} {reason}; type --model.attention auto")
        return Choice(wanted, {})
    backend = next(backend for backend in PREFERENCE if reasons[backend] is None)
    return Choice(backend, {name: reason for name, reason in reasons.items() if reason})


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    backend: AttentionBackend = "xla",
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Each position attends to itself and to those before it.

    Args:
        q, k, v: [batch, time, heads, head_dim], one floating dtype.
        backend: "auto" chooses for the default platform.
        scale: of q kᵀ, 1/√head_dim by default.
        dropout: rate on the attention weights; needs `dropout_key` unless 0.

    Returns:
        [batch, time, heads, head_dim], in the dtype of `q`.
    """
    _, time, _, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    if backend == "auto":
        backend = choose(
            "auto", hardware=current_hardware(), dtype=q.dtype, time=time, head_dim=head_dim, dropout=dropout
        ).backend
    if backend == "xla":
        return xla_attention(q, k, v, scale, dropout=dropout, dropout_key=dropout_key)
    if dropout:
        raise ValueError(f"attention backend {backend!r} has no dropout")
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    return splash_attention(q, k, v, scale)


def xla_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """`causal_attention` in jax.numpy, softmax in float32."""
    batch, time, n_head, _ = q.shape
    kept: Kept = [None] * len(_blocks(time))
    if dropout:
        if dropout_key is None:
            raise ValueError("dropout needs a dropout_key")
        kept = [
            jax.random.bernoulli(jax.random.fold_in(dropout_key, end), 1.0 - dropout, (batch, n_head, end - start, end))
            for start, end in _blocks(time)
        ]
    # Heads before time, as real transposes: XLA's CPU backend runs batched products only in this order
    # (measured forward at 16 × 256 tokens, 6 heads of 64: 28 ms, against 65 ms without).
    q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
    return _by_blocks(q, k, v, kept, dropout).swapaxes(1, 2)


def _blocks(time: int) -> list[tuple[int, int]]:
    """First query, and the one after the last, of blocks that each need only the keys up to their end.

    Four save 3/8 of the products and of the memory. More would save little more, and each is compiled by itself.
    """
    count = 4 if time >= 512 else 2 if time >= 128 else 1
    size = -(-time // count)
    return [(start, min(start + size, time)) for start in range(0, time, size)]


# For each block which weights dropout leaves, bool [batch, heads, queries, keys], or None for all.
Kept = Sequence[jax.Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_blocks(q: jax.Array, k: jax.Array, v: jax.Array, kept: Kept, dropout: float) -> jax.Array:
    """Causal attention; q, which is scaled, k, v and the result are [batch, heads, time, head_dim].

    The gradients are written out: of the same blocks, JAX's own took up to 1.9 times the memory, and were no faster.
    """
    return _by_blocks_forward(q, k, v, kept, dropout)[0]


Saved = tuple[jax.Array, jax.Array, jax.Array, Kept, list[jax.Array], jax.Array]


def _by_blocks_forward(q: jax.Array, k: jax.Array, v: jax.Array, kept: Kept, dropout: float) -> tuple[jax.Array, Saved]:
    all_weights, outputs = [], []
    for (start, end), mask in zip(_blocks(q.shape[2]), kept, strict=True):
        scores = jnp.einsum("bhqd,bhkd->bhqk", q[:, :, start:end], k[:, :, :end], preferred_element_type=jnp.float32)
        causal = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
        all_weights.append(weights)
        outputs.append(jnp.einsum("bhqk,bhkd->bhqd", _dropped(weights, mask, dropout), v[:, :, :end]))
    y = jnp.concatenate(outputs, axis=2)
    return y, (q, k, v, kept, all_weights, y)


def _by_blocks_backward(dropout: float, saved: Saved, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, kept, all_weights, y = saved
    time = q.shape[2]
    # Σ weights · d_weights over the keys, as y · dy over head_dim (Dao et al. 2022, appendix B.2).
    means = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for (start, end), mask, weights in zip(_blocks(time), kept, all_weights, strict=True):
        dy_here, later = dy[:, :, start:end], ((0, 0), (0, 0), (0, time - end), (0, 0))
        d_weights = jnp.einsum("bhqd,bhkd->bhqk", dy_here, v[:, :, :end], preferred_element_type=jnp.float32)
        d_scores = weights.astype(jnp.float32) * (_dropped(d_weights, mask, dropout) - means[:, :, start:end])
        d_scores = d_scores.astype(q.dtype)
        dq.append(jnp.einsum("bhqk,bhkd->bhqd", d_scores, k[:, :, :end]))
        # In float32: summed in bfloat16 over the blocks they would be rounded once more.
        for_keys = functools.partial(jnp.einsum, "bhqk,bhqd->bhkd", preferred_element_type=jnp.float32)
        dk += jnp.pad(for_keys(d_scores, q[:, :, start:end]), later)
        dv += jnp.pad(for_keys(_dropped(weights, mask, dropout), dy_here), later)
    return jnp.concatenate(dq, axis=2), dk.astype(k.dtype), dv.astype(v.dtype), None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def _dropped(weights: jax.Array, kept: jax.Array | None, dropout: float) -> jax.Array:
    return weights if kept is None else jnp.where(kept, weights / (1.0 - dropout), 0)


class KeyValues(NamedTuple):
    """What one layer keeps of the tokens that it has seen. Sequences are padded on the left, to end together."""

    keys: jax.Array  # [batch · heads, slots, head_dim]
    values: jax.Array  # the same
    slot: jax.Array  # int32 [], where the next token goes
    pad: jax.Array  # int32 [batch], slots before the first token of each sequence


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: KeyValues, scale: float
) -> tuple[jax.Array, KeyValues]:
    """Each new token attends to those in the cache and to the new ones up to itself; softmax in float32.

    Args:
        q, k, v: [batch, time, heads, head_dim] of the new tokens, which fill the next `time` slots.
        cache: with room for them.
        scale: of q kᵀ.

    Returns:
        [batch, time, heads, head_dim] in the dtype of `q`, and the cache with the new tokens in it.
    """
    batch, time, n_head, head_dim = q.shape

    # Batch and heads are one axis, in the cache too: with two, XLA's CPU backend reshapes the updated cache for the
    # products, and so copies all of it for every token.
    def flat(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(batch * n_head, time, head_dim)

    keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, flat(k), cache.slot, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(cache.values, flat(v), cache.slot, axis=1)
    scores = jnp.einsum("nqd,nsd->nqs", flat(q) * scale, keys, preferred_element_type=jnp.float32)
    slots = jnp.arange(keys.shape[1])
    seen = slots <= cache.slot + jnp.arange(time)[:, None]  # [time, slots]
    seen = seen & (slots >= cache.pad[:, None, None])  # [batch, time, slots]
    weights = jax.nn.softmax(jnp.where(jnp.repeat(seen, n_head, axis=0), scores, jnp.finfo(jnp.float32).min), axis=-1)
    y = jnp.einsum("nqs,nsd->nqd", weights.astype(values.dtype), values)
    y = y.reshape(batch, n_head, time, head_dim).swapaxes(1, 2)
    return y, KeyValues(keys, values, cache.slot + time, cache.pad)


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, *, interpret: bool = False) -> jax.Array:
    """`causal_attention` by the Pallas TPU kernel; `interpret` runs it anywhere, for tests.

    On several devices it has to be in a `shard_map` over all axes of the mesh: XLA cannot split a Pallas kernel.
    """
    # Not at the top: whoever has no TPU can do without it, and it is experimental.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    _, time, n_head, _ = q.shape
    block = next(size for size in (512, 256, SPLASH_BLOCK) if time % size == 0)
    # Time along the lanes of a register, of which head dimension 64 would fill half; and so the projections write it.
    layout = splash_kernel.QKVLayout.SEQ_MINOR
    kernel = splash_kernel.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((time, time))] * n_head),
        block_sizes=splash_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        interpret=interpret,
    )

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(q * scale, k, v).swapaxes(1, 2)  # the kernel does not scale
