"""Writes and reads token files without the package, from the code that defines the formats: llm.c's
`dev/data/data_common.py` and `llmc/dataloader.h`, nanoGPT's `data/*/prepare.py`, and build-nanogpt's `fineweb.py`."""

import struct
from pathlib import Path

import numpy as np

MAGIC = {"llmc": (20240520, 1), "llama": (20240801, 7)}


def write_llmc(path: Path, tokens, kind: str = "llmc") -> None:
    """A header of 256 int32, then uint16 (uint32 for Llama 3)."""
    header = struct.pack("<3i", *MAGIC[kind], len(tokens)) + bytes(1012)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{'H' if kind == 'llmc' else 'I'}", *map(int, tokens)))


def write_nanogpt(path: Path, tokens) -> None:
    """Only uint16."""
    path.write_bytes(struct.pack(f"<{len(tokens)}H", *map(int, tokens)))


def write_npy(path: Path, tokens) -> None:
    """NumPy's format."""
    np.save(path, np.asarray(tokens, dtype=np.uint16))


def read_llmc(path: Path) -> list[int]:
    """Checks the magic, the version, and that the size fits the count exactly, like llm.c."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header[:2] == MAGIC["llmc"], path
    assert set(header[3:]) == {0}, path
    assert len(content) == 1024 + 2 * header[2], path
    return list(struct.unpack(f"<{header[2]}H", content[1024:]))
