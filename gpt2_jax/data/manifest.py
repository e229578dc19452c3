"""The directory that `prepare` writes, and its manifest:

train_000000.bin …, val_000000.bin …   token files in llm.c's format
manifest.json                          their contents; written last
progress.json, *.bin.partial           while the directory is unfinished
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from gpt2_jax.errors import UserError

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PARTIAL = ".partial"

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished token file: its name, its number of tokens and documents, and the SHA-256 of its bytes."""

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a finished directory.

    Attributes:
        settings: the source, the tokenizer and the options that it was made with.
        text_bytes: the number of bytes in the documents; 0 if the source was tokens.
        skipped: the number of damaged documents that were left out.
        shards: the token files, training first.
    """

    settings: dict[str, Any]
    text_bytes: int
    skipped: int
    shards: tuple[Shard, ...]

    def count(self, split: Split) -> tuple[int, int]:
        """The numbers of tokens and documents of a split."""
        shards = [shard for shard in self.shards if f"{split}_" in shard.file]
        return sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards)

    def to_json(self) -> str:
        """Formats the text of `manifest.json`."""
        totals = {split: dict(zip(("tokens", "documents"), self.count(split), strict=True)) for split in SPLITS}
        return json.dumps({**totals, **dataclasses.asdict(self)}, indent=2) + "\n"


def read_manifest(directory: Path) -> Manifest | None:
    """Reads a directory's `manifest.json`; None if it has none, or one that `prepare` did not write.

    Raises:
        UserError: the manifest is damaged, or the directory is unfinished.
    """
    path = directory / MANIFEST
    if (directory / PROGRESS).exists() and not path.exists():
        raise UserError(
            f"{directory} is not finished; rerun the command that prepares it, which resumes (or remove {PROGRESS})"
        )
    table = read_json(path)
    if table is None or not {"settings", "shards"} <= table.keys():
        return None
    with report_damage(path):
        shards = tuple(Shard(**shard) for shard in table["shards"])
        settings = {"source": {}, "tokenizer": "gpt2", **table["settings"]}
        return Manifest(settings, table["text_bytes"], table["skipped"], shards)


def saved_settings(directory: Path) -> dict[str, Any]:
    """Reads the settings in a directory's manifest or progress file; empty if it has neither.

    Raises:
        UserError: the file is damaged.
    """
    table = read_json(directory / MANIFEST) or read_json(directory / PROGRESS) or {}
    return table.get("settings", {})


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads the object in a JSON file; None if the file does not exist."""
    with report_damage(path):
        if not path.exists():
            return None
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise TypeError(f"it holds {type(table).__name__}")
        return table


@contextlib.contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """Turns errors of reading or interpreting a JSON file into a `UserError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the directory again, in another --out") from error


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(directory: Path, manifest: Manifest) -> None:
    """Compares the checksum of every shard with the manifest.

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
                f"{path} is damaged: its SHA-256 is {found[:12]}…, but the manifest has {shard.sha256[:12]}…; copy or "
                "prepare it again"
            )
