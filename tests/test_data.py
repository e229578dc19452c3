"""Order, batches, tokenizers, token files and text: against definitions, tiktoken and the formats themselves."""

import dataclasses
import struct

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.config import DataConfig, UserError, read_config
from gpt2_jax.data import open_data
from gpt2_jax.data.corpus import Document, read_corpus, split_by_name, tokenize
from gpt2_jax.data.pipeline import BatchSchedule, TrainBatches, Windows, eval_batches, permute, read_ahead
from gpt2_jax.data.shards import find_shards, read_shard, write_shard
from gpt2_jax.data.tokenizer import CharTokenizer, byte_encoding, encode_document, gpt2_encoding, vocab_size
from gpt2_jax.loss import IGNORE


def windows_of(n_tokens, block_size=4, vocab_size=1000):
    return Windows([np.arange(n_tokens, dtype=np.uint16)], ["stream"], block_size, vocab_size)


# --- order ---------------------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


def test_permute_is_pinned():
    """A data order outlives versions of this code, or runs cannot be continued: these values never change."""
    assert permute(np.arange(10), 10, seed=1337, epoch=0).tolist() == PINNED[0]
    assert permute(np.arange(10), 10, seed=1337, epoch=1).tolist() == PINNED[1]
    assert permute(np.array([0, 1, 10**9]), 10**10, seed=0, epoch=3).tolist() == PINNED[2]


PINNED = [
    [9, 8, 2, 7, 0, 5, 6, 3, 4, 1],
    [6, 9, 1, 2, 4, 0, 3, 7, 8, 5],
    [8248707602, 2631908652, 4193408967],
]


def test_permute_looks_random():
    size = 4096
    orders = [permute(np.arange(size), size, seed, epoch) for seed in range(4) for epoch in range(4)]
    for index, order in enumerate(orders):
        # Of a random permutation: rank correlation with the identity, and with any other, of deviation 1 / sqrt(n).
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
        for other in orders[:index]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(size)
            assert np.sum(order == other) < 12  # fixed points are Poisson(1): 12 has probability 1e-9
        # Neighbours end up far apart: mean distance n / 3, deviation of the mean 0.24 n / sqrt(n), five of them.
        assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 5 * 0.24 / np.sqrt(size)


# --- batches -------------------------------------------------------------------------------------------


@given(
    n_tokens=st.integers(6, 200),
    block_size=st.integers(1, 5),
    batch=st.sampled_from([4, 8]),
    processes=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_every_window_once_per_epoch_for_any_number_of_processes(n_tokens, block_size, batch, processes, seed):
    windows = windows_of(n_tokens, block_size)
    schedule = BatchSchedule(batch, (), block_size)
    n_windows = len(windows)
    assert n_windows == (n_tokens - 1) // block_size
    updates = -(-2 * n_windows // batch)
    whole = [TrainBatches(windows, schedule, {batch: 1}, seed)[k][0] for k in range(updates)]
    for k in range(updates):
        slices = [TrainBatches(windows, schedule, {batch: 1}, seed, (p, processes))[k][0] for p in range(processes)]
        np.testing.assert_array_equal(np.concatenate(slices), whole[k])
    rows = np.concatenate(whole)[: 2 * n_windows]
    np.testing.assert_array_equal(rows[:, 1:], rows[:, :1] + np.arange(1, block_size + 1))  # whole windows
    for epoch in (rows[:n_windows], rows[n_windows:]):
        assert sorted(epoch[:, 0]) == [block_size * window for window in range(n_windows)]


def test_a_batch_is_a_function_of_seed_and_number():
    windows, schedule = windows_of(500), BatchSchedule(8, (), 4)
    source = TrainBatches(windows, schedule, {8: 2}, seed=3)
    assert source[5].shape == (2, 4, 5)
    assert source[5].dtype == np.int32
    expected = [source[k] for k in range(10)]
    for start in (0, 7):
        batches = read_ahead(source, start, 10)
        for k in range(start, 10):
            np.testing.assert_array_equal(next(batches), expected[k])
        with pytest.raises(StopIteration):
            next(batches)
        batches.close()
    assert not np.array_equal(source[0], TrainBatches(windows, schedule, {8: 2}, seed=4)[0])


def test_a_stream_without_a_whole_window_is_passed_over():
    streams = [np.arange(3, dtype=np.uint16), np.arange(100, 109, dtype=np.uint16)]
    windows = Windows(streams, ["short", "long"], 4, 1000)
    assert windows[np.arange(len(windows))][:, 0].tolist() == [100, 104]


def test_windows_do_not_cross_streams():
    streams = [np.arange(start, start + size, dtype=np.uint16) for start, size in ((0, 9), (100, 5), (200, 14))]
    windows = Windows(streams, ["a", "b", "c"], 4, 1000)
    assert windows[np.arange(len(windows))][:, 0].tolist() == [0, 4, 100, 200, 204, 208]
    assert windows[np.array([3, 0])].tolist() == [[200, 201, 202, 203, 204], [0, 1, 2, 3, 4]]


@given(ramp_tokens=st.lists(st.integers(1, 400), max_size=3), steps=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_batch_schedule_equals_a_simulation(ramp_tokens, steps):
    block_size, sizes = 4, [2, 4, 8, 16]
    marks = np.cumsum(ramp_tokens).tolist()
    ramp = tuple(zip(marks, sizes, strict=False))
    schedule = BatchSchedule(16, ramp, block_size)
    consumed = 0
    for update in range(steps):
        size = next((size for tokens, size in ramp if consumed * block_size < tokens), 16)
        assert schedule.at(update) == (consumed, size)
        consumed += size


def test_a_growing_batch_repeats_and_loses_nothing():
    windows = windows_of(4 * 100 + 1)
    schedule = BatchSchedule(16, ((40, 2), (120, 4)), 4)
    source = TrainBatches(windows, schedule, {2: 1, 4: 2, 16: 4}, seed=0)
    shapes = [source[k].shape for k in range(15)]
    assert shapes[:6] == [(1, 2, 5)] * 5 + [(2, 2, 5)]
    assert shapes[-1] == (4, 4, 5)
    rows = np.concatenate([source[k].reshape(-1, 5) for k in range(15)])[:100]
    assert sorted(rows[:, 0]) == list(range(0, 400, 4))


def test_evaluation_covers_every_token_but_the_first_once():
    streams = [np.arange(23, dtype=np.uint16), np.arange(100, 109, dtype=np.uint16)]
    windows = Windows(streams, ["a", "b"], 4, 1000)
    for processes in (1, 2):
        parts = [list(eval_batches(windows, 6, process=(p, processes))) for p in range(processes)]
        batches = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
        assert all(batch.shape == (6, 5) for batch in batches)
        targets = np.concatenate(batches)[:, 1:].flatten()
        assert sorted(targets[targets != IGNORE]) == [*range(1, 23), *range(101, 109)]
    limited = np.concatenate(list(eval_batches(windows, 2, limit=10)))[:, 1:]
    assert np.sum(limited != IGNORE) == 12  # ten, rounded up to a window


# --- what is wrong with data ---------------------------------------------------------------------------


def test_too_short_a_text_says_so():
    with pytest.raises(UserError, match=r"stream: 4 tokens are too few for one window of .* 5; .*--model.block_size 1"):
        windows_of(4)


def test_a_token_beyond_the_vocabulary_is_found_at_once_or_when_it_is_read():
    with pytest.raises(UserError, match=r"stream has the token 99, beyond model.vocab_size = 50"):
        windows_of(100, vocab_size=50)
    stream = np.zeros(1 << 17, dtype=np.uint16)
    stream[-20] = 60
    windows = Windows([stream], ["late"], 8, 50)
    batches = read_ahead(TrainBatches(windows, BatchSchedule(64, (), 8), {64: 1}, 0), 0, 1 + len(windows) // 64)
    with pytest.raises(UserError, match="late has the token 60"):  # through Grain's thread
        for _ in batches:
            pass
    batches.close()
    with pytest.raises(UserError, match="late has the token 60"):
        list(eval_batches(windows, 64))


# --- token files ---------------------------------------------------------------------------------------


def test_shards_are_what_llm_c_describes(tmp_path):
    path = tmp_path / "shard.bin"
    write_shard(path, np.array([50256, 1, 2, 65535], dtype=np.uint16))
    content = path.read_bytes()
    assert struct.unpack("<3i", content[:12]) == (20240520, 1, 4)
    assert content[12:1024] == bytes(1012)
    assert struct.unpack("<4H", content[1024:]) == (50256, 1, 2, 65535)
    assert read_shard(path).tolist() == [50256, 1, 2, 65535]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a token file: it has only 0 bytes"),
        (b"once upon a time" * 100, "is not a token file: it starts with"),
        (struct.pack("<3i", 20240520, 1, 5) + bytes(1012 + 8), "is cut off or damaged: its header says 5 tokens"),
        (struct.pack("<3i", 20240520, 7, 4) + bytes(1012 + 8), "has version 7 .* expected 1"),
    ],
)
def test_damaged_shards_say_so(content, message, tmp_path):
    path = tmp_path / "shard.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_shard(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_shard(tmp_path)


def test_a_glob_without_files_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"data.train = .*matches no file"):
        find_shards(str(tmp_path / "*.bin"), "data.train")


def test_training_reads_token_files(tmp_path):
    for name, seed in (("train_0", 0), ("train_1", 1), ("val_0", 2)):
        write_shard(tmp_path / f"{name}.bin", np.random.default_rng(seed).integers(0, 257, 5000).astype(np.uint16))
    config = read_config("quickstart")
    data = DataConfig(train=str(tmp_path / "train*"), val=str(tmp_path / "val*"), tokenizer="bytes")
    config = dataclasses.replace(config, data=data)
    opened, resolved = open_data(config)
    assert resolved.model.vocab_size == 257
    assert (opened.train.n_tokens, opened.val.n_tokens) == (10000, 5000)
    assert opened.val_text is None
    other = np.random.default_rng(3).integers(0, 257, 5000).astype(np.uint16)
    write_shard(tmp_path / "train_1.bin", other)  # of the same size
    assert open_data(config)[0].fingerprint != opened.fingerprint


# --- text ----------------------------------------------------------------------------------------------


STRINGS = ["", "hello", "naïve 😀\n\t", "<|endoftext|>", "a\x00b", " " * 1000]


@pytest.mark.parametrize("text", STRINGS)
def test_the_byte_encoding_is_the_bytes(text):
    encoding = byte_encoding()
    assert isinstance(encoding, tiktoken.Encoding)
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    # The short cut that training takes gives what the encoding gives.
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


def test_characters(shared_data):
    data = DataConfig(text=str(shared_data / "tinyshakespeare.txt"), tokenizer="chars")
    corpus = tokenize(read_corpus(data), data)
    assert corpus.tokenizer.n_vocab == 65  # as nanoGPT's prepare.py prints
    assert (len(corpus.train), len(corpus.val)) == (1_003_854, 111_540)
    text = (shared_data / "tinyshakespeare.txt").read_bytes()
    assert corpus.tokenizer.decode_bytes(np.concatenate([corpus.train, corpus.val]).tolist()) == text
    assert corpus.val_text == text[1_003_854 + 1 :]


def test_an_alphabet_that_lacks_a_character_says_which():
    with pytest.raises(UserError, match="has the character 'z', which is not among the 3"):
        CharTokenizer("abc").encode_ordinary("abz")


def test_a_single_file_is_split_at_its_end(tmp_path):
    path = tmp_path / "text"
    path.write_text("é" * 10)
    for tokenizer, cut in (("bytes", 15), ("gpt2", 14)):  # bytes may split a character, text does not
        corpus = read_corpus(DataConfig(text=str(path), tokenizer=tokenizer, val_fraction=0.25))
        assert (len(corpus.train[0].content), len(corpus.val[0].content)) == (cut, 20 - cut)


def test_empty_files_among_others_are_passed_over(tmp_path):
    for name, content in (("a", "x" * 50), ("b", ""), ("c", "y" * 50), ("d", "z" * 50)):
        (tmp_path / name).write_text(content)
    corpus = read_corpus(DataConfig(text=str(tmp_path / "*"), tokenizer="bytes"))
    assert {document.name for document in corpus.train + corpus.val} == {"a", "c", "d"}


def test_files_keep_their_side_when_others_come():
    documents = [Document(f"{index}.py", b"x") for index in range(400)]
    few, many = split_by_name(documents[:200], 0.1), split_by_name(documents, 0.1)
    assert set(few.val) <= set(many.val)
    assert set(few.train) <= set(many.train)
    assert 20 < len(many.val) < 60  # 40 expected, deviation 6
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
def test_texts_that_cannot_serve_say_why(name, content, tokenizer, message, tmp_path):
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


def test_no_vocabulary_and_no_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})

    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.load.read_file", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        gpt2_encoding()
