"""Tokenizers, text and token files as the data of a run, compared with tiktoken, the bytes and nanoGPT's files."""

import dataclasses
import pickle

import numpy as np
import pytest
import tiktoken
from token_files import write_llmc, write_nanogpt

from gpt2_jax.config import DataConfig, SourceConfig
from gpt2_jax.config.toml import read_config
from gpt2_jax.data import open_data
from gpt2_jax.data.corpus import Document, read_corpus, split_by_name, tokenize
from gpt2_jax.data.encode import encode_document
from gpt2_jax.data.tokenizer import CharTokenizer, byte_encoding, gpt2_encoding, vocab_size
from gpt2_jax.errors import UserError

# --- token files ---------------------------------------------------------------------------------------


def test_training_reads_token_files(tmp_path):
    for name, seed in (("train_0", 0), ("train_1", 1), ("val_0", 2)):
        write_llmc(tmp_path / f"{name}.bin", np.random.default_rng(seed).integers(0, 257, 5000))
    config = read_config("quickstart")
    data = DataConfig(train=str(tmp_path / "train*"), val=str(tmp_path / "val*"), tokenizer="bytes")
    config = dataclasses.replace(config, data=data)
    opened, resolved = open_data(config)
    assert resolved.model.vocab_size == 257
    assert (opened.train_tokens, opened.val.n_tokens) == (10000, 5000)
    assert opened.val_text is None
    write_llmc(tmp_path / "train_1.bin", np.random.default_rng(3).integers(0, 257, 5000))  # the same size
    assert open_data(config)[0].fingerprint != opened.fingerprint


def data_config(**data):
    return dataclasses.replace(read_config("quickstart"), data=DataConfig(**data))


def test_several_sources(tmp_path):
    for name, tokens in (("a", [1] * 2000), ("b", [2] * 700), ("val", [3] * 300)):
        write_llmc(tmp_path / f"{name}.bin", tokens)
    sources = (SourceConfig(str(tmp_path / "a.bin"), 3.0), SourceConfig(str(tmp_path / "b.bin")))
    config = data_config(sources=sources, val=str(tmp_path / "val.bin"), tokenizer="bytes")
    opened, _ = open_data(config)
    assert opened.train_tokens == 2700
    firsts = opened.train[np.arange(400)][:, 0]
    assert (np.sum(firsts == 1), np.sum(firsts == 2)) == (300, 100)
    heavier = dataclasses.replace(sources[1], weight=2.0)
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(sources[0], heavier)))
    assert open_data(changed)[0].fingerprint != opened.fingerprint


def test_character_files_of_nanogpt_bring_their_alphabet(tmp_path):
    """Files like those that data/shakespeare_char/prepare.py writes."""
    itos = dict(enumerate("\n abcd"))
    table = {"vocab_size": 6, "itos": itos, "stoi": {character: token for token, character in itos.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(table))
    for name in ("train", "val"):
        write_nanogpt(tmp_path / f"{name}.bin", np.arange(1000) % 6)
    config = data_config(train=str(tmp_path / "train.bin"), val=str(tmp_path / "val.bin"), tokenizer="chars")
    opened, resolved = open_data(config)
    assert (resolved.data.characters, resolved.model.vocab_size) == ("\n abcd", 6)
    assert opened.tokenizer.decode_bytes(opened.val.streams[0][:6].tolist()) == b"\n abcd"


def test_windows_can_start_with_documents(tmp_path):
    tokens = np.concatenate([[256, *range(n)] for n in (90, 100, 110, 95, 120, 100)])
    for name in ("train", "val"):
        write_llmc(tmp_path / f"{name}.bin", tokens)
    data = {"train": str(tmp_path / "train.bin"), "val": str(tmp_path / "val.bin"), "tokenizer": "bytes"}
    firsts = []
    for document_starts in (False, True):
        opened, _ = open_data(data_config(**data, document_starts=document_starts))
        firsts.append(opened.train[np.arange(4)][:, 0].tolist())
    assert np.sum(np.array(firsts) == 256, axis=1).tolist() == [1, 4]


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    for name in ("train_000000", "val_000000"):
        write_llmc(tmp_path / f"{name}.bin", [1] * 500)
    (tmp_path / "manifest.json").write_text(
        '{"settings": {"tokenizer": "gpt2"}, "text_bytes": 1, "skipped": 0, "shards": []}'
    )
    config = data_config(train=str(tmp_path / "train*"), val=str(tmp_path / "val*"), tokenizer="bytes")
    with pytest.raises(UserError, match=r"was made with the tokenizer 'gpt2', but data.tokenizer is 'bytes'"):
        open_data(config)
    (tmp_path / "manifest.json").rename(tmp_path / "progress.json")
    with pytest.raises(UserError, match="is not finished; rerun the command that prepares it"):
        open_data(config)
    (tmp_path / "progress.json").rename(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        open_data(config)


# --- text ----------------------------------------------------------------------------------------------


STRINGS = ["", "hello", "naïve 😀\n\t", "<|endoftext|>", "a\x00b", " " * 1000]


@pytest.mark.parametrize("text", STRINGS)
def test_the_byte_encoding_is_the_bytes(text):
    encoding = byte_encoding()
    assert isinstance(encoding, tiktoken.Encoding)
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    # The shortcut that training uses gives the same tokens.
    assert encode_document(encoding, text.encode()).tolist() == [256, *encoding.encode_ordinary(text)]


def test_bytes_need_not_be_utf8():
    assert encode_document(byte_encoding(), b"\xff\x00\xfe").tolist() == [256, 255, 0, 254]


def test_gpt2_documents_start_with_end_of_text_and_never_contain_it(gpt2_vocabulary):
    encoding = gpt2_encoding()
    assert encoding.n_vocab == vocab_size("gpt2")
    assert encode_document(encoding, b"hello world").tolist() == [50256, 31373, 995]
    for text in STRINGS:
        tokens = encode_document(encoding, text.encode()).tolist()
        assert tokens[0] == 50256
        assert 50256 not in tokens[1:]
        assert encoding.decode(tokens[1:]) == text


def test_characters_are_the_tokens_of_nanogpt(shared_data):
    data = DataConfig(text=str(shared_data / "tinyshakespeare.txt"), tokenizer="chars")
    corpus = tokenize(read_corpus(data), data)
    assert corpus.tokenizer.n_vocab == 65  # as nanoGPT's prepare.py prints
    assert (len(corpus.train), len(corpus.val)) == (1_003_854, 111_540)
    text = (shared_data / "tinyshakespeare.txt").read_bytes()
    assert corpus.tokenizer.decode_bytes(np.concatenate([corpus.train, corpus.val]).tolist()) == text
    assert corpus.val_text == text[1_003_854 + 1 :]


def test_a_character_outside_the_alphabet_is_an_error():
    with pytest.raises(UserError, match="has the character 'z', which is not among the 3"):
        CharTokenizer("abc").encode_ordinary("abz")


def test_a_single_file_is_split_near_its_end(tmp_path):
    path = tmp_path / "text"
    path.write_text("é" * 10)
    for tokenizer, cut in (("bytes", 15), ("gpt2", 14)):  # the bytes tokenizer may split a character
        corpus = read_corpus(DataConfig(text=str(path), tokenizer=tokenizer, val_fraction=0.25))
        assert (len(corpus.train[0].content), len(corpus.val[0].content)) == (cut, 20 - cut)


def test_empty_files_among_others_are_skipped(tmp_path):
    for name, content in (("a", "x" * 50), ("b", ""), ("c", "y" * 50), ("d", "z" * 50)):
        (tmp_path / name).write_text(content)
    corpus = read_corpus(DataConfig(text=str(tmp_path / "*"), tokenizer="bytes"))
    assert {document.name for document in corpus.train + corpus.val} == {"a", "c", "d"}


def test_files_stay_in_their_split_when_others_are_added():
    documents = [Document(f"{index}.py", b"x") for index in range(400)]
    few, many = split_by_name(documents[:200], 0.1), split_by_name(documents, 0.1)
    assert set(few.val) <= set(many.val)
    assert set(few.train) <= set(many.train)
    assert 20 < len(many.val) < 60  # 40 expected, standard deviation 6
    assert len(split_by_name(documents[:2], 1e-9).val) == 1
    assert len(split_by_name(documents[:2], 1 - 1e-9).train) == 1


def test_the_standard_library_is_a_corpus():
    corpus = read_corpus(DataConfig(text="stdlib", val_fraction=0.05))
    names = {document.name for document in corpus.train + corpus.val}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(name.startswith(("test/", "encodings/", "site-packages/", "_sysconfigdata")) for name in names)
    assert sum(len(document.content) for document in corpus.train) > 5_000_000
    assert 100_000 < sum(len(document.content) for document in corpus.val) < 1_500_000


@pytest.mark.parametrize(
    ("name", "content", "tokenizer", "message"),
    [
        ("missing", None, "bytes", "matches no file; type --data.text FILE_OR_GLOB"),
        ("tinyshakespeare.txt", None, "chars", "type curl -o tinyshakespeare.txt https://"),
        ("empty", b"", "bytes", "empty' is empty; give files with text"),
        ("latin1", b"caf\xe9 " * 100, "gpt2", "is not UTF-8 text"),
        ("latin1", b"caf\xe9 " * 100, "chars", "is not UTF-8 text"),
    ],
)
def test_unusable_texts_are_errors(name, content, tokenizer, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_corpus(DataConfig(text=str(path), tokenizer=tokenizer))


def test_a_vocabulary_smaller_than_the_tokenizers_is_an_error(tmp_path):
    (tmp_path / "text").write_text("hello " * 1000)
    config = read_config("quickstart")
    config = dataclasses.replace(
        config,
        data=DataConfig(text=str(tmp_path / "text"), tokenizer="bytes"),
        model=dataclasses.replace(config.model, vocab_size=100),
    )
    with pytest.raises(UserError, match=r"model.vocab_size = 100 is below the 257 tokens"):
        open_data(config)


def test_without_vocabulary_and_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})

    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.load.read_file", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        gpt2_encoding()
