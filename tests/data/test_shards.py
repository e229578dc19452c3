"""Token files: every format, written from its description, and the errors for damaged files."""

import re
import struct
import subprocess
import sys

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


def wide(tokens, dtype):
    return np.asarray(tokens, dtype).tobytes()


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        (wide(np.arange(100) % 7, "<u4"), "u4"),  # characters
        (wide(np.arange(5000) * 10 % 50257, "<u4"), "u4"),
        (wide(np.arange(5000) * 29 % 128_000, "<u4"), "u4"),  # Llama 3
        (wide(np.arange(5000) * 10 % 50257, "<i8"), "i8"),
    ],
)
def test_wide_tokens_without_header_are_refused_and_the_error_converts_them(content, dtype, tmp_path):
    path = tmp_path / "it's.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"has tokens of u?int\d\d, not uint16: .*; convert it: python -c") as error:
        open_tokens(path)
    command = re.search(r"python -c (.*) \(if", str(error.value))[0].removesuffix(" (if")
    subprocess.run(["/bin/sh", "-c", command.replace("python", sys.executable, 1)], check=True)
    assert open_tokens(path.with_suffix(".npy"))[:].tolist() == np.frombuffer(content, f"<{dtype}").tolist()


@pytest.mark.parametrize(
    "tokens",
    [[0] * 10_000, [50256] * 10_000, [7, 0] * 31, [7, 3] * 50, [*range(300), *[0, 1] * 50], [0, 50256] * 99, [5, 0]],
)
def test_odd_files_of_nanogpt_are_not_refused(tokens, tmp_path):
    write_nanogpt(tmp_path / "a.bin", tokens)
    assert open_tokens(tmp_path / "a.bin")[:].tolist() == tokens


def npy(header, tokens=range(100), version=1, length=None):
    header = header.encode("latin-1")
    size = (len(header) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + wide(list(tokens), "<u2")


HEADER = "{'descr': '<u2', 'fortran_order': False, 'shape': (100,), }"


def test_headers_of_every_version_of_npy_are_read(tmp_path):
    for version in (1, 2, 3):
        for header in (
            HEADER,
            HEADER.replace("'", '"') + "\n",
            "{'shape': (100,), 'fortran_order': True, 'descr': '<u2'}",
        ):
            (tmp_path / "a.npy").write_bytes(npy(header, version=version))
            assert open_tokens(tmp_path / "a.npy")[:].tolist() == list(range(100))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(HEADER.replace("<u2", ",u2")), "is not a NumPy file of tokens"),
        (npy(HEADER.replace("<u2", "<f1")), "is not a NumPy file of tokens"),
        (
            npy(HEADER.replace("(100,)", "(100,%s)" % ("9" * 30))),
            r"holds uint16 \[100, 9{30}\]; expected uint16 or uint32",
        ),
        (npy(HEADER.replace("(100,)", "(%s,)" % ("9" * 30))), "cut off or damaged: its header says 999"),
        (npy(HEADER.replace("(100,)", "(%s,)" % ("9" * 5000))), "is not a NumPy file of tokens"),
        (npy(HEADER.replace("(100,)", "(-100,)")), "is not a NumPy file of tokens"),
        (npy(HEADER.replace("(100,)", "()")), r"holds uint16 \[\]"),
        (npy(HEADER.replace("shape", "s" + "[" * 100 + "ape")), "is not a NumPy file of tokens"),
        (npy(HEADER.replace("False", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"))), None),
        (npy(HEADER, range(99)), "says 100 tokens, which take 269 bytes, but it has 267"),
        (npy(HEADER, range(200)), "cut off or damaged"),  # two arrays in one file
        (npy(HEADER, length=1000), "is not a NumPy file of tokens"),
        (npy(HEADER, version=2, length=1 << 31), "is not a NumPy file of tokens"),
        (b"PK\3\4" + npy(HEADER), "is not a NumPy file of tokens"),
    ],
)
def test_damaged_headers_of_npy_are_one_line_errors(content, message, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    if message is None:  # a field that does not count
        assert len(open_tokens(tmp_path / "a.npy")) == 100
        return
    with pytest.raises(UserError, match=message):
        open_tokens(tmp_path / "a.npy")


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
