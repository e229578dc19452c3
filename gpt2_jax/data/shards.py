"""Token files in llm.c's format, which llm.c and modded-nanogpt read too, little-endian:

256 int32: magic 20240520, version 1, number of tokens, zeros    (1,024 bytes)
number of tokens × uint16
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

import numpy as np

from gpt2_jax.config import UserError

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4


def read_header(path: str | Path, magic: int, kind: str) -> tuple[np.ndarray, int]:
    """The header that all files of llm.c start with: int32 [256], and the size of the file in bytes.

    Args:
        magic: what it has to start with.
        kind: what the file should be, for errors.

    Raises:
        UserError: it cannot be read, or starts with something else.
    """
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if header.size < HEADER_INTS or header[0] != magic:
        found = f"it starts with {header[0]}" if header.size == HEADER_INTS else f"it has only {size} bytes"
        raise UserError(f"{path} is not {kind}: {found}; expected llm.c's header with the magic {magic}")
    return header, size


def read_shard(path: str | Path) -> np.ndarray:
    """The tokens of a file: uint16 [tokens], memory-mapped.

    Raises:
        UserError: not such a file, or header and size disagree.
    """
    header, size = read_header(path, MAGIC, "a token file")
    if header[1] != VERSION:
        raise UserError(f"{path} has version {header[1]} of the token file format; expected {VERSION}")
    count = int(header[2])
    if size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path} is cut off or damaged: its header says {count:,} tokens, which take {HEADER_BYTES + 2 * count:,} "
            f"bytes, and it has {size:,}; copy or prepare it again"
        )
    mapped = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    return mapped.view(np.ndarray)  # gathering rows of a plain array is several times as fast


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes uint16 [tokens] under a temporary name and renames, so that no half file is ever seen."""
    path = Path(path)
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        header.tofile(file)
        tokens.astype("<u2").tofile(file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def find_shards(pattern: str, key: str) -> list[Path]:
    """The files of a glob, in order of their names; `key` is the config key for the error.

    Raises:
        UserError: no file matches.
    """
    paths = sorted(Path(path) for path in glob.glob(os.path.expanduser(pattern), recursive=True))
    if not paths:
        raise UserError(
            f"{key} = {pattern!r} matches no file; give a glob of token files in llm.c's format (FineWeb is there "
            "in it as the Hugging Face dataset kjj0/fineweb10B-gpt2)"
        )
    return paths
