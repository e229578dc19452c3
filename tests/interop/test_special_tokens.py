"""Special and added tokens: read as transformers reads them, kept by every format, and where a text ends."""

import dataclasses
import json
import shutil

import pytest
import safetensors.numpy
from model_files import CONFIG, END, EXACT, write_byte_pairs
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from torch_gpt2 import torch_gpt2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2_jax import load
from gpt2_jax.convert import convert
from gpt2_jax.data.tokenizer import Boundaries, boundaries
from gpt2_jax.errors import UserError
from gpt2_jax.generation import Sampling, generate
from gpt2_jax.interop import open_model
from gpt2_jax.interop.model_files import directory_files
from gpt2_jax.interop.tokenizer_files import read_tokenizer

ROLES = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
WORDS = "the wordy in wordywordy swordy  wordy  the thin"
TEXTS = (WORDS, "<|im_start|>the<|im_end|> [PAD]<|endoftext|>in \n <mask> the <|endoftext|>", "ab, cd! [UNK]")


def token(content, special=True, **flags):
    return dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {
        "content": content,
        "special": special,
        **flags,
    }


def legacy(directory):
    """As slow tokenizers of transformers 2 to 4 saved them."""
    write_byte_pairs(
        directory,
        added_tokens={"<|im_end|>": END + 1, "<|im_start|>": END + 2, "wordy": END + 3},
        special_tokens_map={
            "bos_token": "<|endoftext|>",
            "eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False},
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>"],
        },
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"},
    )


def decoder(directory):
    """As transformers 4.34 and newer saved them: tokenizer_config.json has every added token."""
    added = [token("<|endoftext|>"), token("[PAD]"), token("wordy", special=False, single_word=True)]
    config = {
        "added_tokens_decoder": {str(END + number): one for number, one in enumerate(added)},
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "[PAD]",
        "tokenizer_class": "GPT2Tokenizer",
    }
    write_byte_pairs(directory, tokenizer_config=config)


def named(directory):
    """A pad token that only the config names, without a number."""
    write_byte_pairs(directory, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "pad_token": "[PAD]"})


def pad_is_end(directory):
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    write_byte_pairs(directory, special_tokens_map=roles)


def fast(directory):
    """As this transformers saves them: tokenizer.json."""
    legacy(directory)
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(directory)
    theirs.add_tokens(["  ", "thin"])
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    for path in directory.iterdir():
        path.unlink()
    theirs.save_pretrained(directory)
    assert not (directory / "vocab.json").exists()


def both(directory):
    """tokenizer.json beside the older files, as many models on the hub have them."""
    fast(directory)
    legacy(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    (directory / "added_tokens.json").write_text(json.dumps(theirs.get_added_vocab()))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "[PAD]"})
    )


def characters(directory):
    """Characters, to which a user of transformers added tokens."""
    letters = {letter: number for number, letter in enumerate(sorted(set(WORDS + "ab, cd!<>|_[]PADUNKmsk\n")))}
    plain = Tokenizer(BPE(letters, []))
    plain.decoder = Fuse()
    theirs = PreTrainedTokenizerFast(tokenizer_object=plain)
    theirs.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "[PAD]"})
    theirs.add_tokens(["wordy"])
    theirs.save_pretrained(directory)


def starts(directory):
    """Files whose settings put a token before each text."""
    legacy(directory)
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def template(directory):
    """A tokenizer.json that does so."""
    fast(directory)
    theirs = Tokenizer.from_file(str(directory / "tokenizer.json"))
    words = [("<|endoftext|>", END), ("<|im_start|>", END + 2)]
    around = TemplateProcessing("<|im_start|> <|endoftext|> $A", special_tokens=words)
    theirs.post_processor = Sequence([ByteLevel(trim_offsets=False), around])
    theirs.save(str(directory / "tokenizer.json"))


KINDS = (legacy, decoder, named, pad_is_end, fast, both, characters, starts, template)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each GELU, a directory of transformers whose config names no tokens around a text."""
    directory = tmp_path_factory.mktemp("models")
    for config in (CONFIG, EXACT):
        torch_gpt2(config).save_pretrained(directory / config.gelu)
    return directory


def with_tokenizer(models, directory, kind, gelu="tanh"):
    directory.mkdir()
    kind(directory)
    for path in (models / gelu).iterdir():
        shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_tokens_are_those_of_transformers(models, tmp_path, kind):
    theirs = AutoTokenizer.from_pretrained(with_tokenizer(models, tmp_path / "model", kind))
    ours = open_model(str(tmp_path / "model")).open_tokenizer()
    assert ours.n_vocab == len(theirs)
    around = boundaries(ours)
    if theirs.eos_token_id is not None:
        assert around.ends == (theirs.eos_token_id,)
    if theirs.bos_token_id is not None:
        assert around.start == theirs.bos_token_id
    assert around.pad in (None, theirs.pad_token_id)
    assert [*around.prefix, *ours.encode_ordinary(WORDS)] == theirs(WORDS)["input_ids"]
    for number in range(ours.n_vocab):
        if number >= 128:  # of bytes that are no characters, theirs gives a replacement
            assert ours.decode_bytes([number]).decode("utf-8", "replace") == theirs.decode([number])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_format_keeps_the_tokenizer(models, tmp_path, kind):
    for gelu, formats in (("tanh", ("huggingface", "llmc", "orbax")), ("exact", ("nanogpt",))):
        source = with_tokenizer(models, tmp_path / gelu, kind, gelu)
        theirs = AutoTokenizer.from_pretrained(source)
        ours = open_model(str(source))
        for to in formats:
            there = convert(str(source), to, tmp_path / to)
            model = open_model(str(there))
            assert model.boundaries == ours.boundaries
            assert model.tokenizer.n_vocab == ours.tokenizer.n_vocab
            assert model.tokenizer.encode_ordinary(WORDS) == ours.tokenizer.encode_ordinary(WORDS)
            back = there if to == "huggingface" else convert(str(there), "huggingface", tmp_path / f"{to}-back")
            copy = AutoTokenizer.from_pretrained(back)
            for text in TEXTS:
                assert copy(text)["input_ids"] == theirs(text)["input_ids"]
            assert [getattr(copy, role) for role in ROLES] == [getattr(theirs, role) for role in ROLES]
            assert copy.all_special_ids == theirs.all_special_ids


def texts_from(gpt2, start):
    """Four texts that follow a token."""
    rows = [generate(gpt2.model, gpt2.params, [[start]], 25, Sampling(seed=seed, stop=END + 1))[0] for seed in range(4)]
    return [gpt2.tokenizer.decode_bytes(row.tolist()).decode("utf-8", "replace") for row in rows]


def test_a_text_ends_and_starts_where_the_model_says_in_every_format_of_tokenizer(tmp_path):
    """The end is an added token: likely, and beyond the vocabulary of vocab.json."""
    config = dataclasses.replace(CONFIG, vocab_size=END + 4, n_layer=1)
    theirs = torch_gpt2(config)
    theirs.config.bos_token_id, theirs.config.eos_token_id = END, END + 1
    theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id = END, END + 1
    texts = {}
    for kind in (legacy, fast):
        directory = tmp_path / kind.__name__
        directory.mkdir()
        kind(directory)
        theirs.save_pretrained(directory)
        state = safetensors.numpy.load_file(directory / "model.safetensors")
        state["transformer.wte.weight"][END + 1] *= 30
        safetensors.numpy.save_file(state, directory / "model.safetensors", {"format": "pt"})
        gpt2 = load(str(directory))
        texts[kind] = [gpt2.generate("the", 25, seed=seed) for seed in range(8)]
        for to in ("llmc", "orbax"):
            copy = load(str(convert(str(directory), to, tmp_path / f"{kind.__name__}-{to}")))
            assert [copy.generate("the", 25, seed=seed) for seed in range(2)] == texts[kind][:2]
        assert [gpt2.generate("", 25, seed=seed) for seed in range(4)] == texts_from(gpt2, END)
        assert texts_from(gpt2, END) != texts_from(gpt2, END + 1)
    assert texts[legacy] == texts[fast]
    assert len(set(map(len, texts[fast]))) > 1  # some end early
    assert not any("<|im_end|>" in text for text in texts[fast])


def test_any_of_several_ends_ends_a_text(models, tmp_path):
    """Chat models name several ends in generation_config.json, which transformers prefers to config.json."""
    source = with_tokenizer(models, tmp_path / "model", legacy)
    free = load(str(source)).generate("the", 20, temperature=0)
    table = {"bos_token_id": END, "eos_token_id": [END + 1, *range(256)], "pad_token_id": END}
    (source / "generation_config.json").write_text(json.dumps(table))
    ends = load(str(source)).generate("the", 20, temperature=0)
    assert free.startswith(ends)
    assert len(ends) < len(free)
    around = Boundaries(END, (END + 1, *range(256)), END)
    for to in ("llmc", "orbax", "huggingface"):
        there = convert(str(source), to, tmp_path / to)
        assert open_model(str(there)).boundaries == around
    copied = json.loads((tmp_path / "huggingface" / "generation_config.json").read_text())
    assert copied["eos_token_id"] == table["eos_token_id"]
    assert json.loads((tmp_path / "huggingface" / "config.json").read_text())["pad_token_id"] == END


def test_a_prompt_has_the_tokens_of_transformers(models, tmp_path):
    source = with_tokenizer(models, tmp_path / "model", template)
    theirs = AutoTokenizer.from_pretrained(source)
    gpt2 = load(str(source))
    for prompt in ("the wordy", ""):
        tokens = theirs(prompt)["input_ids"]
        assert END in tokens
        row = generate(gpt2.model, gpt2.params, [tokens], 5, Sampling(0, vocab_size=gpt2.tokenizer.n_vocab))[0]
        text = gpt2.tokenizer.decode_bytes(row.tolist()).decode("utf-8", "replace")
        assert gpt2.generate(prompt, 5, temperature=0) == prompt + text


SINGLE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a"}}]}


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"type": "BertProcessing", "sep": ["a", 1], "cls": ["a", 1]}, "is not known"),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "X"}]}, "is not known"),
        ({"type": "Sequence", "processors": [SINGLE, SINGLE]}, "is not known"),
        (SINGLE | {"special_tokens": {}}, "KeyError"),
        (SINGLE | {"special_tokens": {"a": {"ids": [10**30]}}}, "not in the vocabulary"),
        (SINGLE | {"special_tokens": {"a": {"ids": ["1"]}}}, "not in the vocabulary"),
        ([], "TypeError"),
    ],
)
def test_what_precedes_a_prompt_may_be_of_a_kind_that_is_not_known(models, tmp_path, processor, message):
    source = with_tokenizer(models, tmp_path / "model", fast)
    table = json.loads((source / "tokenizer.json").read_text()) | {"post_processor": processor}
    (source / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=message):
        open_model(str(source)).open_tokenizer()


def test_a_space_before_each_text_is_not_forgotten(models, tmp_path):
    source = with_tokenizer(models, tmp_path / "model", legacy)
    (source / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert open_model(str(source)).tokenizer is None


def test_a_token_may_be_an_empty_text(tmp_path):
    characters(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    number = len(table["model"]["vocab"]) + len(table["added_tokens"])
    table["added_tokens"].append({"id": number, "content": "", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert read_tokenizer(directory_files(tmp_path), lambda: None).decode_bytes([0, number]) == b"\n"
