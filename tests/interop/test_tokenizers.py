"""Tokenizer files: read, written, and compared with tiktoken, transformers and OpenAI's own files."""

import dataclasses
import json
import shutil

import pytest
import tiktoken
from model_files import CONFIG, random_params, save_run
from torch_gpt2 import as_params, torch_gpt2
from transformers import AutoTokenizer

from gpt2_jax.config import DataConfig
from gpt2_jax.convert import convert
from gpt2_jax.data.tokenizer import Boundaries, CharTokenizer, byte_encoding, gpt2_encoding
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model
from gpt2_jax.interop.tokenizer_files import CHARACTER_TO_BYTE

GPT2_VOCABULARY = dataclasses.replace(CONFIG, vocab_size=50257, n_layer=1)

TANH = ("huggingface", "llmc", "orbax")  # the formats of models with the tanh GELU

ADVERSARIAL = [
    "",
    " ",
    "\n\n\n \t\r\n",
    "Hello, I'm a language model, don't you think? They'll've 1234567 ½ ².",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇪🇺 é é \u200b\ufeff\x00\x7f",
    "lone \ud83d and \udc4d surrogates \ud800",
    "<|endoftext|> is text, <|endoftext|><|endoftext|>, and so is <|fim_prefix|>",
    "日本語とעברית和Русский",
    "a" * 5000,
]


@pytest.fixture
def saved_gpt2(gpt2_vocabulary, tmp_path):
    """A converted model with GPT-2's vocabulary."""
    torch_gpt2(GPT2_VOCABULARY).save_pretrained(tmp_path / "hf")
    return convert(str(tmp_path / "hf"), "huggingface", tmp_path / "gpt2")


def test_gpt2_tokens_are_tiktokens(saved_gpt2):
    reference = tiktoken.get_encoding("gpt2")
    for tokenizer in (gpt2_encoding(), open_model(str(saved_gpt2)).tokenizer):
        assert tokenizer.name == "gpt2"
        assert tokenizer.n_vocab == 50257
        for text in (*ADVERSARIAL, " " * 2**20):
            expected = reference.encode(text, disallowed_special=())
            assert tokenizer.encode_ordinary(text) == expected
            assert (
                tokenizer.decode_bytes(expected)
                == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            )


def test_auto_tokenizer_gives_the_same_tokens(saved_gpt2, tmp_path, shared_data):
    theirs = AutoTokenizer.from_pretrained(saved_gpt2)
    ours = gpt2_encoding()
    text = (shared_data / "tinyshakespeare.txt").read_text()[:100_000]
    texts = [text, *(text for text in ADVERSARIAL if "endoftext" not in text and "surrogate" not in text)]
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    assert theirs("<|endoftext|>")["input_ids"] == [50256]  # as with OpenAI's files
    # transformers then saves only tokenizer.json, which is read back.
    theirs.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(saved_gpt2 / file, tmp_path / "again")
    assert not (tmp_path / "again" / "vocab.json").exists()
    again = open_model(str(tmp_path / "again")).tokenizer
    assert again.name == "gpt2"
    assert again.encode_ordinary(text) == ours.encode_ordinary(text)


def test_exported_vocabulary_files_are_openais(saved_gpt2, shared_data):
    openai = shared_data.parent / "gpt2_vocab"
    assert json.loads((saved_gpt2 / "vocab.json").read_text()) == json.loads((openai / "encoder.json").read_text())
    assert (saved_gpt2 / "merges.txt").read_text() == (openai / "vocab.bpe").read_text()


def test_tokenizers_of_bytes_and_characters_convert(tmp_path):
    letters = "\n !,.abcdeé😀"
    cases = {
        "bytes": (DataConfig(tokenizer="bytes"), 257, byte_encoding(), "a\x00é😀 \n"),
        "chars": (DataConfig(tokenizer="chars", characters=letters), len(letters), CharTokenizer(letters), "abé😀 \n!"),
    }
    for name, (data, vocab_size, ours, text) in cases.items():
        config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
        run = save_run(tmp_path / name, config, random_params(config), data)
        out = convert(str(run), "huggingface", tmp_path / f"{name}-out")
        theirs = AutoTokenizer.from_pretrained(out)
        tokens = ours.encode_ordinary(text)
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(tokens) == text
        for to in ("huggingface", "llmc", "orbax"):
            back = open_model(str(convert(str(out), to, tmp_path / f"{name}-{to}"))).tokenizer
            assert back.encode_ordinary(text) == tokens
            assert back.n_vocab == vocab_size


def test_the_config_names_the_end_of_text(theirs, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    table = json.loads((saved / "config.json").read_text()) | {"bos_token_id": 256, "eos_token_id": 257}
    (tmp_path / "model" / "config.json").write_text(json.dumps(table))
    source = save_run(tmp_path / "run", CONFIG, as_params(theirs.state_dict(), CONFIG))
    tokens = convert(str(source), "huggingface", tmp_path / "bytes")
    vocab = json.loads((tokens / "vocab.json").read_text()) | {"</s>": 257}
    del vocab["<|endoftext|>"]
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(vocab | {"<unk>": 256}))
    shutil.copy(tokens / "merges.txt", tmp_path / "model")
    for path in (tmp_path / "model", *(convert(str(tmp_path / "model"), to, tmp_path / to) for to in TANH)):
        assert open_model(str(path)).boundaries == Boundaries(256, (257,))
    out = tmp_path / "huggingface"
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 257
    theirs, copy = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "model", out))
    assert copy.get_vocab() == theirs.get_vocab()


def test_byte_pairs_after_special_tokens_keep_their_merges(saved, tmp_path):
    """Trainers number special tokens first, so the last tokens have numbers above the number of byte pairs."""
    merges = ["a b", "c d", "b c", "ab cd", "d bc"]
    pieces = ["<s>", "</s>", "<pad>", *sorted(CHARACTER_TO_BYTE), *(merge.replace(" ", "") for merge in merges)]
    shutil.copytree(saved, tmp_path / "model")
    files = {"vocab.json": json.dumps({piece: token for token, piece in enumerate(pieces)})}
    files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
    for name, content in files.items():
        (tmp_path / "model" / name).write_text(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    for path in (tmp_path / "model", *(convert(str(tmp_path / "model"), to, tmp_path / to) for to in TANH)):
        tokenizer = open_model(str(path)).tokenizer
        for text in ("abcd", "dbc", "dcba dbcabcd"):
            assert tokenizer.encode_ordinary(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("vocab", "merges", "damaged"),
    [
        ({"a": 0}, "", False),
        ({"a": "x"}, "", False),
        ({"a": 1, "b": "x"}, "", True),
        ({"a": 1, "b": 1}, "", False),
        ({"\u3042": 0, "a": 1}, "\u3042 a\n", False),
    ],
)
def test_unusual_tokenizer_files_are_unknown_or_damaged(saved, tmp_path, vocab, merges, damaged):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "model" / "merges.txt").write_text("#version: 0.2\n" + merges)
    model = open_model(str(tmp_path / "model"))
    if damaged:
        with pytest.raises(UserError, match="is not a tokenizer of transformers"):
            model.open_tokenizer()
    else:
        assert model.tokenizer is None


def test_only_openais_models_on_the_hub_imply_a_tokenizer(gpt2_vocabulary, tmp_path, add_to_hub_cache):
    """The cache may hold weights only. A model of the same size by others may have another vocabulary."""
    torch_gpt2(GPT2_VOCABULARY).save_pretrained(tmp_path / "model")
    for name, known in (("someone/portuguese", False), ("gpt2", True)):
        add_to_hub_cache(name, tmp_path / "model")
        assert (open_model(name).tokenizer is not None) == known


def test_a_tokenizer_of_another_kind_is_unknown(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    table = {"model": {"type": "WordPiece", "vocab": {}}, "pre_tokenizer": None, "normalizer": None, "added_tokens": []}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(table))
    assert open_model(str(tmp_path / "model")).tokenizer is None
    with pytest.raises(UserError, match=r"the tokenizer of .* is not known"):
        convert(str(tmp_path / "model"), "orbax", tmp_path / "out")
    out = convert(str(tmp_path / "model"), "huggingface", tmp_path / "out")
    assert json.loads((out / "tokenizer.json").read_text()) == table  # kept as it is, for transformers
