"""Outliers: updates whose loss or gradient norm stands far out from those before, or is not finite.

An update is an outlier if its loss or gradient norm is more than `z_score` standard deviations above the mean of the
last `window` updates, or not finite. llm.c and OLMo (skip_step_optimizer.py) use the same rule. Everything is computed
on the device, in the update itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

ROUNDING = 1e-6  # of float32: a smaller deviation, relative to the mean, is no deviation


class WatchedState(NamedTuple):
    """The state of an optimizer that is watched for outliers."""

    inner: optax.OptState
    losses: jax.Array  # float32 [window], of the last finite updates
    grad_norms: jax.Array  # float32 [window], of the same
    seen: jax.Array  # int32 [], finite updates so far
    outlier: jax.Array  # int32 [], 1 if the last update was one


def watch_outliers(
    inner: optax.GradientTransformation, window: int, z_score: float, skip: bool
) -> optax.GradientTransformationExtraArgs:
    """Marks outliers in the state of an optimizer. Its `update` takes the loss as the keyword `loss`.

    Args:
        inner: the optimizer.
        window: updates to compare with. Before there are as many, only updates that are not finite are outliers.
        z_score: standard deviations above the mean that make an outlier.
        skip: an outlier changes neither parameters nor moments, as in `pass_over`.
    """
    chain = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> WatchedState:
        losses, grad_norms = (jnp.zeros(window, jnp.float32) for _ in range(2))
        return WatchedState(chain.init(params), losses, grad_norms, *(jnp.zeros((), jnp.int32) for _ in range(2)))

    def update(
        grads: optax.Updates, state: WatchedState, params: Any = None, *, loss: jax.Array, **extra: Any
    ) -> tuple[optax.Updates, WatchedState]:
        updates, new = chain.update(grads, state.inner, params, **extra)
        values = jnp.stack([loss, optax.tree.norm(grads)])
        history = jnp.stack([state.losses, state.grad_norms])
        finite = jnp.all(jnp.isfinite(values))
        mean, deviation = jnp.mean(history, axis=1), jnp.std(history, axis=1)
        far = values - mean > z_score * jnp.maximum(deviation, ROUNDING * jnp.abs(mean))
        outlier = ~finite | ((state.seen >= window) & jnp.any(far))
        place = state.seen % window  # of the oldest
        losses, grad_norms = history.at[:, place].set(jnp.where(finite, values, history[:, place]))
        if skip:
            updates, new = skip_if(outlier, updates, state.inner, new)
        return updates, WatchedState(new, losses, grad_norms, state.seen + finite, outlier.astype(jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)


def pass_over(state: optax.OptState) -> optax.OptState:
    """The optimizer's state after an update that changes nothing: only its counts of updates advance.

    So the learning rate follows the schedule as if the update had been done.
    """
    if hasattr(state, "inner"):  # the states of our own wrappers have integers that count something else
        return state._replace(inner=pass_over(state.inner))
    # All integers of Optax's states count updates.
    return jax.tree.map(lambda leaf: leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf, state)


def skip_if(
    skip: jax.Array, updates: optax.Updates, old: optax.OptState, new: optax.OptState
) -> tuple[optax.Updates, optax.OptState]:
    """Updates of 0 and `pass_over(old)` where `skip`, bool [], is true; otherwise `updates` and `new`."""
    updates = jax.tree.map(lambda leaf: jnp.where(skip, 0, leaf).astype(leaf.dtype), updates)
    return updates, jax.tree.map(lambda passed, leaf: jnp.where(skip, passed, leaf), pass_over(old), new)
