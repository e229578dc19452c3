"""nanoGPT's `ckpt.pt`, as its `train.py` and `model.py` write it: a dict saved by torch.

Tensors have the names of the released checkpoints, but matrices are [out, in]. The GELU is the exact one. Only plain
containers and tensors are unpickled.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.tokenizer import GPT2_VOCAB_SIZE, CharTokenizer, Tokenizer, read_characters
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import StoredModel, check_sizes, directory_files, parameter_shapes, torch_name
from gpt2_jax.interop.tokenizer_files import read_tokenizer, write_tokenizer_unless_gpt2
from gpt2_jax.interop.torch_files import import_torch, load_torch, to_numpy

COMPILED = "_orig_mod."  # the prefix that torch.compile adds
GPT2_VOCABS = (GPT2_VOCAB_SIZE, 50304)  # nanoGPT pads to 50304 when it trains from scratch, and trains the padding
DATASET = "converted"  # the name that a checkpoint written here gives to its dataset
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")


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
    if missing := [key for key in SIZES if key not in sizes]:
        raise UserError(f"{path}: model_args has no {missing[0]}; expected {', '.join(SIZES)}")
    config = GPT2Config(**{key: sizes[key] for key in SIZES}, gelu="exact")
    check_sizes(str(path), config)
    if not all(hasattr(tensor, "is_floating_point") for tensor in state.values()):
        raise UserError(f"{path} is not a nanoGPT checkpoint: its model holds values other than tensors")
    state = {name.removeprefix(COMPILED): tensor for name, tensor in state.items()}
    known = {f"transformer.{torch_name(name)}" for name in parameter_shapes(config)} | {"lm_head.weight"}
    # nanoGPT saves the causal mask as a buffer where PyTorch has no fused attention.
    if unknown := [name for name in state if name not in known and not name.endswith(".attn.bias")]:
        raise UserError(f"{path} has {unknown[0]}, which a GPT-2 of its model_args does not have")

    def read(name: str) -> np.ndarray:
        array = to_numpy(state[f"transformer.{torch_name(name)}"])
        return array.T if name.endswith("kernel") else array

    def find_tokenizer() -> Tokenizer | None:
        """GPT-2's for its vocabulary sizes, else the characters in the dataset's `meta.pkl`, else tokenizer files."""
        here = path.resolve().parent
        if config.vocab_size in GPT2_VOCABS:
            return read_tokenizer(directory_files(here), GPT2_VOCAB_SIZE)
        dataset = str(settings.get("dataset", "")) if isinstance(settings, dict) else ""
        data = Path("data", Path(dataset).name)  # relative to nanoGPT's directory
        for directory in (here, here.parent / data, data):
            if (directory / "meta.pkl").is_file():
                return read_characters(directory / "meta.pkl")
        return read_tokenizer(directory_files(here), config.vocab_size)

    step = checkpoint.get("iter_num")
    return StoredModel(str(path), config, read, find_tokenizer, step if type(step) is int else 0)


def write_nanogpt(model: StoredModel, directory: Path) -> None:
    """Writes `ckpt.pt` for nanoGPT's `sample.py`, without optimizer state, and the tokenizer unless it is GPT-2's.

    A tokenizer of characters is written as `meta.pkl`, which nanoGPT looks for in its directory `data/DATASET`.

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
    saved = {"model": state, "model_args": sizes, "iter_num": model.step, "best_val_loss": float("inf")}
    tokenizer = model.tokenizer
    if isinstance(tokenizer, CharTokenizer):
        itos = dict(enumerate(tokenizer.characters))
        table = {"vocab_size": len(itos), "itos": itos, "stoi": {char: token for token, char in itos.items()}}
        (directory / "meta.pkl").write_bytes(pickle.dumps(table))
        saved["config"] = {"dataset": DATASET}
    else:
        write_tokenizer_unless_gpt2(tokenizer, directory, config.block_size)
    torch.save(saved, directory / "ckpt.pt")
