"""GPT-2 in JAX and Flax."""

from gpt2_jax.config import GPT2Config
from gpt2_jax.decode import generate
from gpt2_jax.interop import load
from gpt2_jax.model import GPT2

__all__ = ["GPT2", "GPT2Config", "generate", "load"]
