"""Models of transformers: directories and hub caches read, exports read back by transformers."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from model_files import CONFIG, EXACT, assert_loads, assert_same_params, random_params, rounded, save_run
from torch_gpt2 import torch_gpt2
from transformers import AutoModelForCausalLM

from gpt2_jax import GPT2, load
from gpt2_jax.convert import convert
from gpt2_jax.errors import UserError

# --- reading -------------------------------------------------------------------------------------------


def test_a_saved_model_loads_and_computes_the_same_logits(theirs, saved):
    model, params = assert_loads(saved, theirs)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 32))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = jax.jit(model.apply)({"params": params}, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)  # float32 matmuls that add in another order


def hub_state(theirs):
    """A state dict like that of `gpt2` on the hub: no prefix, and the causal masks as buffers."""
    state = {name.removeprefix("transformer."): tensor.clone() for name, tensor in theirs.state_dict().items()}
    del state["lm_head.weight"]
    for layer in range(CONFIG.n_layer):
        state[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 32, 32))
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def test_files_like_those_of_gpt2_on_the_hub_load(theirs, saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    safetensors.torch.save_file(hub_state(theirs), tmp_path / "model.safetensors")
    assert_loads(tmp_path, theirs)


def test_a_config_from_before_2020_loads(theirs, saved, tmp_path):
    table = json.loads((saved / "config.json").read_text())
    old = {key: table[key] for key in ("model_type", "vocab_size", "n_embd", "n_layer", "n_head")} | {"n_ctx": 32}
    (tmp_path / "config.json").write_text(json.dumps(old))
    shutil.copy(saved / "model.safetensors", tmp_path)
    assert_loads(tmp_path, theirs)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-zip"])
def test_a_pytorch_model_bin_loads(theirs, saved, tmp_path, zipped):
    shutil.copy(saved / "config.json", tmp_path)
    torch.save(hub_state(theirs), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_loads(tmp_path, theirs)


def test_sharded_safetensors_load(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_loads(tmp_path, theirs)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"has no model-00002-.*, which model.safetensors.index.json lists"):
        load(str(tmp_path))


def test_a_sharded_pytorch_model_bin_loads(theirs, saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    state = theirs.transformer.state_dict()
    halves = {"a.bin": list(state)[:20], "b.bin": list(state)[20:]}
    for file, names in halves.items():
        torch.save({name: state[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_loads(tmp_path, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_exactly(tmp_path, dtype):
    half = torch_gpt2(CONFIG).to(dtype)
    half.save_pretrained(tmp_path)
    assert_loads(tmp_path, half.float())


def test_a_model_with_the_exact_gelu_loads(theirs_exact, tmp_path):
    theirs_exact.save_pretrained(tmp_path)
    assert_loads(tmp_path, theirs_exact, EXACT)


def test_a_name_on_the_hub_is_read_from_its_cache(theirs, saved, add_to_hub_cache):
    add_to_hub_cache("someone/small", saved)
    assert_loads("someone/small", theirs)
    with pytest.raises(
        UserError, match=r"gpt2-medium is not a file or directory here, it is not in the cache .* HF_HOME"
    ):
        load("gpt2-medium")


# --- writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, vocab_size=257),
        dataclasses.replace(EXACT, vocab_size=257),
        dataclasses.replace(CONFIG, vocab_size=257, bias=False),
    ],
    ids=["gpt2", "exact-gelu", "no-bias"],
)
def test_transformers_loads_the_export(tmp_path, config):
    os.umask(0o022)
    model = GPT2(config)
    params = random_params(config)
    run = save_run(tmp_path / "run", config, params)
    out = convert(str(run), "huggingface", tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokens = np.random.default_rng(0).integers(0, 257, (2, 32))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert expected.shape == (2, 32, 257)  # without the padding of the vocabulary
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, tokens), expected, atol=1e-4)
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes == {0o644}  # readable for others, as the umask allows
    table = json.loads((out / "config.json").read_text())
    assert table["n_ctx"] == 32  # for llama.cpp
    assert (table["bos_token_id"], table["eos_token_id"]) == (256, 256)
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = load(str(out))
    assert again.model.config.bias == config.bias
    assert_same_params(again.params, params)


def test_bfloat16_exports_round_once(theirs, saved, tmp_path):
    out = convert(str(saved), "huggingface", tmp_path / "out", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert_loads(out, rounded(theirs))


# --- damaged files -------------------------------------------------------------------------------------


def break_json(**changes):
    def apply(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def rewrite_tensors(change):
    def apply(directory):
        path = directory / "model.safetensors"
        state = safetensors.torch.load_file(path)
        change(state)
        safetensors.torch.save_file(state, path)

    return apply


def cut(name, keep):
    def apply(directory):
        path = directory / name
        path.write_bytes(path.read_bytes()[:keep])

    return apply


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            cut("model.safetensors", -1),
            r"model.safetensors is cut off, damaged or not safetensors \(.*\); copy it again",
        ),
        (cut("model.safetensors", 4), "is cut off, damaged or not safetensors"),
        (write("model.safetensors", b"\xff" * 100), "is cut off, damaged or not safetensors"),
        (cut("config.json", 30), "config.json is not JSON"),
        (lambda directory: (directory / "config.json").unlink(), "without config.json, checkpoints, ckpt.pt or"),
        (
            lambda directory: (directory / "model.safetensors").unlink(),
            "has no weights; expected one of model.safetensors",
        ),
        (break_json(model_type="llama"), r"has model_type = 'llama' in config.json; expected 'gpt2'"),
        (
            break_json(n_embd=64),
            r"h_2/ln_1/scale has the shape \[32\], but its config implies \[64\] .*; correct",
        ),
        (break_json(n_layer=4), "has no transformer.h.3.ln_1.weight|has no h.3"),
        (break_json(n_layer=2), "has the tensor h.2.attn.c_attn.bias, which a GPT-2 of its config does not have"),
        (
            break_json(vocab_size=None),
            "has vocab_size = None in its config; expected a whole number from 1 to 16,777,216",
        ),
        (break_json(n_layer=2.7), "has n_layer = 2.7 in its config"),
        (break_json(n_embd=-32), "has n_embd = -32"),
        (break_json(n_head=0), "has n_head = 0"),
        (break_json(n_head=5), "has n_embd = 32, which is not a multiple of n_head = 5"),
        (break_json(n_inner=100), "has n_inner = 100"),
        (break_json(activation_function="relu"), "has activation_function = 'relu'"),
        (break_json(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True"),
        (break_json(layer_norm_epsilon=1e-6), "layer_norm_epsilon = 1e-06"),
        (rewrite_tensors(lambda state: state.pop("transformer.ln_f.bias")), r"has no ln_f.bias, which a GPT-2"),
        (
            rewrite_tensors(lambda state: state.update({"lm_head.weight": torch.zeros(300, 32)})),
            "has an lm_head.weight that differs from wte.weight; expected a head tied to",
        ),
        (
            rewrite_tensors(lambda state: state.update({"transformer.wpe.weight": torch.zeros(32, 32).int()})),
            "wpe/embedding holds int32; expected float32",
        ),
        (write("model.safetensors.index.json", b"{}"), None),
    ],
)
def test_a_damaged_directory_is_one_clear_line(saved, tmp_path, damage, message):
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    damage(directory)
    if message is None:  # the file is not needed
        load(str(directory))
        return
    with pytest.raises(UserError, match=message) as error:
        load(str(directory))
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)
