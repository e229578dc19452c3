"""Sources of documents for `prepare`: local files and the standard library. `hub.py` has the datasets.

A source is read once, in order, in blocks of about a megabyte, so neither a large file nor a large corpus has to fit
into memory. A line of JSON, a row of Parquet and a stretch of text without white space have to: they may have
`MAX_RECORD_BYTES`. (To refuse a long row among short ones, it is read first. Parquet has at most 2 GB per row.)
Each block has the cursor of the position after it, from which a later process resumes.
"""

from __future__ import annotations

import abc
import codecs
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from gpt2_jax.config import TokenizerName
from gpt2_jax.data.compressed import ERRORS, SUFFIXES, open_decompressed, skip_to
from gpt2_jax.data.corpus import DOWNLOADS, STDLIB, held_out_names, match_files, name_files, stdlib_files
from gpt2_jax.data.encode import SpaceCounter, last_safe_cut, uses_gigatoken
from gpt2_jax.data.manifest import Split
from gpt2_jax.data.tokenizer import LONGEST_SPACE, TOO_MANY_SPACES
from gpt2_jax.errors import UserError, import_optional
from gpt2_jax.parsing import is_count

BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 25  # A book has 1 MB. A worker takes several times this, and JSON of brackets 20 times.
JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of a file, which workers read themselves: sending them through a pipe would take longer."""

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        """Reads the bytes.

        Raises:
            UserError: the file is gone or has become shorter.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); restore it") from error
        if len(data) < self.size:
            raise UserError(f"{self.path} became shorter while it was read; restore it")
        return data


@dataclasses.dataclass(frozen=True)
class Block:
    """The unit of work of a tokenizing worker.

    Attributes:
        kind: "text" is one document or a part of one; "lines" has a JSON object per line; "texts" is a list of
            documents.
        content: bytes of text or lines, or their place in a file; for "texts" a list.
        origin: the file or dataset, for errors.
        first: the number of the first line or document, for errors.
        split: where the documents go; None to choose by a hash of each document.
        cursor: where the source resumes after this block, in JSON types.
        progress: how much of `Source.total` has been read after this block.
        starts_document: True if a text starts a document, False if it continues one.
        skipped: the number of documents that were left out before it.
    """

    kind: Literal["text", "lines", "texts"]
    content: bytes | Span | list[Any]
    origin: str
    first: int
    split: Split | None
    cursor: Any
    progress: int
    starts_document: bool = False
    skipped: int = 0


class Source(abc.ABC):
    """Documents in a fixed order.

    Attributes:
        identity: identifies the documents and their order, in JSON types.
        total: the amount to read, in any unit; 0 if unknown.
        val_fraction: the share of the documents that is held out.
    """

    identity: dict[str, Any]
    total: int
    val_fraction: float

    @abc.abstractmethod
    def blocks(self, cursor: Any) -> Iterator[Block]:
        """Yields the blocks after a cursor; None starts at the beginning.

        Raises:
            UserError: something cannot be read.
        """


def checked_cursor(cursor: Any, *kinds: Literal["count", "table"]) -> list[Any] | None:
    """Checks that a cursor, which comes from a file, is None or a list of counts and JSON objects.

    Raises:
        UserError: it is not.
    """
    if cursor is None:
        return None
    items = list(zip(cursor, kinds, strict=False)) if isinstance(cursor, list) and len(cursor) == len(kinds) else []
    if items and all(is_count(item) if kind == "count" else isinstance(item, dict) for item, kind in items):
        return cursor
    raise UserError(f"the position to resume from is damaged ({cursor!r:.100}); give another --out")


class FileSource(Source):
    """Text files (a file is a document), JSON lines and Parquet (a row is a document); the first two also compressed.

    Several text files are split by a hash of their names, a single text file near its end, and lines and rows by a hash
    of each text.

    Args:
        patterns: files and globs, or only "stdlib".
        field: the field of JSON objects, and the column of Parquet tables, that has the text.
        val_fraction: by default 0.1, and for the standard library 0.05, as in the preset quickstart.
        tokenizer: "bytes" takes any bytes, the others need UTF-8.
        skip_errors: leaves out texts and lines that cannot be tokenized, instead of raising an error.
        exclude: a directory whose files do not match globs: the output directory.

    Raises:
        UserError: no file matches, or all files are empty.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        field: str,
        val_fraction: float | None,
        tokenizer: TokenizerName,
        skip_errors: bool,
        exclude: Path | None = None,
    ) -> None:
        self._field, self._tokenizer, self._skip_errors = field, tokenizer, skip_errors
        stdlib = list(patterns) == [STDLIB]
        self.val_fraction = (0.05 if stdlib else 0.1) if val_fraction is None else val_fraction
        found = stdlib_files() if stdlib else _find_files(patterns, exclude)
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
        self._single_text = len(self._files) == len(texts) == 1
        several = len(texts) > 1 and self.val_fraction > 0
        self._held_out = held_out_names(texts, self.val_fraction) if several else set()

    def blocks(self, cursor: Any) -> Iterator[Block]:
        """See `Source.blocks`. A cursor is [index of the file, bytes or rows read in it, lines read in it]."""
        first, offset, line = checked_cursor(cursor, "count", "count", "count") or (0, 0, 0)
        before = 0
        for number, (name, (path, size)) in enumerate(self._files.items()):
            if number >= first:
                kind = _kind(path)
                if kind == "parquet":
                    blocks = self._parquet_blocks(path, number, offset)
                elif kind == "lines":
                    blocks = self._line_blocks(path, number, offset, line)
                else:
                    blocks = self._text_blocks(path, name, number, offset)
                try:
                    for block in blocks:
                        yield dataclasses.replace(block, progress=before + block.progress)
                except ERRORS as error:
                    reason = getattr(error, "strerror", None) or error
                    raise UserError(f"{path} cannot be read ({reason}); copy it again") from error
                offset = line = 0
            before += size

    def _text_blocks(self, path: Path, name: str, number: int, offset: int) -> Iterator[Block]:
        if self._tokenizer != "bytes" and (flaw := _flaw(path, self._tokenizer)):
            if not self._skip_errors:
                raise UserError(
                    f"{path} {flaw}; correct it, leave it out, or type --on-error skip or --tokenizer bytes"
                )
            yield Block("text", b"", str(path), 0, "train", [number + 1, 0, 0], path.stat().st_size, skipped=1)
            return
        begin = _text_start(path)
        offset = max(offset, begin)
        parts: list[tuple[Split, int, int | None]] = [("val" if name in self._held_out else "train", begin, None)]
        if self._single_text and self.val_fraction > 0:
            val_start = _validation_start(path, begin, self.val_fraction, self._tokenizer)
            parts = [("train", begin, val_start), ("val", val_start, None)]
        with open_decompressed(path) as (file, disk):
            skip_to(file, offset)
            for split, start, stop in parts:
                rest = b""
                while stop is None or offset < stop:
                    size = max(BLOCK_BYTES, len(rest))  # doubles `rest` while it cannot be cut
                    data = rest + file.read(size if stop is None else min(size, stop - offset - len(rest)))
                    at_end = len(data) == len(rest)
                    end = len(data) if at_end or self._tokenizer == "bytes" else last_safe_cut(data)
                    rest, data = data[end:], data[:end]
                    if data:
                        content = Span(path, offset, len(data)) if file is disk else data
                        starts, offset = offset == start, offset + end
                        yield Block("text", content, str(path), 0, split, [number, offset, 0], disk.tell(), starts)
                    if at_end:
                        break

    def _line_blocks(self, path: Path, number: int, offset: int, line: int) -> Iterator[Block]:
        with open_decompressed(path) as (file, disk):
            skip_to(file, offset)
            while data := file.read(BLOCK_BYTES):
                if not data.endswith(b"\n"):
                    data += file.readline(MAX_RECORD_BYTES)
                whole, skipped = data.rfind(b"\n", 0, -1) + 1, 0  # bytes of the lines before the last
                if len(data) - whole > MAX_RECORD_BYTES:
                    if not self._skip_errors:
                        n_whole = line + data.count(b"\n", 0, whole)
                        raise _too_long(f"{path}, line {n_whole + 1}")
                    skipped = len(data) - whole + (0 if data.endswith(b"\n") else _skip_line(file))
                    data = data[:whole]
                content = Span(path, offset, len(data)) if file is disk else data
                offset += len(data) + skipped
                first, line = line + 1, line + data.count(b"\n") + bool(skipped)
                cursor, n_skipped = [number, offset, line], int(bool(skipped))
                yield Block("lines", content, str(path), first, None, cursor, disk.tell(), skipped=n_skipped)

    def _parquet_blocks(self, path: Path, number: int, offset: int) -> Iterator[Block]:
        pyarrow, parquet = (import_optional(name, f"reading {path}") for name in ("pyarrow", "pyarrow.parquet"))
        try:
            with parquet.ParquetFile(path) as table:
                if self._field not in table.schema_arrow.names:
                    columns = ", ".join(table.schema_arrow.names)
                    raise UserError(f"{path} has no column {self._field!r}; type --field with one of {columns}")
                size, n_rows, row = path.stat().st_size, table.metadata.num_rows, 0
                for group in range(table.num_row_groups):
                    info = table.metadata.row_group(group)
                    end = row + info.num_rows
                    if end <= max(offset, row):  # read before, or empty
                        row = end
                        continue
                    parts = [info.column(number) for number in range(info.num_columns)]
                    sizes = [part.total_uncompressed_size for part in parts if part.path_in_schema == self._field]
                    mean = 1 + sum(sizes) // info.num_rows
                    if mean > MAX_RECORD_BYTES and not self._skip_errors:  # known before the row is read
                        which = f"row {end}" if info.num_rows == 1 else f"one of the rows {row + 1} to {end}"
                        raise _too_long(f"{path}, {which}")
                    batch_size = max(min(BLOCK_BYTES // mean, 128), 1)
                    for batch in table.iter_batches(batch_size, row_groups=[group], columns=[self._field]):
                        column = batch.column(0)
                        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                            column = column.cast(pyarrow.large_binary())  # may not be UTF-8, which the workers check
                        texts = column.to_pylist()[max(offset - row, 0) :]
                        row += len(batch)
                        first = row - len(texts) + 1
                        sizes = [len(text) if isinstance(text, bytes) else 0 for text in texts]
                        long = [n for n, n_bytes in enumerate(sizes) if n_bytes > MAX_RECORD_BYTES]
                        if long and not self._skip_errors:
                            raise _too_long(f"{path}, row {first + long[0]}")
                        for n in long:
                            texts[n] = b""
                        if texts:
                            done, cursor = size * row // n_rows, [number, row, 0]
                            yield Block("texts", texts, str(path), first, None, cursor, done, skipped=len(long))
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from error


def _find_files(patterns: Sequence[str], exclude: Path | None) -> dict[str, Path]:
    """Finds the files of patterns, and names them relative to their common folder."""
    paths: set[str] = set()
    for pattern in patterns:
        files = [os.path.abspath(path) for path in match_files(pattern, "SOURCE")]
        expanded = os.path.expanduser(pattern)
        if exclude and not os.path.isfile(expanded):
            excluded = Path(os.path.abspath(exclude))
            files = [path for path in files if excluded not in Path(path).parents]
        if not files:
            if os.path.isdir(expanded):
                advice = f"type '{pattern.rstrip('/')}/**/*.txt'"
            elif source := DOWNLOADS.get(Path(pattern).name):
                advice = f"type curl -o {pattern} {source}"
            else:
                advice = "--help lists the sources with a name"
            raise UserError(f"{pattern!r} matches no file; {advice}")
        paths.update(files)
    return name_files(paths)


def _kind(path: Path) -> Literal["text", "lines", "parquet"]:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in SUFFIXES]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    return "lines" if suffixes and suffixes[-1] in JSON_LINES else "text"


def _too_long(where: str) -> UserError:
    """The error for a record that has more than `MAX_RECORD_BYTES`."""
    return UserError(
        f"{where} has more than {MAX_RECORD_BYTES:,} bytes; divide it, leave it out, or type --on-error skip"
    )


def _skip_line(file: IO[bytes]) -> int:
    """Reads to the end of a line, a piece at a time, and returns the number of bytes."""
    size = 0
    while data := file.readline(BLOCK_BYTES):
        size += len(data)
        if data.endswith(b"\n"):
            break
    return size


def _flaw(path: Path, tokenizer: TokenizerName) -> str | None:
    """Says why a text file cannot be tokenized, to continue a sentence; None if it can.

    It is not UTF-8, has more white space in a row than tiktoken takes, or no place to cut it in `MAX_RECORD_BYTES`.
    """
    decoder, offset, uncut, spaces = codecs.getincrementaldecoder("utf-8")(), 0, 0, SpaceCounter()
    with open_decompressed(path) as (file, _):
        while True:
            data = file.read(BLOCK_BYTES)
            n_pending = len(decoder.getstate()[0])
            try:
                longest = spaces.add(decoder.decode(data, final=not data))
            except UnicodeDecodeError as error:
                return f"is not UTF-8 text (byte {offset - n_pending + error.start})"
            if longest > LONGEST_SPACE and not uses_gigatoken(tokenizer):
                return TOO_MANY_SPACES
            cut = last_safe_cut(data)
            uncut = len(data) - cut if cut else uncut + len(data)
            if uncut > MAX_RECORD_BYTES:
                return f"has more than {MAX_RECORD_BYTES:,} bytes without white space to cut it at"
            offset += len(data)
            if not data:
                return None


def _text_start(path: Path) -> int:
    """The number of bytes before a text: 3 if it starts with a byte order mark, else 0."""
    with open_decompressed(path) as (file, _):
        return len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def _validation_start(path: Path, begin: int, val_fraction: float, tokenizer: TokenizerName) -> int:
    """The offset where the held-out end of a single text starts. Text is split by characters, as in nanoGPT.

    Args:
        begin: the offset where the text starts.
    """

    def character_starts() -> Iterator[np.ndarray]:
        """Yields, per block, bool [bytes]: True where a character starts (for the bytes tokenizer, at every byte)."""
        with open_decompressed(path) as (file, _):
            skip_to(file, begin)
            while data := file.read(BLOCK_BYTES):
                values = np.frombuffer(data, np.uint8)
                yield np.ones(len(data), bool) if tokenizer == "bytes" else values & 0xC0 != 0x80

    n_characters = sum(int(np.count_nonzero(starts)) for starts in character_starts())
    left, offset = int(n_characters * (1 - val_fraction)), begin
    for starts in character_starts():
        if (count := int(np.count_nonzero(starts))) > left:
            return offset + int(np.flatnonzero(starts)[left])
        left, offset = left - count, offset + len(starts)
    return offset
