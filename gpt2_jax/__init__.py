"""GPT-2 in JAX and Flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpt2_jax.config import GPT2Config

if TYPE_CHECKING:
    from gpt2_jax.decode import generate
    from gpt2_jax.interop import load
    from gpt2_jax.model import GPT2

# `generate` is the function. Importing the module of that name, which is the command, would put it in its place.
__all__ = ["GPT2", "GPT2Config", "generate", "load"]

# These import JAX, which takes a second that preparing data does not need: they come when they are asked for.
_LATE = {"GPT2": "gpt2_jax.model", "generate": "gpt2_jax.decode", "load": "gpt2_jax.interop"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
