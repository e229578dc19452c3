"""Reads files that torch saved. torch is imported only here. Only containers and tensors are unpickled."""

from __future__ import annotations

import functools
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.errors import UserError, import_optional, one_line
from gpt2_jax.interop.model_files import check_permission
from gpt2_jax.interop.state_dict import Tensors

SAFE_TORCH = (2, 6)  # In older versions, a file can run code in spite of weights_only (CVE-2025-32434).


def import_torch(purpose: str) -> Any:
    """Imports `torch`.

    Args:
        purpose: as in `import_optional`.

    Raises:
        UserError: it is not installed, or too old to read files safely.
    """
    torch = import_optional("torch", purpose)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise UserError(f"{purpose} needs torch 2.6 or newer, found {torch.__version__}; type pip install -U torch")
    return torch


def load_torch(path: Path) -> Any:
    """Reads the object that torch saved. Tensors are memory-mapped where the file's format allows it.

    Raises:
        UserError: it cannot be read, or reading it would run code.
    """
    torch = import_torch(f"reading {path}")
    check_permission(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise UserError(
                f"{path} is not a checkpoint that torch can read, or it is damaged; copy it again"
            ) from error
        raise UserError(
            f"{path} holds Python objects besides tensors, and reading them could run arbitrary code; save it again "
            "with only dicts, lists, numbers and tensors, as nanoGPT does"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error, 120)}); it is cut off, damaged or not torch's; copy it again"
        ) from error


def state_tensors(path: Path, state: Any) -> Tensors:
    """The tensors of a state dict that torch saved.

    Raises:
        UserError: it holds anything but tensors by their names.
    """
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and hasattr(tensor, "is_floating_point") for name, tensor in state.items()
    ):
        raise UserError(f"{path} holds no state dict; expected a dict with only tensors as values; save it again")
    return {name: functools.partial(to_numpy, tensor) for name, tensor in state.items()}


def to_numpy(tensor: Any) -> np.ndarray:
    """Converts a torch tensor to NumPy: floating-point dtypes to float32, and float32 without a copy."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
