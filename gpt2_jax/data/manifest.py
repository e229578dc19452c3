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
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from gpt2_jax.config import TokenizerName
from gpt2_jax.errors import UserError, one_line
from gpt2_jax.parsing import MAX_JSON_BYTES, is_count, parse_json, read_text

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PARTIAL = ".partial"

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)

FILE_NAME = re.compile(r"[\w-][\w.-]{0,250}", re.ASCII)  # of a token file: nothing outside its directory
SHA256 = re.compile(r"[0-9a-f]{64}")


def require_sha256(text: str) -> None:
    """Checks that a text is a SHA-256 in hexadecimal.

    Raises:
        ValueError: it is not.
    """
    if not SHA256.fullmatch(text):
        raise ValueError(f"{text!r} is not a SHA-256")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished token file: its name, its number of tokens and documents, and the SHA-256 of its bytes."""

    file: str
    tokens: int
    documents: int
    sha256: str

    def __post_init__(self) -> None:
        if not FILE_NAME.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is not the name of a token file")
        require_sha256(self.sha256)


Record = TypeVar("Record")


def from_table(kind: type[Record], table: Any) -> Record:
    """Makes a dataclass whose fields are texts and counts from a JSON object, and checks its keys and types.

    Raises:
        ValueError: a key is missing or unknown, or a value has another type.
    """
    fields = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(table, dict) or table.keys() != fields.keys():
        raise ValueError(f"expected the keys {', '.join(fields)}")
    for name, value in table.items():
        if not (is_count(value) if fields[name] == "int" else isinstance(value, str)):
            raise ValueError(f"{name} = {value!r}; expected {'a count' if fields[name] == 'int' else 'a text'}")
    return kind(**table)


def common_fields(table: dict[str, Any]) -> tuple[dict[str, Any], int, int, list[Shard]]:
    """Checks what a manifest and a progress file have in common: settings, text_bytes, skipped and shards.

    Raises:
        ValueError: one is missing, or has another type.
    """
    settings, shards = table.get("settings"), table.get("shards")
    if not isinstance(settings, dict) or not isinstance(shards, list):
        raise ValueError("expected an object 'settings' and a list 'shards'")
    settings = {"source": {}, "tokenizer": "gpt2", **settings}
    if not isinstance(settings["source"], dict):
        raise ValueError("the source is not an object")
    if settings["tokenizer"] not in get_args(TokenizerName):
        raise ValueError(f"the tokenizer {settings['tokenizer']!r} is not one of {', '.join(get_args(TokenizerName))}")
    counts = [table.get("text_bytes"), table.get("skipped")]
    if not all(map(is_count, counts)):
        raise ValueError(f"text_bytes and skipped are {counts}; expected counts")
    text_bytes, skipped = counts
    assert text_bytes is not None
    assert skipped is not None
    return settings, text_bytes, skipped, [from_table(Shard, shard) for shard in shards]


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
        settings, text_bytes, skipped, shards = common_fields(table)
        return Manifest(settings, text_bytes, skipped, tuple(shards))


def saved_settings(directory: Path) -> dict[str, Any]:
    """Reads the settings in a directory's manifest or progress file; empty if it has neither.

    Raises:
        UserError: the file is damaged.
    """
    for path in (directory / MANIFEST, directory / PROGRESS):
        if table := read_json(path):
            with report_damage(path):
                return common_fields(table)[0]
    return {}


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads the object in a JSON file; None if the file does not exist."""
    with report_damage(path):
        if not path.exists():
            return None
        table = parse_json(read_text(path, MAX_JSON_BYTES))
        if not isinstance(table, dict):
            raise ValueError(f"it holds {type(table).__name__}")
        return table


@contextlib.contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """Turns errors of reading or interpreting a JSON file into a `UserError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}); prepare the directory again, in another --out"
        ) from error


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
        check_sha256(path, found, shard.sha256)


def check_sha256(path: Path, found: str, listed: str) -> None:
    """Checks that a token file has the content that its manifest lists.

    Raises:
        UserError: it has another SHA-256.
    """
    if found != listed:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, but the manifest has {listed[:12]}…; copy or "
            "prepare it again"
        )
