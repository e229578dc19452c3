"""Matrix products with gradients written out: the same sums as JAX's own, in the shapes that XLA runs fast.

All take arrays of [batch, time, features]; `head_dim` is how many features make a head, of those that have any.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def flat_dot(x: jax.Array, kernel: jax.Array, dimensions: Any = None, **options: Any) -> jax.Array:
    """A `dot_general` for dense layers, [..., i] and [i, o] -> [..., o], as a product of two matrices.

    That matters for the gradient of the kernel: where it sums over batch and time as two axes, XLA's CPU backend
    first transposes the gradient of the output, a fifth of a training step with 6 layers of 384.
    """
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_heads(x: jax.Array, kernel: jax.Array, bias: jax.Array, head_dim: int) -> jax.Array:
    """`x @ kernel + bias`, which is split into heads for a TPU kernel of attention.

    That kernel's gradients are by heads, [batch, heads, time, head_dim], rows of 64 padded to 128. XLA for TPU copies
    them to another layout, unless the products that they go into take them as they are. The gradient of the bias is
    such a product too, with ones: as a sum it took as long as two of the others. Eight rows of ones, because of one row
    XLA makes a sum again.
    """
    return x @ kernel + bias


def _to_heads_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, head_dim: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel + bias, (x, kernel)


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
    """`x @ kernel`, where `x` comes as heads from a TPU kernel of attention; as for `to_heads`."""
    return flat_dot(x, kernel)


def _from_heads_forward(
    x: jax.Array, kernel: jax.Array, head_dim: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return flat_dot(x, kernel), (x, kernel)


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
