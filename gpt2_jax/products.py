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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_heads(x: jax.Array, kernel: jax.Array, head_dim: int) -> jax.Array:
    """`x @ kernel`, where the product is split into heads for a TPU kernel of attention.

    That kernel has gradients by heads, [batch, heads, time, head_dim]. XLA for TPU copies them to another layout,
    unless the products that they go into take them as they are.
    """
    return x @ kernel


def _to_heads_forward(x: jax.Array, kernel: jax.Array, head_dim: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _to_heads_backward(
    head_dim: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    grad = _split(grad, head_dim).swapaxes(1, 2)
    x_grad = jnp.einsum("bhtd,chd->btc", grad, _split(kernel, head_dim))
    return x_grad, jnp.einsum("btc,bhtd->chd", x, grad).reshape(kernel.shape)


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


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x + bias`, with the gradient of the bias as a product.

    As a sum over the padded layout that the gradients of attention have on TPU, it took as long as two products. Eight
    rows of ones: XLA would make a sum again of one.
    """
    return x + bias


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return x + bias, None


def _add_bias_backward(_: None, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    ones = jnp.ones((8, *grad.shape[:2]), grad.dtype)
    total = jnp.einsum("nbt,btf->nf", ones, grad, preferred_element_type=jnp.float32)[0]
    return grad, total.astype(grad.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _split(x: jax.Array, head_dim: int) -> jax.Array:
    """[..., features] -> [..., heads, head_dim]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)
