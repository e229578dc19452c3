"""Where `prepare` gets documents: the user's files and the standard library; `hub.py` has the datasets.

A source is read once, in order, as blocks of about a megabyte, so that neither a large file nor a large corpus has to
fit into memory (only a line of JSON, and text without white space, are held whole). Each block knows the cursor behind
it, from which a later process reads on.
"""

from __future__ import annotations

import abc
import codecs
import dataclasses
import glob
import gzip
import hashlib
import importlib
import io
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np

from gpt2_jax.config import TokenizerName
from gpt2_jax.data.corpus import STDLIB, WHERE_TO_GET, by_name, held_out_names, stdlib_files
from gpt2_jax.data.encode import boundary
from gpt2_jax.data.prepared import Side
from gpt2_jax.errors import UserError

BLOCK_BYTES = 1 << 20
LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst")


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of a file, for workers to read: handed through a pipe they would take longer."""

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            UserError: they are not there any more.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); bring it back") from error
        if len(data) < self.size:
            raise UserError(f"{self.path} became shorter while it was read; bring it back as it was")
        return data


@dataclasses.dataclass(frozen=True)
class Block:
    """What one worker tokenizes at a time.

    Attributes:
        kind: "text" is one document, or a part of one; "lines" are JSON objects, one in each; "texts" are documents.
        content: bytes of text or lines, or where they are; a list of documents.
        where: the file or dataset, for errors.
        first: number of the first line or document, for errors.
        side: where the documents belong; None lets a hash of each decide.
        cursor: from which the source goes on behind this block; JSON types.
        read: how much of `Source.total` is read with it.
        starts: of text, whether a document starts with it.
        skipped: documents that were left out just before it.
    """

    kind: Literal["text", "lines", "texts"]
    content: bytes | Span | list[Any]
    where: str
    first: int
    side: Side | None
    cursor: Any
    read: int
    starts: bool = False
    skipped: int = 0


class Source(abc.ABC):
    """Documents in a fixed order.

    Attributes:
        identity: what it is, in JSON types; another identity is another source.
        total: how much there is to read, in any unit; 0 where nobody knows.
        val_fraction: share of the documents that is held out.
    """

    identity: dict[str, Any]
    total: int
    val_fraction: float

    @abc.abstractmethod
    def blocks(self, cursor: Any) -> Iterator[Block]:
        """The blocks behind a cursor, None for all.

        Raises:
            UserError: something cannot be read.
        """


class Files(Source):
    """Text (a file is a document) and JSON lines, also as .gz and .zst, and Parquet (a row is a document).

    Of several text files those are held out whose hashed names are smallest; of a text that is the only file its end;
    of lines and rows those whose hashed text is below `val_fraction`.

    Args:
        patterns: files and globs, or "stdlib" alone.
        field: of the JSON objects, and column of the Parquet tables.
        val_fraction: None for 0.1 (of the standard library 0.05, as the preset quickstart has it).
        tokenizer: text has to be UTF-8 for all but "bytes".
        skip: whether text that is not UTF-8 is left out, instead of being an error.
        without: a directory whose files do not count: the one that is written.

    Raises:
        UserError: no file matches, or all are empty.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        field: str,
        val_fraction: float | None,
        tokenizer: TokenizerName,
        skip: bool,
        without: Path | None = None,
    ) -> None:
        self._field, self._tokenizer, self._skip = field, tokenizer, skip
        stdlib = list(patterns) == [STDLIB]
        self.val_fraction = (0.05 if stdlib else 0.1) if val_fraction is None else val_fraction
        found = stdlib_files() if stdlib else _found(patterns, without and Path(os.path.abspath(without)))
        self._files = {name: (path, path.stat().st_size) for name, path in found.items() if path.stat().st_size}
        if not self._files:
            raise UserError(f"{' '.join(patterns)}: every file is empty; give files with text in them")
        self.total = sum(size for _, size in self._files.values())
        listing = "".join(f"{name}\0{size}\0" for name, (_, size) in self._files.items())
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
        self.identity = {
            "files": [*patterns[:3], *["…"] * (len(patterns) > 3)],
            "count": len(self._files),
            "bytes": self.total,
            "listing": digest,
        }
        if any(_kind(path) != "text" for path, _ in self._files.values()):
            self.identity["field"] = field
        texts = [name for name, (path, _) in self._files.items() if _kind(path) == "text"]
        self._single = len(self._files) == len(texts) == 1
        several = len(texts) > 1 and self.val_fraction > 0
        self._held_out = held_out_names(texts, self.val_fraction) if several else set()

    def blocks(self, cursor: Any) -> Iterator[Block]:
        """As `Source.blocks`; a cursor is [file, bytes or rows in it, lines in it]."""
        first, place, line = cursor or (0, 0, 0)
        before = 0
        for number, (name, (path, size)) in enumerate(self._files.items()):
            if number >= first:
                kind = _kind(path)
                if kind == "parquet":
                    found = self._parquet(path, number, place)
                elif kind == "lines":
                    found = self._lines(path, number, place, line)
                else:
                    found = self._text(path, name, number, place)
                try:
                    for block in found:
                        yield dataclasses.replace(block, read=before + block.read)
                except _unreadable() as error:
                    reason = getattr(error, "strerror", None) or error
                    raise UserError(f"{path} cannot be read ({reason}); copy it again") from error
                place = line = 0
            before += size

    def _text(self, path: Path, name: str, number: int, place: int) -> Iterator[Block]:
        if self._tokenizer != "bytes" and (wrong := _not_utf8(path)) is not None:
            if not self._skip:
                raise UserError(
                    f"{path} is not UTF-8 text (byte {wrong}); convert it, leave it out, or type --on-error skip or "
                    "--tokenizer bytes"
                )
            yield Block("text", b"", str(path), 0, "train", [number + 1, 0, 0], path.stat().st_size, skipped=1)
            return
        parts: list[tuple[Side, int, int | None]] = [("val" if name in self._held_out else "train", 0, None)]
        if self._single and self.val_fraction > 0:
            cut = _cut(path, self.val_fraction, self._tokenizer)
            parts = [("train", 0, cut), ("val", cut, None)]
        with _opened(path) as (file, disk):
            _skip_to(file, place)
            for side, start, stop in parts:
                rest = b""
                while stop is None or place < stop:
                    room = max(BLOCK_BYTES, len(rest))  # twice as much each time that there is no boundary
                    data = rest + file.read(room if stop is None else min(room, stop - place - len(rest)))
                    at_end = len(data) == len(rest)
                    end = len(data) if at_end or self._tokenizer == "bytes" else boundary(data)
                    rest, data = data[end:], data[:end]
                    if data:
                        cursor = [number, place + end, 0]
                        content = Span(path, place, len(data)) if file is disk else data
                        yield Block("text", content, str(path), 0, side, cursor, disk.tell(), starts=place == start)
                        place += end
                    if at_end:
                        break

    def _lines(self, path: Path, number: int, place: int, line: int) -> Iterator[Block]:
        with _opened(path) as (file, disk):
            _skip_to(file, place)
            while data := file.read(BLOCK_BYTES):
                if not data.endswith(b"\n"):
                    data += file.readline()
                content = Span(path, place, len(data)) if file is disk else data
                place += len(data)
                first, line = line + 1, line + data.count(b"\n")
                yield Block("lines", content, str(path), first, None, [number, place, line], disk.tell())

    def _parquet(self, path: Path, number: int, place: int) -> Iterator[Block]:
        pyarrow, parquet = (import_extra(name, f"reading {path}") for name in ("pyarrow", "pyarrow.parquet"))
        with parquet.ParquetFile(path) as table:
            if self._field not in table.schema_arrow.names:
                known = ", ".join(table.schema_arrow.names)
                raise UserError(f"{path} has no column {self._field!r}; type --field with one of {known}")
            size, n_rows, row = path.stat().st_size, table.metadata.num_rows, 0
            for group in range(table.num_row_groups):
                end = row + table.metadata.row_group(group).num_rows
                if end <= place:
                    row = end
                    continue
                for batch in table.iter_batches(batch_size=128, row_groups=[group], columns=[self._field]):
                    column = batch.column(0)
                    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                        column = column.cast(pyarrow.large_binary())  # it need not be UTF-8: the workers see to it
                    texts = column.to_pylist()[max(place - row, 0) :]
                    row += len(batch)
                    if texts:
                        first = row - len(texts) + 1
                        yield Block("texts", texts, str(path), first, None, [number, row, 0], size * row // n_rows)


def _unreadable() -> tuple[type[Exception], ...]:
    """What the readers raise for files that are damaged, or cannot be read."""
    errors: list[type[Exception]] = [OSError, EOFError, zlib.error]
    for module, name in (("pyarrow", "ArrowException"), ("zstandard", "ZstdError")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _found(patterns: Sequence[str], without: Path | None) -> dict[str, Path]:
    """The files of patterns, but those in `without`, by their names below their common folder, in order."""
    paths: set[str] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.isfile(expanded):
            files = [expanded]
        else:
            found = (Path(os.path.abspath(path)) for path in glob.glob(expanded, recursive=True))
            files = [str(path) for path in found if path.is_file() and without not in path.parents]
        if not files:
            source = WHERE_TO_GET.get(Path(pattern).name)
            if os.path.isdir(expanded):
                advice = f"type '{pattern.rstrip('/')}/**/*.txt'"
            else:
                advice = f"type curl -o {pattern} {source}" if source else "--help lists the sources that have names"
            raise UserError(f"{pattern!r} matches no file; {advice}")
        paths.update(files)
    return by_name(paths)


def _kind(path: Path) -> Literal["text", "lines", "parquet"]:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    return "lines" if suffixes and suffixes[-1] in LINES else "text"


class _Zstandard(io.RawIOBase):
    """The bytes of the frames in a .zst file; zstandard's own reader takes a file that is cut off for a whole one."""

    def __init__(self, disk: IO[bytes], path: Path) -> None:
        decompressor = import_extra("zstandard", f"reading {path}").ZstdDecompressor(max_window_size=1 << 31)
        self._disk, self._new, self._frame, self._ready, self._rest = disk, decompressor.decompressobj, None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._disk.read(1 << 16)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                return 0
            frame = self._frame or self._new()
            self._ready = frame.decompress(data)
            self._frame, self._rest = (None, frame.unused_data) if frame.eof else (frame, b"")
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The bytes of a file, decompressed, and the file on the disk."""
    with open(path, "rb") as disk:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=disk) as file:
                yield cast(IO[bytes], file), disk
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(_Zstandard(disk, path), BLOCK_BYTES), disk
        else:
            yield disk, disk


def _skip_to(file: IO[bytes], place: int) -> None:
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(place)
        return
    while place and (data := file.read(min(place, BLOCK_BYTES))):
        place -= len(data)


def _not_utf8(path: Path) -> int | None:
    """The first byte of a file that is not UTF-8, None if all is."""
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    with _opened(path) as (file, _):
        while True:
            data = file.read(BLOCK_BYTES)
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                return place - waiting + error.start
            place += len(data)
            if not data:
                return None


def _cut(path: Path, val_fraction: float, tokenizer: TokenizerName) -> int:
    """The byte at which the held-out end of a single text starts; text is cut by characters, as nanoGPT cuts it."""

    def starts() -> Iterator[np.ndarray]:
        """Of each block, where characters start."""
        with _opened(path) as (file, _):
            while data := file.read(BLOCK_BYTES):
                numbers = np.frombuffer(data, np.uint8)
                whole = np.ones(len(data), bool) if tokenizer == "bytes" else numbers & 0xC0 != 0x80
                yield whole

    left, place = int(sum(map(np.count_nonzero, starts())) * (1 - val_fraction)), 0
    for whole in starts():
        if (here := int(np.count_nonzero(whole))) > left:
            return place + int(np.flatnonzero(whole)[left])
        left, place = left - here, place + len(whole)
    return place


def import_extra(name: str, purpose: str) -> Any:
    """A module of the extra `data`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"{purpose} needs {package}, which is not installed; type pip install {package}") from error
