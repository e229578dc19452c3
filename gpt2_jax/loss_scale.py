"""Dynamic loss scaling for float16 (Micikevicius et al. 2018), by the rule of Flax's `DynamicScale`.

float16 holds nothing below 6e-8 and nothing above 65,504. The loss is multiplied by a scale, so that small gradients do
not vanish in the backward pass. Afterwards they are divided by it in float32. If one is not finite, the scale was too
large: it halves, and the update is passed over. After `GROWTH_INTERVAL` finite updates in a row, the next doubles it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from gpt2_jax.outliers import skip_if

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # finite updates
MIN_SCALE = 1.0  # gradients that overflow without any scale are those of a model that has diverged


class ScaledState(NamedTuple):
    """The state of an optimizer whose gradients are those of a scaled loss."""

    inner: optax.OptState
    scale: DynamicScale  # of the next update, and the finite updates since it changed
    overflows: jax.Array  # int32 [], updates that were passed over so far


def skip_overflows(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Passes over updates whose gradients are not finite, and adapts the scale.

    As for every update that is passed over, the counts of updates advance: the learning rate and the data follow from
    the number of the update alone. So Adam's correction for the start of its means takes an overflow for a done update.
    Where one of the first updates overflows, the next are smaller (one after it: 0.74 of the size), never larger.

    Args:
        inner: the optimizer. Its gradients are already divided by the scale.
    """

    def init(params: optax.Params) -> ScaledState:
        scale = DynamicScale(growth_interval=GROWTH_INTERVAL, scale=INITIAL_SCALE, minimum_scale=MIN_SCALE)
        return ScaledState(inner.init(params), jax.tree.map(jnp.array, scale), jnp.zeros((), jnp.int32))

    def update(
        grads: optax.Updates, state: ScaledState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, ScaledState]:
        updates, new = inner.update(grads, state.inner, params, **extra)
        # `DynamicScale` applies its rule in `value_and_grad` only, to one gradient. Here it sees the norm of the mean
        # over micro-batches and devices, as the gradient of a function: finite only if every gradient is, and equal on
        # all devices.
        norm = optax.tree.norm(grads)
        scale, finite, _, _ = state.scale.value_and_grad(lambda x: x * norm)(jnp.float32(1.0))
        updates, new = skip_if(~finite, updates, state.inner, new)
        return updates, ScaledState(new, scale, state.overflows + ~finite)

    return optax.GradientTransformationExtraArgs(init, update)


def current_scale(state: optax.OptState) -> DynamicScale | None:
    """The scale of the next update; None if the loss is not scaled."""
    return state.scale if isinstance(state, ScaledState) else None


def count_overflows(state: optax.OptState) -> int | None:
    """The updates that were passed over so far; None if the loss is not scaled."""
    return int(state.overflows) if isinstance(state, ScaledState) else None


def value_and_grad(
    function: Callable[..., jax.Array], scale: DynamicScale | None
) -> Callable[..., tuple[jax.Array, Any]]:
    """`jax.value_and_grad`, with the gradient taken of the scaled value. What it returns is divided by the scale."""
    if scale is None:
        return jax.value_and_grad(function)
    scaled = scale.value_and_grad(function)

    def unscaled(*args: Any) -> tuple[jax.Array, Any]:
        # The new scale and the verdict are those of one micro-batch: `skip_overflows` decides for all of them.
        result = scaled(*args)
        return result.aux, result.grad

    return unscaled
