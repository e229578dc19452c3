"""nanoGPT's `ckpt.pt`: torch's format, tensors named as the released ones but matrices [out, in] (nanoGPT,
`train.py`, `model.py`). Only plain containers and tensors are unpickled. nanoGPT's GELU is the exact one.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.tokenizer import GPT2_VOCAB_SIZE, CharTokenizer, Tokenizer, read_characters
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import StoredModel, checked, in_directory, parameter_shapes, torch_name
from gpt2_jax.interop.tokenizer_files import read_tokenizer, write_unusual_tokenizer
from gpt2_jax.interop.torch_files import as_array, import_torch, load_torch

COMPILED = "_orig_mod."  # torch.compile's prefix
GPT2_VOCABS = (GPT2_VOCAB_SIZE, 50304)  # nanoGPT pads the vocabulary of a model from scratch, and trains the padding
DATASET = "converted"
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")


def open_nanogpt(path: Path) -> StoredModel:
    """Reads everything but the tensors, which are mapped.

    Raises:
        UserError: not a checkpoint of nanoGPT.
    """
    checkpoint = load_torch(path)
    keys = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path} is not nanoGPT's: it holds {keys}; expected model and model_args among them")
    sizes, state, settings = (checkpoint.get(key) for key in ("model_args", "model", "config"))
    if not isinstance(sizes, dict) or not isinstance(state, dict):
        raise UserError(f"{path} is not nanoGPT's: its model and model_args are not both dicts")
    if missing := [key for key in SIZES if key not in sizes]:
        raise UserError(f"{path}: model_args has no {missing[0]}; expected {', '.join(SIZES)}")
    config = checked(str(path), GPT2Config(**{key: sizes[key] for key in SIZES}, gelu="exact"))
    if not all(hasattr(tensor, "is_floating_point") for tensor in state.values()):
        raise UserError(f"{path} is not nanoGPT's: its model holds something else than tensors")
    state = {name.removeprefix(COMPILED): tensor for name, tensor in state.items()}
    known = {f"transformer.{torch_name(name)}" for name in parameter_shapes(config)} | {"lm_head.weight"}
    # Without PyTorch 2's attention nanoGPT keeps the causal mask as a buffer.
    if unknown := [name for name in state if name not in known and not name.endswith(".attn.bias")]:
        raise UserError(f"{path} has {unknown[0]}, which a GPT-2 of its model_args does not have")

    def read(name: str) -> np.ndarray:
        array = as_array(state[f"transformer.{torch_name(name)}"])
        return array.T if name.endswith("kernel") else array

    def tokenizer() -> Tokenizer | None:
        """The characters in the dataset's `meta.pkl`, beside the checkpoint or where nanoGPT has it; or GPT-2's."""
        dataset = str(settings.get("dataset", "")) if isinstance(settings, dict) else ""
        data = Path("data", Path(dataset).name)  # in nanoGPT's own directory
        here = path.resolve().parent
        for place in (here, here.parent / data, data):
            if (place / "meta.pkl").is_file() and config.vocab_size not in GPT2_VOCABS:
                return read_characters(place / "meta.pkl")
        vocab_size = GPT2_VOCAB_SIZE if config.vocab_size in GPT2_VOCABS else config.vocab_size
        return read_tokenizer(in_directory(here), vocab_size)

    step = checkpoint.get("iter_num")
    return StoredModel(str(path), config, read, tokenizer, step if type(step) is int else 0)


def write_nanogpt(model: StoredModel, directory: Path) -> None:
    """Writes `ckpt.pt` as nanoGPT's `sample.py` reads it, without optimizer state; of characters `meta.pkl` too.

    nanoGPT looks for the latter in `data/DATASET`; the dataset is called `DATASET` here.

    Raises:
        UserError: nanoGPT has no such model, or torch is not installed.
    """
    torch = import_torch("writing nanoGPT's ckpt.pt")
    config = model.config
    if config.gelu != "exact":
        raise UserError(
            f"{model.where} uses the tanh GELU, nanoGPT only the exact one: its logits would be others; take "
            "--to huggingface or llmc (or train with --model.gelu exact)"
        )
    state = {}
    for name, array in model.parameters():
        array = array.T if name.endswith("kernel") else array
        state[f"transformer.{torch_name(name)}"] = torch.from_numpy(np.ascontiguousarray(array))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    sizes = {key: getattr(config, key) for key in SIZES} | {"dropout": config.dropout}
    saved = {"model": state, "model_args": sizes, "iter_num": model.step, "best_val_loss": float("inf")}
    tokenizer = model.tokenizer()
    if isinstance(tokenizer, CharTokenizer):
        itos = dict(enumerate(tokenizer.characters))
        table = {"vocab_size": len(itos), "itos": itos, "stoi": {char: token for token, char in itos.items()}}
        (directory / "meta.pkl").write_bytes(pickle.dumps(table))
        saved["config"] = {"dataset": DATASET}
    else:
        write_unusual_tokenizer(tokenizer, directory, config.block_size)
    torch.save(saved, directory / "ckpt.pt")
