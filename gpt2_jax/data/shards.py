"""Token files: reads every format below; `prepare` writes llm.c's. All integers are little-endian.

    llm.c, modded-nanogpt  .bin  256 int32: magic 20240520, version 1, number of tokens, zeros; then uint16
    llm.c for Llama 3      .bin  the same with magic 20240801, version 7; then uint32
    nanoGPT                .bin  uint16
    build-nanogpt          .npy  NumPy's format, uint16 or uint32

A file without header is taken as uint16 only if it can be: `_wide_type` says which it cannot be.

Files may be larger than memory, and training reads small windows all over them. They are read, not memory-mapped: a
page fault per window costs more than a read, mapped pages count as memory of the process, and a failing disk would
kill the process instead of raising an error.
"""

from __future__ import annotations

import abc
import errno
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.files import check_regular, find_paths

MAGIC = 20240520
VERSION = 1
LLAMA_MAGIC = 20240801
LLAMA_VERSION = 7
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
CHUNK_TOKENS = 1 << 22
PEEK_BYTES = 1 << 16  # Read to see which format a file has, or whether it is text.
MIN_HALVES = 64  # Of 16 bits. In fewer tokens every second one can be 0 by chance.
MAX_HIGH_HALF = 16  # The high half of a token is below it in vocabularies of up to a million tokens.
MAX_NPY_HEADER = 1 << 16

_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it
_seek = threading.Lock()


class Tokens(abc.ABC):
    """A sequence of tokens with random access."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    dtype: np.dtype

    @abc.abstractmethod
    def read(self, starts: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """Copies tokens into rows of an array.

        Args:
            starts: int [n], the first token of each row.
            out: `dtype` [any, tokens], C-contiguous; `out[rows[i]]` receives the tokens from `starts[i]` on.
            rows: int [n].
        """

    def chunks(self) -> Iterator[np.ndarray]:
        """Yields all tokens in order, a few million at a time."""
        for start in range(0, len(self), CHUNK_TOKENS):
            yield self[start : start + CHUNK_TOKENS]

    def __getitem__(self, index: slice) -> np.ndarray:
        """Reads a slice without step, unsigned [tokens]."""
        start, stop, _ = index.indices(len(self))
        out = np.empty((1, max(stop - start, 0)), self.dtype)
        if out.size:
            self.read(np.array([start]), out, np.array([0]))
        return out[0]


class TokenArray(Tokens):
    """Tokens in memory, unsigned [tokens]."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens, self.dtype = tokens, tokens.dtype

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, starts: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """See `Tokens.read`."""
        out[rows] = np.lib.stride_tricks.sliding_window_view(self._tokens, out.shape[1])[starts]


class TokenFile(Tokens):
    """Tokens in a file, which stays open. No tokens are kept in memory.

    Args:
        path: the file.
        n_tokens: the number of tokens.
        offset: bytes before the first token.
        dtype: the type of a token.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: Path, n_tokens: int, offset: int, dtype: np.dtype) -> None:
        self.path, self.dtype, self._n_tokens, self._offset = path, dtype, n_tokens, offset
        try:
            self._file = os.open(path, os.O_RDONLY | _BINARY)
        except OSError as error:
            advice = "; raise the limit of open files: ulimit -n 65536" if error.errno == errno.EMFILE else ""
            raise UserError(f"{path} cannot be read: {error.strerror}{advice}") from error
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._n_tokens

    def read(self, starts: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """See `Tokens.read`.

        Raises:
            UserError: the disk fails, or the file has become shorter.
        """
        memory, size = memoryview(out.data).cast("B"), out.shape[1] * self.dtype.itemsize
        offsets = self._offset + starts * self.dtype.itemsize
        for offset, begin in zip(offsets.tolist(), (rows * size).tolist(), strict=True):
            done = 0
            while done < size:
                try:
                    read = _read_at(self._file, memory[begin + done : begin + size], offset + done)
                except OSError as error:
                    raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
                if not read:
                    raise UserError(f"{self.path} has become shorter; copy or prepare it again")
                done += read


def _read_at(file: int, out: memoryview, offset: int) -> int:
    """Reads from an offset of a file into `out`, and returns the number of bytes: 0 at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [out], offset)
    with _seek:  # Windows has one position per file, for all threads
        os.lseek(file, offset, os.SEEK_SET)
        data = os.read(file, len(out))
    out[: len(data)] = data
    return len(data)


def open_tokens(path: str | Path) -> TokenFile:
    """Opens a token file in any of the formats above.

    Raises:
        UserError: the file cannot be read, is not a token file, or its header and size disagree.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(PEEK_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".npy":
        return _open_npy(path)
    magic = int.from_bytes(head[:4], "little")
    if magic in (MAGIC, LLAMA_MAGIC):
        expected = VERSION if magic == MAGIC else LLAMA_VERSION
        dtype = np.dtype("<u2" if magic == MAGIC else "<u4")
        header, _ = read_header(path, magic, "a token file")
        if header[1] != expected:
            raise UserError(f"{path} has version {header[1]} of the token file format; expected {expected}")
        n_tokens = int(header[2])
        _check_size(path, size, n_tokens, HEADER_BYTES, dtype)
        return TokenFile(path, n_tokens, HEADER_BYTES, dtype)
    if path.suffix != ".bin" or size % 2 or _is_text(head):
        kind = f"a file of {size:,} bytes without llm.c's header" if not _is_text(head) else "text" if size else "empty"
        raise UserError(
            f"{path} is not a token file: it is {kind}; expected the .bin of llm.c or nanoGPT or the .npy of "
            "build-nanogpt (make token files from text with python -m gpt2_jax.prepare)"
        )
    if wide := _wide_type(head):
        new = str(path.with_suffix(".npy"))
        code = f"import numpy as np; np.save({new!r}, np.fromfile({str(path)!r}, '<{wide}').astype(np.uint32))"
        code = re.sub(r'([\\"$`])', r"\\\1", code)  # between double quotes of a shell
        raise UserError(
            f"{path} has tokens of {np.dtype(wide)}, not uint16: every second 16 bits are (nearly) 0; convert it: "
            f'python -c "{code}" (if they are uint16, with u2 in place of {wide})'
        )
    return TokenFile(path, size // 2, 0, np.dtype("<u2"))


def _is_text(head: bytes) -> bool:
    """True if a file that starts with `head` is text: tokens below 256 have a zero byte, and text has none."""
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(head) - error.start < 4 and error.reason == "unexpected end of data"  # cut inside a character
    return True


def _wide_type(head: bytes) -> Literal["u4", "i8"] | None:
    """The type of integers that a file without header starts with, if they are wider than 16 bits; else None.

    The high half of such a token is 0, or at least small beside the low half. Tokens of 16 bits are not taken for wide
    ones unless every second of the first 32,768 is 0 (or, with tokens from 256 on, below 16). A file of zeros, of one
    token, or of fewer than 64 tokens is never refused.
    """
    halves = np.frombuffer(head[: len(head) // 2 * 2], "<u2")
    low, high = halves[::2], halves[1::2]
    if len(halves) < MIN_HALVES or not low.any():
        return None
    if high.any() and (high.max() >= MAX_HIGH_HALF or low.max() < 256):
        return None
    return "u4" if low[1::2].any() else "i8"


def _open_npy(path: Path) -> TokenFile:
    """Opens a .npy file. NumPy would evaluate the header as Python, with every error of that parser."""
    try:
        with open(path, "rb") as file:
            magic, size = file.read(8), os.fstat(file.fileno()).st_size
            n_bytes = 2 if magic[6:7] == b"\1" else 4
            length = int.from_bytes(file.read(n_bytes), "little")
            header = file.read(min(length, MAX_NPY_HEADER)).decode("latin-1")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    kind = re.search(r"""['"]descr['"]: *['"]([<>|=]?)(f[248]|[iu][1248])['"]""", header)
    shape = re.search(r"""['"]shape['"]: *\(([0-9, ]{0,100})\)""", header)
    if magic[:6] != b"\x93NUMPY" or length > MAX_NPY_HEADER or len(header) < length or not kind or not shape:
        raise UserError(f"{path} is not a NumPy file of tokens, or is cut off; copy it again")
    dtype, sizes = np.dtype("".join(kind.groups())), [int(part) for part in shape[1].split(",") if part.strip()]
    if len(sizes) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise UserError(f"{path} holds {dtype} {sizes}; expected uint16 or uint32 [tokens]")
    offset = len(magic) + n_bytes + length
    _check_size(path, size, sizes[0], offset, dtype)
    return TokenFile(path, sizes[0], offset, dtype)


def _check_size(path: Path, size: int, n_tokens: int, offset: int, dtype: np.dtype) -> None:
    """Checks that a file has as many bytes as its header says.

    Raises:
        UserError: it has fewer or more.
    """
    right = offset + dtype.itemsize * n_tokens
    if n_tokens < 0 or size != right:
        raise UserError(
            f"{path} is cut off or damaged: its header says {n_tokens:,} tokens, which take {right:,} bytes, but "
            f"it has {size:,}; copy or prepare it again"
        )


def read_header(path: str | Path, magic: int, kind: str) -> tuple[np.ndarray, int]:
    """Reads the header that all files of llm.c start with.

    Args:
        path: the file.
        magic: the expected first integer.
        kind: the expected kind of file, for errors: "a token file".

    Returns:
        The header, int32 [256], and the size of the file in bytes.

    Raises:
        UserError: the file cannot be read, or does not start with `magic`.
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


def header_bytes(n_tokens: int) -> bytes:
    """Makes the header of a token file in llm.c's format."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()


def find_token_files(pattern: str, key: str) -> list[Path]:
    """Finds the files that match a glob, sorted by name. The path of an existing file matches only that file.

    Args:
        pattern: the glob.
        key: the config key that it comes from, for errors.

    Raises:
        UserError: no file matches, or a directory, a FIFO, a socket or a device does.
    """
    paths = find_paths(pattern, key)
    if not paths:
        raise UserError(
            f"{key} = {pattern!r} matches no file; give a glob of token files (python -m gpt2_jax.prepare makes them)"
        )
    if directories := [path for path in paths if path.is_dir()]:
        raise UserError(f"{key} = {pattern!r} matches the directory {directories[0]}; type {directories[0]}/*.bin")
    for path in paths:
        check_regular(path)
    return paths


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files for `count` token files if necessary, as far as the system allows."""
    if sys.platform == "win32":  # has another limit, which is fixed
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512  # for everything else in the process
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):  # macOS has a lower limit behind the one without end
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def open_token_files(paths: Sequence[Path]) -> list[TokenFile]:
    """Opens token files, and first raises the limit of open files if there are many."""
    allow_open_files(len(paths))
    return [open_tokens(path) for path in paths]
