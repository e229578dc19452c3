"""A directory that `prepare` writes:

    train_000000.bin …, val_000000.bin …   token files in llm.c's format
    manifest.json                          what they hold, when all is there
    progress.json, *.bin.partial           until then

What is written survives its writer: after a kill, a full disk or a lost connection the next writer goes on behind the
last block that `progress.json` knows, and the files become the same, byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from gpt2_jax.data.shards import HEADER_BYTES, header_bytes
from gpt2_jax.errors import UserError
from gpt2_jax.files import replace_text

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PARTIAL = ".partial"

Side = Literal["train", "val"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A token file: its name, what it holds, and the SHA-256 of all its bytes."""

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished directory holds.

    Attributes:
        settings: what it was made of and how: source, tokenizer, options.
        text_bytes: of the documents that were read, in UTF-8; 0 where only tokens were seen.
        skipped: documents that were left out because something was wrong with them.
        shards: the token files, training first.
    """

    settings: dict[str, Any]
    text_bytes: int
    skipped: int
    shards: tuple[Shard, ...]

    def count(self, side: Side) -> tuple[int, int]:
        """Tokens and documents of a side."""
        shards = [shard for shard in self.shards if f"{side}_" in shard.file]
        return sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        totals = {side: dict(zip(("tokens", "documents"), self.count(side), strict=True)) for side in SIDES}
        return json.dumps({**totals, **dataclasses.asdict(self)}, indent=2) + "\n"


def read_manifest(directory: Path) -> Manifest | None:
    """What a directory's `manifest.json` says, None without one, or if it is none of ours.

    Raises:
        UserError: it is damaged, or the directory is not finished.
    """
    path = directory / MANIFEST
    if (directory / PROGRESS).exists() and not path.exists():
        raise UserError(
            f"{directory} is not finished; type the command that prepares it again: it goes on (or remove {PROGRESS})"
        )
    table = _read_json(path)
    if table is None or not {"settings", "shards"} <= table.keys():
        return None
    with _damaged(path):
        shards = tuple(Shard(**shard) for shard in table["shards"])
        settings = {"source": {}, "tokenizer": "gpt2", **table["settings"]}
        return Manifest(settings, table["text_bytes"], table["skipped"], shards)


def written_settings(directory: Path) -> dict[str, Any]:
    """The settings in a directory's manifest or progress, none if it has neither.

    Raises:
        UserError: it is damaged.
    """
    table = _read_json(directory / MANIFEST) or _read_json(directory / PROGRESS) or {}
    settings: dict[str, Any] = table.get("settings", {})
    return settings


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no file."""
    with _damaged(path):
        if not path.exists():
            return None
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise TypeError(f"it holds {type(table).__name__}")
        return table


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the directory again, in another --out") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """Settings, and what they say of the source, in one table."""
    return {**table, **table.get("source", {}), "source": None}


@dataclasses.dataclass
class _Open:
    """The shard of a side that is being written."""

    number: int = 0
    tokens: int = 0
    documents: int = 0


class ShardWriter:
    """Writes a directory of token files, from where the writer before it got to.

    Use it as a context manager, `append` what comes, `mark` how far that is in the source, and `finish`.

    Args:
        directory: which exists.
        settings: what the tokens are made of and how; JSON types.
        shard_tokens: in each file but the last of a side.
        end_of_text: the token that stands before each document.

    Raises:
        UserError: the directory holds something else.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], shard_tokens: int, end_of_text: int) -> None:
        self.directory, self.settings = directory, settings
        self.cursor: Any = None
        self.text_bytes = self.skipped = 0
        self.shards: list[Shard] = []
        self.finished = False
        self._shard_tokens, self._end_of_text = shard_tokens, end_of_text
        self._open: dict[Side, _Open] = {side: _Open() for side in SIDES}
        self._files: dict[Side, BinaryIO] = {}
        for name in (MANIFEST, PROGRESS):
            if table := _read_json(directory / name):
                with _damaged(directory / name):
                    self._go_on(table, finished=name == MANIFEST)
                self._look()
                return
        if foreign := sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".npy")):
            raise UserError(f"{directory} holds {foreign[0]}, which is not of this command; give another --out")

    def _go_on(self, table: dict[str, Any], finished: bool) -> None:
        """Takes over what the writer before wrote down."""
        theirs, ours = _flat(table["settings"]), _flat(self.settings)
        changed = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if changed:
            listed = "; ".join(f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}" for key in changed)
            raise UserError(
                f"{self.directory} holds other tokens than these ({listed}); go back to its source and options, or "
                "give another --out"
            )
        self.finished, self.text_bytes, self.skipped = finished, table["text_bytes"], table["skipped"]
        self.shards = [Shard(**shard) for shard in table["shards"]]
        if not finished:
            self.cursor = table["cursor"]
            self._open = {side: _Open(**table["open"][side]) for side in SIDES}

    def _look(self) -> None:
        """Makes sure that everything which was written down is there."""
        sizes = {self.directory / shard.file: HEADER_BYTES + 2 * shard.tokens for shard in self.shards}
        for side, part in self._open.items():
            if part.tokens:
                whole = self.directory / self._name(side)  # completed after the last mark
                path = whole if whole.exists() else whole.with_name(whole.name + PARTIAL)
                sizes[path] = HEADER_BYTES + 2 * part.tokens
        for path, size in sizes.items():
            if not path.exists() or path.stat().st_size < size:
                what = "shorter than it was" if path.exists() else "missing"
                raise UserError(
                    f"{path} is {what}; bring it back, or remove {self.directory} and type the same command"
                )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard.tokens for shard in self.shards) + sum(part.tokens for part in self._open.values())

    def documents(self) -> int:
        """Documents written so far."""
        return sum(shard.documents for shard in self.shards) + sum(part.documents for part in self._open.values())

    def append(self, side: Side, tokens: np.ndarray) -> None:
        """Writes uint16 [tokens] behind the others of a side."""
        while tokens.size:
            part = self._open[side]
            now, tokens = np.split(tokens, [self._shard_tokens - part.tokens])
            self._file(side).write(now.astype("<u2", copy=False).data)
            part.tokens += now.size
            part.documents += int(np.count_nonzero(now == self._end_of_text))
            if part.tokens == self._shard_tokens:
                self._complete(side)

    def mark(self, cursor: Any) -> None:
        """Makes what was written last, and remembers with it how far in the source it reaches; JSON types."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.cursor = cursor
        progress = {
            "settings": self.settings,
            "cursor": cursor,
            "text_bytes": self.text_bytes,
            "skipped": self.skipped,
            "open": {side: dataclasses.asdict(part) for side, part in self._open.items()},
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        replace_text(self.directory / PROGRESS, json.dumps(progress, indent=2) + "\n")

    def finish(self) -> Manifest:
        """Completes the last shards and writes the manifest."""
        for side in SIDES:
            if self._open[side].tokens:
                self._complete(side)
        shards = tuple(sorted(self.shards, key=lambda shard: shard.file))
        manifest = Manifest(self.settings, self.text_bytes, self.skipped, shards)
        if not self.finished:
            replace_text(self.directory / MANIFEST, manifest.to_json())
        (self.directory / PROGRESS).unlink(missing_ok=True)
        return manifest

    def discard(self) -> None:
        """Removes everything from a directory of which no token is known."""
        self.__exit__()
        self._files.clear()
        for side in SIDES:
            for path in [*self.directory.glob(f"{side}_*.bin"), *self.directory.glob(f"{side}_*.bin{PARTIAL}")]:
                path.unlink()
        (self.directory / PROGRESS).unlink(missing_ok=True)

    def _name(self, side: Side) -> str:
        return f"{side}_{self._open[side].number:06d}.bin"

    def _file(self, side: Side) -> BinaryIO:
        """The partial file of a side, with nothing in it but what is known to be there."""
        if side not in self._files:
            path = self.directory / self._name(side)
            partial = path.with_name(path.name + PARTIAL)
            if path.exists():  # completed after the last mark
                path.rename(partial)
            size = HEADER_BYTES + 2 * self._open[side].tokens
            if not self._open[side].tokens:
                partial.write_bytes(header_bytes(0))
            file = open(partial, "r+b")  # noqa: SIM115
            file.truncate(size)
            file.seek(size)
            self._files[side] = file
        return self._files[side]

    def _complete(self, side: Side) -> None:
        file, part, path = self._file(side), self._open[side], self.directory / self._name(side)
        file.seek(0)
        file.write(header_bytes(part.tokens))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        del self._files[side]
        partial = path.with_name(path.name + PARTIAL)
        self.shards.append(Shard(path.name, part.tokens, part.documents, sha256(partial)))
        partial.rename(path)
        self._open[side] = _Open(part.number + 1)


def verify(directory: Path, manifest: Manifest) -> None:
    """Reads every shard and compares its checksum.

    Raises:
        UserError: a shard is missing or damaged.
    """
    for shard in manifest.shards:
        path = directory / shard.file
        try:
            found = sha256(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; copy or prepare it again") from error
        if found != shard.sha256:
            raise UserError(
                f"{path} is damaged: its SHA-256 is {found[:12]}…, the manifest's {shard.sha256[:12]}…; copy or "
                "prepare it again"
            )
