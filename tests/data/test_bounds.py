"""Texts that ask for more memory than they are worth, byte order marks, and more spaces than tiktoken takes."""

import dataclasses
import functools
import gzip
import json
import re
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import tiktoken
import zstandard
from token_files import read_llmc

from gpt2_jax import generate
from gpt2_jax.config import DataConfig
from gpt2_jax.config.toml import read_config
from gpt2_jax.data import open_data, sources
from gpt2_jax.data.corpus import read_corpus, tokenize
from gpt2_jax.data.encode import encode_prompt
from gpt2_jax.data.sources import FileSource
from gpt2_jax.data.tokenizer import LONGEST_SPACE, Boundaries, ExtendedTokenizer, byte_encoding, get_tokenizer
from gpt2_jax.data.workers import BlockTokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.generation import LanguageModel
from gpt2_jax.prepare import main


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Tokenizes in this process, where the memory is measured."""

    def tokenize_blocks(blocks, options, workers):
        function = BlockTokenizer(options, get_tokenizer(options.tokenizer))
        return ((block, function(block)) for block in blocks)

    monkeypatch.setattr("gpt2_jax.data.preparation.tokenize_blocks", tokenize_blocks)


@pytest.fixture
def without_gigatoken(monkeypatch):
    monkeypatch.setattr("gpt2_jax.data.encode.importlib.util.find_spec", lambda name: None)


def prepare(path, out, *args):
    assert main([str(path), "--out", str(out), "--workers", "1", *args]) == 0
    return [token for shard in sorted(out.glob("*.bin")) for token in read_llmc(shard)]


def compressed(kind, pieces):
    """The pieces as one compressed stream."""
    if kind == "gz":
        return b"".join(map(functools.cache(gzip.compress), pieces))
    compressor = zstandard.ZstdCompressor().compressobj()
    return b"".join(map(compressor.compress, pieces)) + compressor.flush()


# --- memory --------------------------------------------------------------------------------------------


@pytest.fixture
def peak():
    """A function that returns the most memory, in bytes, that this test had at a time."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["zst", "gz"])
@pytest.mark.parametrize("text", [bytes(1 << 22), b"word " * (1 << 20)])
def test_a_little_of_a_large_compressed_file_takes_little_memory(kind, text, tmp_path, peak):
    path = tmp_path / f"a.txt.{kind}"
    path.write_bytes(compressed(kind, [text] * 60))  # 250 MB and more, of which 1 MB or less remain
    assert path.stat().st_size < 2_000_000
    tokens = prepare(path, tmp_path / "out", "--tokenizer", "bytes", "--limit", "1000", "--val-fraction", "0")
    assert tokens == [256, *text[:999]]
    assert peak() < 100_000_000  # 32 MB of 1 KB of Zstandard, and a few blocks of 1 MB


@pytest.mark.parametrize("kind", ["zst", "gz"])
def test_a_line_may_not_be_longer_than_the_limit(kind, tmp_path, peak, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 23)
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two", "three")]
    path = tmp_path / f"a.jsonl.{kind}"
    long = [b'{"text": "', *[b"a" * (1 << 22)] * 20, b'"}\n']
    path.write_bytes(compressed(kind, [rows[0], rows[1], *long, rows[2], *long[:-1], b'"}']))
    args = ["--tokenizer", "bytes", "--val-fraction", "0"]
    with pytest.raises(
        UserError, match=r"line 3 has more than 8,388,608 bytes; divide it, leave it out, or type --on-er"
    ):
        prepare(path, tmp_path / "out", *args)
    tokens = prepare(path, tmp_path / "out", *args, "--on-error", "skip")
    assert bytes(token for token in tokens if token < 256) == b"onetwothree"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"] == 2
    assert peak() < 100_000_000


def test_a_skipped_line_does_not_move_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 300)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    sizes = [10, 50, 900, 299, 5, 301, 302, 1, 100, 400]
    lines = [(b"%d" % number).ljust(size, b"x") + b"\n" for number, size in enumerate(sizes)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines)[:-1])
    source = FileSource([str(tmp_path / "a.jsonl")], "text", 0, "bytes", True)
    blocks = list(source.blocks(None))
    assert b"".join(block.content.read() for block in blocks) == b"".join(line for line in lines if len(line) <= 300)
    assert sum(block.skipped for block in blocks) == sum(len(line) > 300 for line in lines)
    for number, block in enumerate(blocks):  # the number of the first line, and the cursor of the rest
        if content := block.content.read():
            assert content.startswith(b"%d" % (block.first - 1))
        rest = list(source.blocks(block.cursor))
        assert [other.content.read() for other in rest] == [other.content.read() for other in blocks[number + 1 :]]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.binary()])
def test_a_row_may_not_be_longer_than_the_limit(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 300)
    sizes = [10, 300, 301, 0, 5, 299, 900, 1]
    texts = [None if size == 5 else (b"%d" % number).ljust(size, b"x")[:size] for number, size in enumerate(sizes)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.binary()).cast(kind)}), path)
    with pytest.raises(UserError, match=r"a.parquet, row 3 has more than 300 bytes; divide it, leave it out, or type"):
        list(FileSource([str(path)], "text", 0, "bytes", False).blocks(None))
    kept = [b"" if text and len(text) > 300 else text for text in texts]
    for block_bytes in (1 << 20, 100):  # many rows in a block, and one
        monkeypatch.setattr(sources, "BLOCK_BYTES", block_bytes)
        blocks = list(FileSource([str(path)], "text", 0, "bytes", True).blocks(None))
        assert len(blocks) == (1 if block_bytes > 100 else len(sizes))
        assert [text for block in blocks for text in block.content] == kept
        assert sum(block.skipped for block in blocks) == 2


def test_rows_that_are_certainly_too_long_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 300)
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": ["x" * 900] * 3, "text": ["ab", "x" * 1200, "cd"]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(UserError, match=r"a.parquet, one of the rows 1 to 2 has more than 300 bytes; divide it"):
        list(FileSource([str(path)], "text", 0, "bytes", False).blocks(None))


def test_text_without_a_place_to_cut_it_is_refused_beyond_the_limit(tmp_path, peak, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 23)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compressed("zst", [b"fine ", *[bytes(1 << 22)] * 200]))
    with pytest.raises(UserError, match=r"a.txt.zst has more than 8,388,608 bytes without white space to cut it at;"):
        list(FileSource([str(path)], "text", 0, "gpt2", False).blocks(None))
    (block,) = FileSource([str(path)], "text", 0, "gpt2", True).blocks(None)
    assert (block.content, block.skipped) == (b"", 1)
    assert peak() < 100_000_000


# --- spaces --------------------------------------------------------------------------------------------


SPACES = "has more than 999,998 spaces in a row, which tiktoken cannot split"


@pytest.mark.parametrize("before", ["", "x" * 70_000, " x" * 500_000])
def test_too_many_spaces_are_one_line_in_every_command(before, gpt2_vocabulary, without_gigatoken, tmp_path):
    text = before + " " * 1_000_000 + "x\n" * 200_000  # the last tenth is held out
    (tmp_path / "a.txt").write_text(text)
    data = DataConfig(text=str(tmp_path / "a.txt"), val_fraction=0.1)
    with pytest.raises(UserError, match=rf"a.txt {SPACES}; correct it, or type --data.tokenizer bytes"):
        tokenize(read_corpus(data), data)
    with pytest.raises(UserError, match=rf"a.txt {SPACES}; correct it, leave it out, or type --on-error skip"):
        prepare(tmp_path / "a.txt", tmp_path / "out")
    with pytest.raises(UserError, match=f"the prompt {SPACES}; remove some of them"):
        LanguageModel(None, {}, lambda: get_tokenizer("gpt2")).stream([text])
    extended = ExtendedTokenizer(get_tokenizer("gpt2"), {"<|im_end|>": 50257}, None, Boundaries())
    with pytest.raises(UserError, match=f"the prompt {SPACES}; remove some of them"):
        encode_prompt(extended, text)


def test_a_document_with_too_many_spaces_is_skipped(gpt2_vocabulary, without_gigatoken, tmp_path):
    (tmp_path / "b.txt").write_text(" " * 1_000_000 + "x")
    (tmp_path / "c.txt").write_text("four")
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "\n" * 1_000_000 + "x"}))
    args = ["--val-fraction", "0", "--on-error", "skip"]
    tokens = prepare(tmp_path / "?.*", tmp_path / "out", *args)
    assert tokens == [50256, 14337]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"] == 2


def test_as_many_spaces_as_tiktoken_takes_are_no_error(gpt2_vocabulary, without_gigatoken, tmp_path):
    text = "x" + " " * LONGEST_SPACE + "x\n" + " " * 2_000_000  # at the end there may be more
    (tmp_path / "a.txt").write_text(text)
    tokens = prepare(tmp_path / "a.txt", tmp_path / "out", "--val-fraction", "0")
    encoding = tiktoken.get_encoding("gpt2")
    assert tokens[1:] == encoding.encode_to_numpy(text).tolist()
    assert encode_prompt(encoding, text) == tokens[1:]


def test_prompts_have_the_tokens_of_tiktoken(gpt2_vocabulary):
    encoding = tiktoken.get_encoding("gpt2")
    for text in ("", "hello <|endoftext|>", "naïve 😀\n\t", "a \ud83d b \ud83d\ude00 c"):
        assert encode_prompt(encoding, text) == encoding.encode_ordinary(text)
    assert encode_prompt(byte_encoding(), "é") == [0xC3, 0xA9]


@pytest.mark.parametrize("block", [10, 64, 1000])
def test_rows_of_spaces_are_counted_over_blocks(block, tmp_path, monkeypatch):
    """Compared with a search of the whole text. A row longer than half of a block is never missed."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    rng = np.random.default_rng(block)
    for trial in range(40):
        pieces = [" " * int(n) + "x" * int(m) for n, m in rng.integers(0, block, (12, 2))]
        text = "".join(pieces) + " " * int(rng.integers(0, block))
        longest = max(len(row) for row in text.rstrip().split("x"))
        (tmp_path / "a.txt").write_text(text)
        for limit in (longest - 1, longest):
            if limit < block / 2:
                continue
            monkeypatch.setattr(sources, "LONGEST_SPACE", limit)
            monkeypatch.setattr(sources, "uses_gigatoken", lambda tokenizer: False)
            found = sources._flaw(tmp_path / "a.txt", "gpt2")
            assert bool(found) == (longest > limit), (trial, longest, limit)


# --- byte order marks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_a_byte_order_mark_is_no_text(tokenizer, tmp_path):
    text = "".join(f"{number} is a number\n" for number in range(300))
    for name, encoding in (("a.txt", "utf-8"), ("b.txt", "utf-8-sig")):
        (tmp_path / name).write_text(text, encoding=encoding)
    plain, marked = (
        tokenize(read_corpus(data), data)
        for data in (DataConfig(text=str(tmp_path / name), tokenizer=tokenizer) for name in ("a.txt", "b.txt"))
    )
    assert plain.train.tolist() == marked.train.tolist()
    assert plain.val.tolist() == marked.val.tolist()
    assert plain.val_text == marked.val_text
    assert marked.tokenizer.n_vocab == plain.tokenizer.n_vocab


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_prepare_leaves_out_a_byte_order_mark(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    text = "".join(f"{number} naïve numbers\n" for number in range(300))
    expected = prepare_text(tmp_path / "a", "a.txt", text.encode())
    content = text.encode("utf-8-sig")
    path = tmp_path / "b"
    content = compressed(suffix[1:], [content]) if suffix else content
    assert prepare_text(path, "b.txt" + suffix, content) == expected
    rows = [json.dumps({"text": "one"}), json.dumps({"text": "two"})]
    tokens = prepare_text(tmp_path / "c", "c.jsonl", "\n".join(rows).encode("utf-8-sig"))
    assert bytes(token for token in tokens if token < 256) == b"onetwo"


def prepare_text(folder, name, content):
    folder.mkdir()
    (folder / name).write_bytes(content)
    return prepare(folder / name, folder / "out", "--tokenizer", "bytes")


def test_a_prompt_file_may_have_a_byte_order_mark(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("naïve ", encoding="utf-8-sig")
    prompts = []
    model = SimpleNamespace(stream=lambda texts, *_: iter(prompts.extend(texts) or []))
    tokenizer = SimpleNamespace(encode_ordinary=list)
    stored = SimpleNamespace(open_tokenizer=lambda: tokenizer, load=lambda *_, **__: model)
    monkeypatch.setattr(generate, "use_model", lambda name, use: use(stored))
    monkeypatch.setattr(generate.runtime, "enable_compilation_cache", lambda directory: None)
    assert generate.main(["--model", "x", "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
    assert prompts == ["naïve "]


def test_only_a_byte_order_mark_is_an_empty_text(tmp_path):
    (tmp_path / "a.txt").write_text("", encoding="utf-8-sig")
    with pytest.raises(UserError, match="is empty; give files with text in them"):
        read_corpus(DataConfig(text=str(tmp_path / "a.txt"), tokenizer="bytes"))
    with pytest.raises(UserError, match="no document has any text"):
        prepare(tmp_path / "a.txt", tmp_path / "out", "--tokenizer", "bytes")


# --- hardly any text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 40, 100])
def test_the_advice_for_too_short_texts_helps(tokenizer, size, tmp_path):
    """Following it leads to a run or, where no window is short enough, to the advice to give more text."""
    (tmp_path / "a.txt").write_text("abcdefghij"[:size] * (size // 10 or 1))
    config = read_config("quickstart")
    config = dataclasses.replace(config, data=DataConfig(text=str(tmp_path / "a.txt"), tokenizer=tokenizer))
    sizes = [config.model.block_size]
    while True:
        model = dataclasses.replace(config.model, block_size=sizes[-1])
        try:
            open_data(dataclasses.replace(config, model=model))
            return
        except UserError as error:
            message = str(error)
        advice = re.search(r"give more text, or type --model.block_size (\d+)$", message)
        if advice is None:
            assert message.endswith("; give more text")
            assert size <= 30
            return
        sizes.append(int(advice[1]))
        assert 0 < sizes[-1] < sizes[-2]
