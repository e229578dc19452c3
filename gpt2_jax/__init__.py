"""GPT-2 in JAX and Flax: `load` a model, or build one from `GPT2` and `GPT2Config`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpt2_jax.cli import end_imports_at_once

end_imports_at_once()

from gpt2_jax.config import GPT2Config  # noqa: E402

if TYPE_CHECKING:
    from gpt2_jax.interop import load
    from gpt2_jax.model import GPT2

__all__ = ["GPT2", "GPT2Config", "load"]

# Imported at first use: they import JAX, which takes a second that `prepare` and its workers do not need.
_LAZY = {"GPT2": "gpt2_jax.model", "load": "gpt2_jax.interop"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
