"""nanoGPT's `ckpt.pt`, as its `train.py` and `model.py` write it: a dict saved by torch.

Tensors have the names of the released checkpoints, but matrices are [out, in]. The GELU is the exact one. Only plain
containers and tensors are unpickled.
"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.tokenizer import CharTokenizer, Tokenizer, read_characters
from gpt2_jax.errors import UserError
from gpt2_jax.interop.keep_tokenizer import is_implied, keep_tokenizer
from gpt2_jax.interop.model_files import directory_files, is_file
from gpt2_jax.interop.state_dict import check_state
from gpt2_jax.interop.stored import StoredModel, torch_name
from gpt2_jax.interop.tokenizer_files import implied_tokenizer, read_named, read_tokenizer
from gpt2_jax.interop.torch_files import import_torch, load_torch, state_tensors
from gpt2_jax.parsing import is_count

DATASET = "converted"  # the name that a checkpoint written here gives to its dataset
# The sizes in `model_args`, with the defaults of nanoGPT's GPTConfig. Its first versions did not save `bias`.
SIZES = {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True}


def open_nanogpt(path: Path) -> StoredModel:
    """Opens a checkpoint. Tensors are memory-mapped.

    Raises:
        UserError: it is not a checkpoint of nanoGPT, or it is damaged.
    """
    checkpoint = load_torch(path)
    keys = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path} is not a nanoGPT checkpoint: it holds {keys}; expected model and model_args")
    sizes, state, settings = (checkpoint.get(key) for key in ("model_args", "model", "config"))
    if not isinstance(sizes, dict) or not isinstance(state, dict):
        raise UserError(f"{path} is not a nanoGPT checkpoint: expected dicts as its model and model_args")
    settled = {key: sizes.get(key, default) for key, default in SIZES.items()}
    config = GPT2Config(**settled | {"bias": settled["bias"] is not False}, gelu="exact")
    config, tensors = check_state(str(path), config, state_tensors(path, state))

    def read(name: str) -> np.ndarray:
        array = tensors[torch_name(name)]()
        return array.T if name.endswith("kernel") else array

    here = path.resolve().parent

    def find_characters() -> Tokenizer | None:
        """GPT-2's for its vocabulary sizes, else the characters in the dataset's `meta.pkl`."""
        if tokenizer := implied_tokenizer(config.vocab_size):
            return tokenizer
        dataset = str(settings.get("dataset", "")) if isinstance(settings, dict) else ""
        data = Path("data", Path(dataset).name)  # relative to nanoGPT's directory
        for directory in (here, here.parent / data, data):
            if is_file(directory / "meta.pkl"):
                return read_characters(directory / "meta.pkl")
        return None

    files = directory_files(here)
    find_tokenizer = functools.partial(read_tokenizer, files, find_characters)
    step = checkpoint.get("iter_num")
    step = step if is_count(step) else 0
    return StoredModel(str(path), config, read, find_tokenizer, step, read_named(files, config.vocab_size), files)


def write_nanogpt(model: StoredModel, directory: Path) -> None:
    """Writes `ckpt.pt` for nanoGPT's `sample.py` and `train.py --init_from=resume`, and the tokenizer unless implied.

    A tokenizer of characters is written as `meta.pkl`, which nanoGPT looks for in its directory `data/DATASET`. The
    optimizer's state is that before its first update.

    Raises:
        UserError: nanoGPT cannot represent the model, or torch is not installed.
    """
    torch = import_torch("writing nanoGPT's ckpt.pt")
    config = model.config
    if config.gelu != "exact":
        raise UserError(
            f"{model.where} uses the tanh GELU, but nanoGPT only has the exact one and would compute other logits; "
            "take --to huggingface or llmc (or train with --model.gelu exact)"
        )
    state = {}
    for name, array in model.parameters():
        array = array.T if name.endswith("kernel") else array
        state[f"transformer.{torch_name(name)}"] = torch.from_numpy(np.ascontiguousarray(array))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    sizes = {key: getattr(config, key) for key in SIZES} | {"dropout": config.dropout}
    saved = {
        "model": state,
        "optimizer": _new_optimizer(torch, state),
        "model_args": sizes,
        "iter_num": model.step,
        "best_val_loss": float("inf"),
    }
    tokenizer = model.tokenizer
    if isinstance(tokenizer, CharTokenizer):
        itos = dict(enumerate(tokenizer.characters))
        table = {"vocab_size": len(itos), "itos": itos, "stoi": {char: token for token, char in itos.items()}}
        (directory / "meta.pkl").write_bytes(pickle.dumps(table))
        saved["config"] = {"dataset": DATASET}
    keep_tokenizer(model, directory, make=not isinstance(tokenizer, CharTokenizer) and not is_implied(model))
    torch.save(saved, directory / "ckpt.pt")


def _new_optimizer(torch: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a new AdamW with the groups of nanoGPT's `configure_optimizers` and the settings of its train.py."""
    tensors = {id(tensor): tensor for tensor in state.values()}.values()  # the tied head is the embedding
    groups = [
        {"params": [tensor for tensor in tensors if tensor.dim() >= 2], "weight_decay": 0.1},
        {"params": [tensor for tensor in tensors if tensor.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer: dict[str, Any] = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()
    return optimizer
