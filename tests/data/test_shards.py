"""Token files: every format, written from its description, and the errors for damaged files."""

import struct

import numpy as np
import pytest
from token_files import write_llmc, write_nanogpt, write_npy

from gpt2_jax.data.shards import find_token_files, header_bytes, open_tokens
from gpt2_jax.errors import UserError

TOKENS = [50256, 1, 2, 256, 65535, 0, 13]


def write_llama(path, tokens):
    write_llmc(path, tokens, "llama")


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_llmc, "a.bin"), (write_nanogpt, "a.bin"), (write_npy, "a.npy"), (write_llama, "a.bin")],
)
def test_every_format_is_read(tmp_path, write, name):
    write(tmp_path / name, TOKENS)
    tokens = open_tokens(tmp_path / name)
    assert len(tokens) == len(TOKENS)
    assert tokens[:].tolist() == TOKENS
    assert tokens[2:5].tolist() == TOKENS[2:5]
    assert tokens[-2:].tolist() == TOKENS[-2:]
    assert tokens[5:100].tolist() == TOKENS[5:]
    assert tokens[3:3].tolist() == []
    out = np.zeros((4, 3), tokens.dtype)
    tokens.read(np.array([4, 0, 3]), out, np.array([3, 1, 0]))
    assert out.tolist() == [TOKENS[3:6], TOKENS[:3], [0, 0, 0], TOKENS[4:7]]


def test_llama_tokens_have_32_bits(tmp_path):
    write_llama(tmp_path / "a.bin", [128_000, 5])
    assert open_tokens(tmp_path / "a.bin")[:].tolist() == [128_000, 5]


def test_our_header_equals_llm_c():
    assert struct.unpack("<256i", header_bytes(7)) == (20240520, 1, 7, *[0] * 253)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "is not a token file: it is empty"),
        ("a.bin", b"once upon a time" * 100, "is not a token file: it is text; .* python -m gpt2_jax.prepare"),
        # The first 64 KB of this text end inside a character.
        ("a.bin", ("日本語" * 40_000).encode(), "is not a token file: it is text"),
        ("a.bin", bytes(1001), "is not a token file: it is a file of 1,001 bytes"),
        ("a.dat", bytes(1000), "is not a token file: it is a file of 1,000 bytes"),
        ("a.bin", struct.pack("<3i", 20240520, 1, 5) + bytes(1020), "cut off or damaged: its header says 5 tokens"),
        ("a.bin", struct.pack("<3i", 20240520, 7, 4) + bytes(1020), "has version 7 .* expected 1"),
        ("a.bin", struct.pack("<3i", 20240801, 1, 4) + bytes(1020), "has version 1 .* expected 7"),
        ("a.bin", struct.pack("<3i", 20240520, 1, 5), "is not a token file: it has only 12 bytes"),
        ("a.npy", b"\x93NUMPY", "is not a NumPy file of tokens, or is cut off"),
    ],
)
def test_damaged_files_are_errors(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_tokens(tmp_path / name)


def test_arrays_of_other_types_are_errors(tmp_path):
    for array, message in ((np.zeros(4), r"holds float64 \[4\]"), (np.zeros((2, 2), np.uint16), r"uint16 \[2, 2\]")):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(UserError, match=message):
            open_tokens(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="is not a NumPy file of tokens"):
        open_tokens(tmp_path / "a.npy")
    with pytest.raises(UserError, match="cannot be read"):
        open_tokens(tmp_path / "missing.bin")
    with pytest.raises(UserError, match="cannot be read"):
        open_tokens(tmp_path)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path):
    write_llmc(path := tmp_path / "a.bin", TOKENS)
    tokens = open_tokens(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="has become shorter"):
        tokens[3:]


def test_a_glob_without_files_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"data.train = .*matches no file"):
        find_token_files(str(tmp_path / "*.bin"), "data.train")
    with pytest.raises(UserError, match=r"data.train = .*matches the directory"):
        find_token_files(str(tmp_path), "data.train")


def test_more_files_than_a_process_may_open_by_default(tmp_path):
    import resource

    from gpt2_jax.data.shards import open_token_files

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    paths = [tmp_path / f"{number}.bin" for number in range(300)]
    for path in paths:
        write_llmc(path, TOKENS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        files = open_token_files(paths)
        assert all(file[:1].tolist() == TOKENS[:1] for file in files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1024), hard))
