"""GPT-2 in JAX and Flax."""

from gpt2_jax.config import GPT2Config
from gpt2_jax.decode import generate
from gpt2_jax.interop import load
from gpt2_jax.model import GPT2

# `generate` is the function. Importing the module of that name, which is the command, would put it in its place.
__all__ = ["GPT2", "GPT2Config", "generate", "load"]
