"""llm.c's `model_*.bin`: files as its description has them, read and written."""

import struct

import pytest
from model_files import CONFIG, assert_loads, llmc_bytes, rounded

from gpt2_jax import load
from gpt2_jax.convert import convert
from gpt2_jax.errors import UserError


@pytest.mark.parametrize("version", [3, 5])
def test_a_file_of_llmc_loads(theirs, tmp_path, version):
    path = tmp_path / "model_00000012.bin"
    path.write_bytes(llmc_bytes(theirs, CONFIG, version))
    assert_loads(path, theirs if version == 3 else rounded(theirs))


@pytest.mark.parametrize("version", [3, 5])
def test_converting_to_the_same_format_writes_the_same_bytes(theirs, tmp_path, version):
    path = tmp_path / "model_00000000.bin"
    path.write_bytes(llmc_bytes(theirs, CONFIG, version))
    convert(str(path), "llmc", tmp_path / "out", {3: "float32", 5: "bfloat16"}[version])
    assert (tmp_path / "out" / "model_00000000.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"\x00" * 4 + data[4:], "is not a model of llm.c: it starts with 0; expected .* 20240326"),
        (lambda data: data[:100], "it has only 100 bytes"),
        (lambda data: data[:4] + struct.pack("<i", 1) + data[8:], r"has version 1 of llm.c's format; expected 3"),
        (lambda data: data[:-2], "is cut off or damaged: its header implies"),
        (lambda data: data + b"\x00", "is cut off or damaged"),
        (lambda data: data[:28] + struct.pack("<i", 3) + data[32:], "impossible header: 300 tokens padded to 3"),
        (
            lambda data: data[:20] + struct.pack("<i", 5) + data[24:],
            "has n_embd = 32, which is not a multiple of n_head = 5",
        ),
    ],
)
def test_a_damaged_file_is_one_clear_line(theirs, tmp_path, change, message):
    path = tmp_path / "model_00000000.bin"
    path.write_bytes(change(llmc_bytes(theirs, CONFIG, 3)))
    with pytest.raises(UserError, match=message) as error:
        load(str(path))
    assert "\n" not in str(error.value)
