"""What a config leaves open, decided: by the hardware the dtype and the attention backend, by `steps` the schedule."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from gpt2_jax import attention
from gpt2_jax.config import TrainConfig


def resolve(config: TrainConfig, hardware: attention.Hardware) -> tuple[TrainConfig, attention.Choice]:
    """Fills in what follows from the config and the hardware, and chooses the attention backend.

    Raises:
        UserError: the attention backend asked for cannot serve.
    """
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if hardware.platform == "cpu" else "bfloat16"
    optimizer = dataclasses.replace(config.optimizer, decay_steps=config.optimizer.decay_steps or config.steps)
    choice = attention.choose(
        config.model.attention,
        hardware=hardware,
        dtype=jnp.dtype(dtype),
        time=config.model.block_size,
        head_dim=config.model.n_embd // config.model.n_head,
        dropout=config.model.dropout,
    )
    return dataclasses.replace(config, dtype=dtype, optimizer=optimizer), choice
