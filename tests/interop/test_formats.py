"""What `convert` writes, every command reads: the whole matrix of formats, tokenizers and sizes of vocabularies."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from model_files import CONFIG, END, EXACT, FORMATS, random_params, save_run, write_byte_pairs
from torch_gpt2 import torch_gpt2

from gpt2_jax import generate, load
from gpt2_jax.config import DataConfig
from gpt2_jax.convert import convert
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model

OPENAI = Path(__file__).parents[3] / "shared" / "gpt2_vocab"  # the released vocabulary, where there is one
LETTERS = "\n !,abcdehilnotw"
TEXT = "the line, an ode! "
BYTES, GPT2 = DataConfig(tokenizer="bytes"), DataConfig(tokenizer="gpt2")
# Runs by name: the tokenizer, and the size of the model's vocabulary.
RUNS = {
    "bytes": (BYTES, 257),
    "bytes-padded": (BYTES, 300),
    "characters": (DataConfig(tokenizer="chars", characters=LETTERS), len(LETTERS)),
    "gpt2": (GPT2, 50257),
    "gpt2-50304": (GPT2, 50304),
    "gpt2-50432": (GPT2, 50432),
}


def added(directory, vocab):
    """Adds a token that ends a text, and a pad token, to files of byte pairs."""
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_end|>": vocab, "[PAD]": vocab + 1}))
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    (directory / "special_tokens_map.json").write_text(json.dumps(roles))
    config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": vocab}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").unlink(missing_ok=True)
    (directory / "tokenizer_config.json").unlink(missing_ok=True)


def source(directory, name, gelu):
    """Writes a model of one kind; its name says which."""
    base = dataclasses.replace(EXACT if gelu == "exact" else CONFIG, n_layer=1, n_embd=8)
    if name in RUNS:
        data, vocab_size = RUNS[name]
        config = dataclasses.replace(base, vocab_size=vocab_size)
        return save_run(directory, config, random_params(config), data)
    if name == "byte-pairs-added":
        torch_gpt2(dataclasses.replace(base, vocab_size=END + 3)).save_pretrained(directory)
        write_byte_pairs(directory)
        added(directory, END + 1)
        return directory
    assert name == "gpt2-added"
    directory.mkdir()
    shutil.copy(OPENAI / "encoder.json", directory / "vocab.json")
    shutil.copy(OPENAI / "vocab.bpe", directory / "merges.txt")
    torch_gpt2(dataclasses.replace(base, vocab_size=50304)).save_pretrained(directory)
    added(directory, 50257)
    return directory


GENERATED = ("bytes-padded", "gpt2-50304", "byte-pairs-added")  # the end of the text is in each of them another token
SLOW = ("gpt2-50432", "gpt2-added")  # reading GPT-2's files takes 0.3 s each time
KINDS = (*RUNS, "byte-pairs-added", "gpt2-added")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_what_convert_writes_every_command_reads(request, tmp_path, capsys, kind):
    if kind.startswith("gpt2"):
        request.getfixturevalue("gpt2_vocabulary")
    for gelu, to in (("tanh", "huggingface"), ("tanh", "llmc"), ("tanh", "orbax"), ("exact", "nanogpt")):
        original = tmp_path / gelu
        if not original.exists():
            source(original, kind, gelu)
            ours = open_model(str(original))
        there = convert(str(original), to, tmp_path / to)
        paths = [there]
        if to in ("llmc", "nanogpt"):  # which have no config beside the weights
            paths.append(convert(str(there), "orbax", tmp_path / f"{to}-again"))
        for path in paths:
            model = open_model(str(path))
            assert model.boundaries == ours.boundaries
            assert model.tokenizer.n_vocab == ours.tokenizer.n_vocab
            assert model.tokenizer.encode_ordinary(TEXT) == ours.tokenizer.encode_ordinary(TEXT)
        if kind in GENERATED and to != "nanogpt":  # each model takes a compilation
            assert text(there, capsys) == text(original, capsys)
        else:
            load(str(there)).tokenizer.decode_bytes(list(range(ours.tokenizer.n_vocab)))


def text(path, capsys):
    capsys.readouterr()
    generate.main(["--model", str(path), "--prompt", TEXT, "--max-new-tokens", "1", "--seed", "1"])
    return capsys.readouterr().out


def test_an_unknown_tokenizer_never_becomes_gpt2s(tmp_path, add_to_hub_cache):
    """A model of the size of GPT-2's vocabulary whose tokenizer is not at hand."""
    for config in (CONFIG, EXACT):
        size = dataclasses.replace(config, vocab_size=50257, n_layer=1, n_embd=8)
        torch_gpt2(size).save_pretrained(tmp_path / config.gelu)
        add_to_hub_cache(f"someone/{config.gelu}", tmp_path / config.gelu)
    for to in FORMATS:
        with pytest.raises(UserError, match=r"the tokenizer of someone/\w+ is not known"):
            convert("someone/exact" if to == "nanogpt" else "someone/tanh", to, tmp_path / to)
        assert not (tmp_path / to).exists()
