"""The optimizer: clip by global norm → AdamW with masked decay → warmup-cosine, once per update.

AdamW is Loshchilov and Hutter 2019; hyperparameters and the mask follow GPT-3's (Brown et al. 2020, appendix B)
as nanoGPT and llm.c read them.
"""

from __future__ import annotations

from typing import Any

import jax
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
