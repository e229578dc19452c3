"""What every reader checks: the tied head, prefixes, biases, defaults, sizes and permissions."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from model_files import CONFIG, EXACT, assert_loads, llmc_bytes, nanogpt_checkpoint, random_params, save_run
from torch_gpt2 import as_params
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2_jax import load
from gpt2_jax.convert import convert
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model

READERS = ("safetensors", "pytorch_model.bin", "ckpt.pt")


@pytest.fixture
def write(theirs, theirs_exact, saved, tmp_path):
    """Writes a state dict, changed by a function, as a file of one of the readers; returns model, path and config."""

    def write(reader, change):
        config, model = (EXACT, theirs_exact) if reader == "ckpt.pt" else (CONFIG, theirs)
        checkpoint = nanogpt_checkpoint(model, config)
        state = checkpoint["model"] if reader == "ckpt.pt" else model.state_dict()
        state = change({name: tensor.clone() for name, tensor in state.items()})
        if reader == "ckpt.pt":
            torch.save(checkpoint | {"model": state}, tmp_path / "ckpt.pt")
            return model, tmp_path, config
        shutil.copy(saved / "config.json", tmp_path)
        if reader == "safetensors":
            safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        else:
            torch.save(state, tmp_path / "pytorch_model.bin")
        return model, tmp_path, config

    return write


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def without(state, name):
    return {other: tensor for other, tensor in state.items() if other != name}


def inside(state):
    """As torch.compile of each block names them."""
    return {name.replace(".attn.", "._orig_mod.attn."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_no_part_of_a_name(write, reader, prefix):
    model, path, config = write(reader, functools.partial(prefixed, prefix=prefix))
    assert_loads(path, model, config)


@pytest.mark.parametrize("reader", READERS)
def test_other_names_of_the_same_tensors(write, reader):
    for change in (
        inside,
        functools.partial(without, name="lm_head.weight"),
        functools.partial(without, name="transformer.wte.weight"),
        lambda state: {name.removeprefix("transformer."): tensor for name, tensor in state.items()},
    ):
        model, path, config = write(reader, change)
        assert_loads(path, model, config)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lm_head.weight": torch.zeros(300, 32)}, "has an lm_head.weight that differs from wte.weight; expected a"),
        ({"lm_head.weight": torch.zeros(299, 32)}, "has an lm_head.weight that differs from wte.weight"),
        ({"lm_head.bias": torch.zeros(300)}, "has the tensor lm_head.bias, which a GPT-2 of its config does not"),
        ({"wte.weight": torch.zeros(300, 32)}, "has the tensor wte.weight twice"),
        ({"h.3.ln_1.weight": torch.zeros(32)}, "has the tensor h.3.ln_1.weight, which a GPT-2"),
    ],
)
def test_other_tensors_are_refused(write, reader, extra, message):
    _, path, _ = write(reader, lambda state: state | extra)
    with pytest.raises(UserError, match=message) as error:
        open_model(str(path))
    assert "\n" not in str(error.value)


def test_a_file_of_save_model_loads(theirs, saved, tmp_path):
    """It keeps one of the two names of the tied tensor, and not always the same."""
    shutil.copy(saved / "config.json", tmp_path)
    safetensors.torch.save_model(theirs, str(tmp_path / "model.safetensors"))
    assert_loads(tmp_path, theirs)


# --- biases and defaults -------------------------------------------------------------------------------


def test_an_export_without_biases_has_them_after_transformers_trained_it(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=257, bias=False)
    run = save_run(tmp_path / "run", config, random_params(config))
    theirs = AutoModelForCausalLM.from_pretrained(convert(str(run), "huggingface", tmp_path / "out"))
    theirs.save_pretrained(tmp_path / "untrained")
    assert not load(str(tmp_path / "untrained")).model.config.bias
    with torch.no_grad():
        theirs.transformer.h[1].mlp.c_fc.bias[3] = 0.5
    theirs.save_pretrained(tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["bias"] is False
    assert_loads(tmp_path / "trained", theirs, dataclasses.replace(config, bias=True))


def test_biases_of_nanogpt_are_those_in_the_file(theirs_exact, tmp_path):
    checkpoint = nanogpt_checkpoint(theirs_exact, EXACT)
    for sizes in (without(checkpoint["model_args"], "bias"), checkpoint["model_args"] | {"bias": False}):
        torch.save(checkpoint | {"model_args": sizes}, tmp_path / "ckpt.pt")
        assert_loads(tmp_path, theirs_exact, EXACT)


def test_missing_keys_have_the_defaults_of_transformers(tmp_path):
    """Everything but the width, which would make the test slow, and the heads, which divide it."""
    theirs = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2)).eval()
    theirs.save_pretrained(tmp_path)
    for names in (("n_embd", "n_head"), ("hidden_size", "num_attention_heads")):
        table = {"model_type": "gpt2"} | dict(zip(names, (8, 2), strict=True))
        (tmp_path / "config.json").write_text(json.dumps(table))
        read = GPT2Config.from_pretrained(tmp_path)
        config = open_model(str(tmp_path)).config
        assert (config.n_layer, config.n_head, config.n_embd) == (read.n_layer, read.n_head, read.n_embd) == (12, 2, 8)
        assert (config.vocab_size, config.block_size) == (read.vocab_size, read.n_positions) == (50257, 1024)
    params = as_params(theirs.state_dict(), config)
    np.testing.assert_array_equal(load(str(tmp_path)).params["wpe"]["embedding"], params["wpe"]["embedding"])


# --- sizes ---------------------------------------------------------------------------------------------


SIZES = {
    "n_layer": (100_000, 2**31 - 1),
    "n_embd": (2**31 - 4,),
    "vocab_size": (2**31 - 1, 0),
    "block_size": (2**31 - 1,),
    "n_head": (2**31 - 1, 0),
}


@pytest.mark.parametrize("format", ["huggingface", "nanogpt", "llmc", "orbax"])
def test_absurd_sizes_are_refused_before_anything_is_built(theirs, theirs_exact, saved, tmp_path, format):
    for key, values in SIZES.items():
        for value in values:
            directory = tmp_path / f"{key}-{value}"
            if format == "orbax":
                save_run(directory, dataclasses.replace(CONFIG, **{key: value}), {"x": np.zeros(1)})
            elif format == "huggingface":
                shutil.copytree(saved, directory)
                name = {"block_size": "n_positions"}.get(key, key)
                table = json.loads((directory / "config.json").read_text()) | {name: value}
                (directory / "config.json").write_text(json.dumps(table))
            elif format == "nanogpt":
                directory.mkdir()
                checkpoint = nanogpt_checkpoint(theirs_exact, EXACT)
                torch.save(checkpoint | {"model_args": checkpoint["model_args"] | {key: value}}, directory / "ckpt.pt")
            else:
                directory.mkdir()
                data = bytearray(llmc_bytes(theirs, CONFIG, 3))
                place = 8 + 4 * ("block_size", "vocab_size", "n_layer", "n_head", "n_embd").index(key)
                data[place : place + 4] = struct.pack("<i", value)
                data[28:32] = struct.pack("<i", 2**31 - 1)  # the padded vocabulary
                (directory / "model_00000001.bin").write_bytes(data)
            start = time.perf_counter()
            with pytest.raises(UserError, match=rf"has {key} = {value} in its config; expected .* correct it"):
                open_model(str(directory))
            assert time.perf_counter() - start < 3


def test_a_config_with_more_layers_than_the_file_is_refused_at_once(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    table = json.loads((saved / "config.json").read_text()) | {"n_layer": 1000}
    (tmp_path / "model" / "config.json").write_text(json.dumps(table))
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"has no h\.999\.ln_1\.weight"):
        load(str(tmp_path / "model"))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 100_000, "[1]", '{"a": ' + "9" * 5000 + "}", "\ud800", '{"a": 1', " " * (2**25 + 1)],
    ids=["lists", "objects", "list", "number", "surrogate", "cut", "long"],
)
def test_hostile_json_is_one_line(saved, tmp_path, name, text):
    shutil.copytree(saved, tmp_path / "model")
    if name.startswith("special"):
        (tmp_path / "model" / "vocab.json").write_text("{}")
    if name.startswith("model"):
        (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=name) as error:
        open_model(str(tmp_path / "model")).open_tokenizer()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


# --- permissions ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def ordinary_user():
    """Takes away root's right to read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public():
    """A directory that every user can enter, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="changes the user")
@pytest.mark.parametrize(
    ("format", "forbidden"),
    [
        ("huggingface", "."),
        ("huggingface", "config.json"),
        ("huggingface", "generation_config.json"),
        ("huggingface", "model.safetensors"),
        ("huggingface", "tokenizer_config.json"),
        ("huggingface", "merges.txt"),
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("nanogpt", "."),
        ("nanogpt", "ckpt.pt"),
        ("llmc", "."),
        ("llmc", "model_00000003.bin"),
        ("orbax", "."),
        ("orbax", "config.toml"),
        ("orbax", "checkpoints"),
        ("orbax", "checkpoints/3"),
        ("orbax", "checkpoints/3/state/_METADATA"),
        ("orbax", "checkpoints/3/state/d"),
    ],
)
def test_what_may_not_be_read_is_one_line_that_says_so(theirs, public, format, forbidden):
    config = dataclasses.replace(EXACT if format == "nanogpt" else CONFIG, n_layer=1, vocab_size=257)
    model = public / "run"
    save_run(model, config, random_params(config))
    if format == "pytorch_model.bin":
        model = convert(str(model), "huggingface", public / "model")
        state = safetensors.torch.load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        torch.save(state, model / "pytorch_model.bin")
    elif format != "orbax":
        model = convert(str(model), format, public / "model")
    for path in (model, *model.rglob("*")):
        path.chmod(0o755)
    (model / forbidden).chmod(0)
    try:
        with ordinary_user(), pytest.raises(UserError, match="no permission to read") as error:
            open_model(str(model)).open_tokenizer()
    finally:
        (model / forbidden).chmod(0o755)
    assert str(model / forbidden) in str(error.value)
    assert "\n" not in str(error.value)
