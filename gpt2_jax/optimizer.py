"""The optimizer: clip by global norm → AdamW with masked decay → warmup-cosine, for `optax.MultiSteps`.

AdamW is Loshchilov and Hutter 2019; hyperparameters and the mask follow GPT-3's (Brown et al. 2020, appendix B)
as nanoGPT and llm.c read them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of update 0, 1, …; `decay_steps` must be resolved.

    Update s of the warm-up has peak · (s + 1) / warmup_steps (so the first is not lost to a rate of 0), then a
    half cosine falls to the final rate at update `decay_steps`.
    """
    warmup = max(config.warmup_steps, 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / warmup,
        peak_value=config.learning_rate,
        warmup_steps=warmup - 1,
        decay_steps=config.decay_steps,  # optax counts the warm-up in
        end_value=config.final_learning_rate,
    )


def decay_mask(params: Any) -> Any:
    """True for every tensor of rank 2 and up: matrices and embeddings, not biases and norms.

    Scanned layers stand under `h` with one axis more, which does not count.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        stacked = path[0].key == "h"
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The chain for one update, from the mean gradient over the whole batch."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


class OncePerUpdateState(NamedTuple):
    """State of `once_per_update`: that of the inner optimizer, and the last update's gradient norm."""

    inner: optax.OptState
    grad_norm: jax.Array


def once_per_update(
    inner: optax.GradientTransformation, mean_over: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
    """Makes `inner` run only in the micro-step that completes an update.

    `optax.MultiSteps` calls its optimizer at every micro-step and throws the result away until the last. Here
    the work, and with it the one reduction of the gradients over the mesh axes `mean_over`, sits in the taken
    branch of a conditional on the extra argument `emit`. Where that is known to be True, there is no conditional.
    """

    def init(params: optax.Params) -> OncePerUpdateState:
        return OncePerUpdateState(inner.init(params), jnp.zeros((), jnp.float32))

    @functools.partial(jax.jit, inline=True)  # `MultiSteps` traces it for either branch
    def run(
        grads: optax.Updates, state: OncePerUpdateState, params: optax.Params
    ) -> tuple[optax.Updates, OncePerUpdateState]:
        grads = jax.lax.pmean(grads, mean_over) if mean_over else grads
        updates, inner_state = inner.update(grads, state.inner, params)
        return updates, OncePerUpdateState(inner_state, optax.global_norm(grads))

    def skip(
        grads: optax.Updates, state: OncePerUpdateState, params: optax.Params
    ) -> tuple[optax.Updates, OncePerUpdateState]:
        return jax.tree.map(lambda grad: jnp.zeros(grad.shape, grad.dtype), grads), state

    def update(
        grads: optax.Updates, state: OncePerUpdateState, params: optax.Params | None = None, *, emit: jax.Array | bool
    ) -> tuple[optax.Updates, OncePerUpdateState]:
        if emit is True:
            return run(grads, state, params)
        return jax.lax.cond(emit, run, skip, grads, state, params)

    return optax.GradientTransformationExtraArgs(init, update)
