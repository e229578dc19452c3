"""The counterpart that we did not write: `transformers`' GPT-2, and its weights as our parameters."""

import numpy as np
import torch
from transformers import GPT2Config as TorchConfig
from transformers import GPT2LMHeadModel

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import padded_vocab_size

LEAVES = {"wte": "embedding", "wpe": "embedding", "ln_1": "scale", "ln_2": "scale", "ln_f": "scale"}


def torch_gpt2(config: GPT2Config, seed: int = 0) -> GPT2LMHeadModel:
    """A model of the same shape with random weights, biases and norms included."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            TorchConfig(
                vocab_size=config.vocab_size,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                activation_function={"tanh": "gelu_new", "exact": "gelu"}[config.gelu],
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="eager",
            )
        )
        for parameter in model.parameters():  # as initialised, biases are 0 and norms 1: a swap would not be seen
            parameter += 0.02 * torch.randn(parameter.shape)
    return model.eval()


def as_params(tensors: dict[str, torch.Tensor], config: GPT2Config) -> dict:
    """A state dict, or gradients under the same names, as a Flax parameter tree. Conv1D is [in, out] as Flax is."""
    params: dict = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight":
            continue
        *path, kind = name.removeprefix("transformer.").replace("h.", "h_", 1).split(".")
        leaf = kind if kind == "bias" else LEAVES.get(path[-1], "kernel")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        array = tensor.detach().numpy().copy()
        if path == ["wte"]:
            array = np.pad(array, ((0, padded_vocab_size(config) - len(array)), (0, 0)))
        node[leaf] = array
    return params
