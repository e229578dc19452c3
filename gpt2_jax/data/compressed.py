"""Reads plain, gzip and Zstandard files as streams of bytes."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from gpt2_jax.errors import import_optional

SUFFIXES = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
# Compressed bytes that Zstandard gets at a time. A block has at least 4 bytes and holds at most 128 KB, so 1 KB becomes
# at most 32 MB, however well the file is compressed. Larger pieces are not faster.
ZSTD_BYTES = 1 << 10

ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
"""Raised for damaged files and failing disks."""


@contextlib.contextmanager
def open_decompressed(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Opens a file and yields its decompressed bytes and the file on disk, whose position shows the progress.

    Reading raises one of `ERRORS` if the file is damaged.
    """
    with open(path, "rb") as disk:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=disk) as file:
                yield cast(IO[bytes], file), disk
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(_Zstandard(disk, path), CHUNK_BYTES), disk
        else:
            yield disk, disk


def skip_to(file: IO[bytes], offset: int) -> None:
    """Moves a file that was just opened to an offset in its decompressed bytes."""
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(offset)
        return
    while offset and (data := file.read(min(offset, CHUNK_BYTES))):
        offset -= len(data)


class _Zstandard(io.RawIOBase):
    """The decompressed frames of a .zst file. Unlike zstandard's own reader, it detects a file that is cut off."""

    def __init__(self, disk: IO[bytes], path: Path) -> None:
        self._zstandard = import_optional("zstandard", f"reading {path}")
        self._decompressor = self._zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._disk, self._frame, self._decompressed, self._compressed = disk, None, memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            data = self._compressed or self._disk.read(ZSTD_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            try:
                self._decompressed = memoryview(frame.decompress(data))
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._frame, self._compressed = (None, frame.unused_data) if frame.eof else (frame, b"")
        part, self._decompressed = self._decompressed[: len(buffer)], self._decompressed[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
