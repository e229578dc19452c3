"""Files that torch saved; torch is needed for these alone. Nothing but containers and tensors is unpickled."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.errors import UserError

SAFE_TORCH = (2, 6)  # Before it, weights_only could be made to run code (CVE-2025-32434).


def import_torch(purpose: str) -> Any:
    """The module torch.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{purpose} needs torch, which is not installed; type pip install torch") from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise UserError(f"{purpose} needs torch 2.6 or newer, found {torch.__version__}; type pip install -U torch")
    return torch


def load_torch(path: Path) -> Any:
    """What torch saved, tensors mapped from the file where its format allows that.

    Raises:
        UserError: it cannot be read, or would run code to be read.
    """
    torch = import_torch(f"reading {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise UserError(f"{path} is not a checkpoint that torch can read, or is damaged; copy it again") from error
        raise UserError(
            f"{path} holds Python objects beside tensors, and reading those could run any code; save it again with "
            "nothing but dicts, lists, numbers and tensors, as nanoGPT does"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read ({reason}); it is cut off, damaged or not torch's") from error


def as_array(tensor: Any) -> np.ndarray:
    """A torch tensor, floating ones as float32; of a float32 one the memory itself."""
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array
