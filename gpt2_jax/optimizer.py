"""The optimizer: MultiSteps accumulation → clip by global norm → AdamW with masked decay → warmup-cosine.

AdamW is Loshchilov and Hutter 2019. The hyperparameters and the decay mask are GPT-3's (Brown et al. 2020, appendix B),
as nanoGPT and llm.c implement them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.config import OptimizerConfig
from gpt2_jax.layers import is_stacked
from gpt2_jax.loss_scale import skip_overflows
from gpt2_jax.outliers import watch_outliers

FLOAT32 = jnp.dtype(jnp.float32)


def make_optimizer(config: OptimizerConfig, dtype: jnp.dtype = FLOAT32) -> optax.GradientTransformationExtraArgs:
    """The chain that turns the mean gradient of a whole batch into an update. Its `update` takes the loss too.

    One update is `gradient_accumulator` → mean over the mesh axis `data` → this chain (`step.py`).

    Args:
        dtype: that of the model's matmuls. float16 needs a scaled loss, whose overflows are no outliers.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
    optimizer = optax.with_extra_args_support(chain)
    if config.on_outlier != "off":
        skip = config.on_outlier == "skip"
        optimizer = watch_outliers(chain, config.outlier_window, config.outlier_z_score, skip)
    return skip_overflows(optimizer) if dtype == jnp.float16 else optimizer


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of update 0, 1, …; `decay_steps` must be resolved.

    Update s of warmup has peak · (s + 1) / warmup_steps, so the first update is not lost to a rate of 0. Then a
    half cosine falls to the final rate at update `decay_steps`.
    """
    warmup = max(config.warmup_steps, 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / warmup,
        peak_value=config.learning_rate,
        warmup_steps=warmup - 1,
        decay_steps=config.decay_steps,  # optax includes the warmup
        end_value=config.final_learning_rate,
    )


def decay_mask(params: Any) -> Any:
    """True for every tensor of rank 2 and up: matrices and embeddings, not biases and norms.

    The leading axis of stacked layers does not count.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return leaf.ndim - is_stacked(path) >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


NEVER = 2**31 - 1  # mini-steps; far more than an update has
_NO_UPDATES = optax.GradientTransformation(lambda params: (), lambda grads, state, params=None: ((), state))


def gradient_accumulator() -> optax.MultiSteps:
    """`optax.MultiSteps` as a running mean of gradients. It never emits; read the mean from `acc_grads`.

    MultiSteps is not wrapped around `make_optimizer` for two reasons. Optax 0.2.8 runs the wrapped optimizer at every
    mini-step and selects afterwards, so clipping, AdamW and every reduction would run k times per update. And the
    wrapped optimizer has to emit no updates at all: under `shard_map`, MultiSteps builds zeros in their place, which
    JAX refuses for gradients that vary over the mesh. (So `optax.identity` does not work either.)
    """
    return optax.MultiSteps(_NO_UPDATES, every_k_schedule=NEVER)
