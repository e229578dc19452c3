"""Reads files that torch saved. torch is imported only here. Only containers and tensors are unpickled."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.errors import UserError, import_optional, one_line

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


def to_numpy(tensor: Any) -> np.ndarray:
    """Converts a torch tensor to NumPy: floating-point dtypes to float32, and float32 without a copy."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
