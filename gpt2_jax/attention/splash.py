"""The Pallas flash-attention kernel for TPU, and the projections around it in the memory layout that it takes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.attention.backend import Backend, Problem

BLOCK = 128  # The kernel tiles time in multiples of 128, the lanes of a TPU vector register.


def unsupported_reason(problem: Problem) -> str | None:
    """Says why the kernel cannot solve a problem, or returns None if it can."""
    if problem.hardware.platform != "tpu":
        return f"needs tpu, found {problem.hardware.platform}"
    if problem.hardware.kind in ("TPU v2", "TPU v3"):  # their matrix units take only float32 from kernels
        return f"needs TPU v4 or newer, found {problem.hardware.kind}"
    if problem.dropout:
        return f"has no dropout, asked for {problem.dropout:g}"
    if problem.dtype == jnp.float16:  # JAX's compiler of Pallas kernels for TPU has no vectors of it
        return "needs bfloat16 or float32, found float16"
    if problem.time % BLOCK:
        return f"needs a length that is a multiple of {BLOCK}, found {problem.time}"
    if problem.head_dim % 64:
        return f"needs a head dimension that is a multiple of 64, found {problem.head_dim}"
    return None


class Tiles(NamedTuple):
    """How the kernels divide their work.

    Attributes:
        forward: queries, and keys, of a block in the forward pass.
        backward: the same in the backward pass.
        fused: one kernel for the backward pass, instead of one for dq and one for dk and dv, which both compute the
            weights. It writes the part of dq from each block of keys in the dtype of the queries, and XLA adds these
            up: exact, and without more memory, only for one block.
    """

    forward: int
    backward: int
    fused: bool


def tiles_for(time: int, head_dim: int, dtype: jnp.dtype) -> Tiles:
    """The tiles for sequences of `time` tokens, a multiple of `BLOCK`, on any TPU.

    At 1,024 tokens, two kernels on blocks of 512 do 7 matmuls and 2 softmaxes on three quarters of q kᵀ, the fused one
    5 and 1 on all of it: the same matmuls, and fewer exponentials. axlearn fuses by default (5% to 15% faster in large
    models, its tpu_attention.py says), tokamax always. We have compiled it, for v5e, v5p and v6e, and not measured it.
    The forward pass keeps its blocks of 512: a larger one would only add work.

    A kernel has 16 MiB of VMEM. For float32 on v5p the fused one needs more, and other head dimensions were not tried.
    """
    block = next(size for size in (512, 256, BLOCK) if time % size == 0)
    fused = time <= 1024 and head_dim == 64 and dtype.itemsize == 2
    return Tiles(block, time if fused else block, fused)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`causal_attention` by the Pallas kernel: [batch, time, heads, head_dim], without dropout.

    On several devices, call it inside a `shard_map` over all mesh axes: XLA cannot shard a Pallas kernel.

    Args:
        tiles: those of `tiles_for` by default.
        interpret: runs the kernel on any platform, for tests.
    """
    # Imported late: the module is experimental, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    _, time, n_head, head_dim = q.shape
    tiles = tiles or tiles_for(time, head_dim, q.dtype)
    # Time is along the lanes of a register: a head dimension of 64 would fill half of them. The projections write this.
    layout = splash_kernel.QKVLayout.SEQ_MINOR
    kernel = splash_kernel.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((time, time))] * n_head),
        block_sizes=splash_kernel.BlockSizes(
            block_q=tiles.forward,
            block_kv=tiles.forward,
            block_q_dkv=tiles.backward,
            block_kv_dkv=tiles.backward,
            block_q_dq=None if tiles.fused else tiles.backward,
            block_kv_dq=None if tiles.fused else tiles.backward,
            use_fused_bwd_kernel=tiles.fused,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        interpret=interpret,
    )

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(q * scale, k, v).swapaxes(1, 2)  # the kernel does not scale


def project_in(x: jax.Array, kernel: jax.Array, bias: jax.Array, head_dim: int) -> list[jax.Array]:
    """The projection c_attn as three matmuls, each of which writes the layout that the attention kernel reads.

    XLA would copy the parts of one matmul into that layout. The queries are scaled by 1/√head_dim through their
    weights: scaling them separately costs a pass over their gradient.

    Args:
        x: [batch, time, n_embd].
        kernel: [n_embd, 3 n_embd].
        bias: [3 n_embd].

    Returns:
        q, k and v, each [batch, time, n_embd].
    """
    kernels, biases = jnp.split(kernel, 3, axis=1), jnp.split(bias, 3)
    kernels[0], biases[0] = kernels[0] * head_dim**-0.5, biases[0] * head_dim**-0.5
    return [to_heads(x, kernel, bias, head_dim) for kernel, bias in zip(kernels, biases, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_heads(x: jax.Array, kernel: jax.Array, bias: jax.Array, head_dim: int) -> jax.Array:
    """`x @ kernel + bias`, as input to the attention kernel: [batch, time, in] -> [batch, time, heads · head_dim].

    The attention kernel returns gradients of shape [batch, heads, time, head_dim], rows of 64 padded to 128. XLA copies
    them into another layout unless the matmuls of the backward pass read this one. The gradient of the bias is a matmul
    with ones, because a sum took as long as two of the other matmuls. It needs eight rows of ones: XLA turns one row
    back into a sum.
    """
    return x @ kernel + bias[None, None]


def _to_heads_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, head_dim: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel + bias[None, None], (x, kernel)


def _to_heads_backward(
    head_dim: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = saved
    grad = _split(grad, head_dim).swapaxes(1, 2)
    ones = jnp.ones((*x.shape[:2], 8), grad.dtype)
    x_grad = jnp.einsum("bhtd,chd->btc", grad, _split(kernel, head_dim))
    kernel_grad = jnp.einsum("btc,bhtd->chd", x, grad)
    bias_grad = jnp.einsum("btn,bhtd->nhd", ones, grad)[0]
    return x_grad, kernel_grad.reshape(kernel.shape), bias_grad.flatten()


to_heads.defvjp(_to_heads_forward, _to_heads_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def from_heads(x: jax.Array, kernel: jax.Array, head_dim: int) -> jax.Array:
    """`x @ kernel` for an `x` from the attention kernel, [batch, time, heads · head_dim]: the reverse of `to_heads`."""
    return _flat_matmul(x, kernel)


def _from_heads_forward(
    x: jax.Array, kernel: jax.Array, head_dim: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _flat_matmul(x, kernel), (x, kernel)


def _from_heads_backward(
    head_dim: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    by_head = kernel.reshape(-1, head_dim, kernel.shape[1])
    x_grad = jnp.einsum("btf,hdf->bhtd", grad, by_head).swapaxes(1, 2).reshape(x.shape)
    return x_grad, jnp.einsum("btc,btf->cf", x, grad)


from_heads.defvjp(_from_heads_forward, _from_heads_backward)


def _split(x: jax.Array, head_dim: int) -> jax.Array:
    """[..., features] -> [..., heads, head_dim]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def _flat_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


BACKEND = Backend(
    splash_attention,
    unsupported_reason,
    project_in=project_in,
    project_out=from_heads,
    scales_queries=True,
    check_vma=False,
)
