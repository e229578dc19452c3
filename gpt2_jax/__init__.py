"""GPT-2 in JAX and Flax, for CPU, GPU and TPU."""

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2

__all__ = ["GPT2", "GPT2Config"]
