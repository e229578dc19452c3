"""Models as others write them: with transformers and torch, or byte by byte from the descriptions of the formats."""

import copy
import dataclasses
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch_gpt2 import as_params

from gpt2_jax import GPT2, GPT2Config, load
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import DataConfig, ModelConfig
from gpt2_jax.config.toml import to_toml
from gpt2_jax.interop.tokenizer_files import CHARACTER_TO_BYTE
from gpt2_jax.model import abstract_params, padded_vocab_size

CONFIG = GPT2Config(vocab_size=300, block_size=32, n_layer=3, n_head=4, n_embd=32)
EXACT = dataclasses.replace(CONFIG, gelu="exact")
BYTES = DataConfig(tokenizer="bytes")
FORMATS = ("huggingface", "orbax", "nanogpt", "llmc")


def assert_same_params(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_loads(path, theirs, config=CONFIG) -> tuple[GPT2, dict]:
    """Loads a model and asserts that its parameters are the torch model's weights, bit for bit."""
    gpt2 = load(str(path))
    assert dataclasses.replace(gpt2.model.config, attention="auto") == config
    assert_same_params(gpt2.params, as_params(theirs.state_dict(), config))
    return gpt2.model, gpt2.params


def random_params(config: GPT2Config) -> dict:
    """Random parameters, also for models without biases, which transformers does not have. The padding is 0."""
    rng = np.random.default_rng(0)
    model = GPT2(config.unrolled())
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), abstract_params(model))
    params["wte"]["embedding"][config.vocab_size :] = 0
    return params


def save_run(run: Path, config: GPT2Config, params, data: DataConfig = BYTES, step: int = 3) -> Path:
    """Writes a run directory as training leaves it."""
    run.mkdir()
    (run / "config.toml").write_text(to_toml(ModelConfig(config, data)))
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(step, {"params": params, "step": jnp.int32(step)}, {})
    return run


LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def nanogpt_checkpoint(theirs, config, prefix="") -> dict:
    """The dict that nanoGPT's train.py saves: Linear weights are [out, in]."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if not config.bias and name.endswith(".bias"):
            continue
        state[prefix + name] = tensor.T.contiguous() if name.endswith(LINEAR) else tensor
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    return {
        "model": state,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": sizes | {"dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters"},
    }


# The order of the tensors in llm.c's train_gpt2.py, `write_tensors`.
LLMC = (
    "wte.weight", "wpe.weight", "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
    "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
    "mlp.c_proj.weight", "mlp.c_proj.bias", "ln_f.weight", "ln_f.bias",
)  # fmt: skip


def llmc_bytes(theirs, config, version) -> bytes:
    """A file of llm.c: 256 int32, then the tensors, each stacked over the layers, matrices [out, in]."""
    padded = padded_vocab_size(config)
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, padded)
    header = struct.pack("<256i", 20240326, version, *sizes, *([0] * 248))
    state = theirs.transformer.state_dict()
    tensors = []
    for name in LLMC:
        names = [name] if name in state else [f"h.{layer}.{name}" for layer in range(config.n_layer)]
        for one in names:
            tensor = state[one].T if name in LINEAR else state[one]
            if name == "wte.weight":
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padded - config.vocab_size))
            tensor = tensor.contiguous()
            tensors.append(
                tensor.numpy().tobytes() if version == 3 else tensor.bfloat16().view(torch.int16).numpy().tobytes()
            )
    return header + b"".join(tensors)


def rounded(model):
    """A copy of a torch model whose weights are rounded to bfloat16."""
    return copy.deepcopy(model).bfloat16().float()


MERGES = ("t h", "th e", "i n", "Ġ the")
PIECES = (*sorted(CHARACTER_TO_BYTE), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>")
END = len(PIECES) - 1


def write_byte_pairs(directory: Path, **files: dict) -> None:
    """Writes vocab.json and merges.txt of a small vocabulary, and JSON files by their names without suffix."""
    tables = {"vocab": {piece: token for token, piece in enumerate(PIECES)}} | files
    for name, table in tables.items():
        (directory / f"{name}.json").write_text(json.dumps(table))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
