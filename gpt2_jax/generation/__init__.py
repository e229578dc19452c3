"""Text from a model: `LanguageModel` takes and returns text, `generate` and `stream` take and return tokens."""

from gpt2_jax.generation.decode import generate, stream
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.generation.text import LanguageModel

__all__ = ["LanguageModel", "Sampling", "generate", "stream"]
