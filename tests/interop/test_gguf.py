"""llama.cpp's GGUF: files read back by the package `gguf`, which llama.cpp's developers write."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from model_files import CONFIG, END, EXACT, MERGES, PIECES, random_params, save_run, write_byte_pairs

from gpt2_jax.config import DataConfig
from gpt2_jax.convert import convert
from gpt2_jax.errors import UserError

# Names in llama.cpp's files, from its source: those of a block after "blk.N.".
NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
LINEAR = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # [out, in] in the file


@pytest.fixture
def byte_pairs(theirs, tmp_path):
    """A model of transformers with a tokenizer of byte pairs and unused rows in its embedding."""
    theirs.save_pretrained(tmp_path / "model")
    write_byte_pairs(tmp_path / "model")
    return tmp_path / "model"


def gguf_name(name):
    """The name of a tensor of transformers."""
    *path, kind = name.removeprefix("transformer.").split(".")
    if path[0] == "h":
        return f"blk.{path[1]}.{NAMES['.'.join(path[2:])]}.{kind}"
    return f"{NAMES[path[0]]}.{kind}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_package_of_llama_cpp_reads_every_tensor_and_key(theirs, byte_pairs, tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    convert(str(byte_pairs), "gguf", tmp_path / "out", dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    read = {tensor.name: tensor for tensor in reader.tensors}
    expected = {gguf_name(name): tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        tensor = tensor.T if name.endswith(LINEAR) else tensor
        if dtype == "bfloat16" and tensor.ndim == 2 and name != "position_embd.weight":
            assert read[name].tensor_type == gguf.GGMLQuantizationType.BF16
            bits = tensor.bfloat16().contiguous().view(torch.int16).numpy()
            np.testing.assert_array_equal(read[name].data.view(np.int16).reshape(bits.shape), bits)
        else:
            assert read[name].data.dtype == np.float32
            np.testing.assert_array_equal(read[name].data, tensor.numpy())

    fields = {name: field.contents() for name, field in reader.fields.items()}
    sizes = {"block_count": 3, "context_length": 32, "embedding_length": 32, "feed_forward_length": 128}
    assert {f"gpt2.{name}": size for name, size in sizes.items()}.items() <= fields.items()
    assert fields["gpt2.attention.head_count"] == 4
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert fields["general.architecture"] == "gpt2"
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[: END + 1] == list(PIECES)
    assert len(tokens) == len(kinds) == CONFIG.vocab_size
    normal, control, unused = 1, 3, 5
    assert kinds == [normal] * END + [control] + [unused] * (CONFIG.vocab_size - END - 1)
    assert fields["tokenizer.ggml.merges"] == list(MERGES)
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (END, END)
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_biases_that_a_model_lacks_are_zeros(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = dataclasses.replace(CONFIG, bias=False)
    convert(str(save_run(tmp_path / "run", config, random_params(config))), "gguf", tmp_path / "out")
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    biases = {name: data for name, data in read.items() if name.endswith(".bias")}
    assert len(biases) == 6 * config.n_layer + 1
    assert not any(data.any() for data in biases.values())
    assert read["blk.2.ffn_up.bias"].shape == (4 * config.n_embd,)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (EXACT, DataConfig(tokenizer="bytes"), "uses the exact GELU, but llama.cpp only has the tanh one"),
        (
            dataclasses.replace(CONFIG, vocab_size=2),
            DataConfig(tokenizer="chars", characters="ab"),
            "has a tokenizer of characters, which GGUF cannot represent; take --to huggingface",
        ),
    ],
)
def test_a_model_that_llama_cpp_cannot_represent_is_refused(tmp_path, config, data, message):
    pytest.importorskip("gguf")
    run = save_run(tmp_path / "run", config, random_params(config), data)
    with pytest.raises(UserError, match=message):
        convert(str(run), "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_the_package_an_error_says_what_to_install(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="writing GGUF needs gguf, which is not installed; type pip install gguf"):
        convert(str(saved), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
