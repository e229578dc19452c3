"""Writes a directory of token files, and resumes one that is unfinished.

After a kill, a full disk or a lost connection, the next writer resumes after the last block recorded in
`progress.json`. The finished files are the same byte for byte as without the interruption.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt2_jax.data.manifest import (
    MANIFEST,
    PARTIAL,
    PROGRESS,
    SPLITS,
    Manifest,
    Shard,
    Split,
    common_fields,
    from_table,
    read_json,
    report_damage,
    sha256,
)
from gpt2_jax.data.shards import HEADER_BYTES, header_bytes
from gpt2_jax.errors import UserError
from gpt2_jax.files import replace_text


@dataclasses.dataclass
class _OpenShard:
    """The unfinished shard of a split."""

    number: int = 0
    tokens: int = 0
    documents: int = 0


class ShardWriter:
    """Writes a directory of token files, and resumes one that another writer left unfinished.

    Use it as a context manager: `append` tokens, call `save_progress` now and then, and at the end `finish`.

    Attributes:
        cursor: the position in the source after the last saved token; None at the start.
        text_bytes: the number of bytes in the documents so far.
        skipped: the number of documents left out so far.
        shards: the finished files.
        finished: True if the directory already has its manifest.

    Args:
        directory: an existing directory.
        settings: the source and the options, in JSON types. They must equal those of the previous writer.
        shard_tokens: tokens in each file except the last of a split.
        end_of_text: the token that precedes each document.

    Raises:
        UserError: the directory was made with other settings, has lost files, or has files of another command.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], shard_tokens: int, end_of_text: int) -> None:
        self.directory, self.settings = directory, settings
        self.cursor: Any = None
        self.text_bytes = self.skipped = 0
        self.shards: list[Shard] = []
        self.finished = False
        self._shard_tokens, self._end_of_text = shard_tokens, end_of_text
        self._open: dict[Split, _OpenShard] = {split: _OpenShard() for split in SPLITS}
        self._files: dict[Split, BinaryIO] = {}
        for name in (MANIFEST, PROGRESS):
            if table := read_json(directory / name):
                with report_damage(directory / name):
                    self._resume(table, finished=name == MANIFEST)
                self._check_files()
                return
        if foreign := sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".npy")):
            raise UserError(f"{directory} has {foreign[0]}, which this command did not write; give another --out")

    def _resume(self, table: dict[str, Any], finished: bool) -> None:
        """Restores the state of the previous writer from its progress file or manifest."""
        settings, text_bytes, skipped, shards = common_fields(table)
        theirs, ours = _flatten(settings), _flatten(self.settings)
        changed = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if changed:
            shown = [f"{key:.100}: {theirs.get(key)!r:.200} -> {ours.get(key)!r:.200}" for key in changed[:8]]
            listed = "; ".join([*shown, *["…"] * (len(changed) > len(shown))])
            raise UserError(
                f"{self.directory} was made with another source or other options ({listed}); use those again, or give "
                "another --out"
            )
        self.finished, self.text_bytes, self.skipped, self.shards = finished, text_bytes, skipped, shards
        if not finished:
            opened = table.get("open")
            if not isinstance(opened, dict) or "cursor" not in table:
                raise ValueError("expected 'cursor' and an object 'open'")
            self.cursor = table["cursor"]
            self._open = {split: from_table(_OpenShard, opened.get(split)) for split in SPLITS}
            if any(shard.tokens > self._shard_tokens for shard in self._open.values()):
                raise ValueError(f"an open file has more than {self._shard_tokens:,} tokens")

    def _check_files(self) -> None:
        """Checks that every recorded file exists and is long enough."""
        sizes = {self.directory / shard.file: HEADER_BYTES + 2 * shard.tokens for shard in self.shards}
        for split, shard in self._open.items():
            if shard.tokens:
                complete = self.directory / self._name(split)  # exists if completed after the last save
                path = complete if complete.exists() else complete.with_name(complete.name + PARTIAL)
                sizes[path] = HEADER_BYTES + 2 * shard.tokens
        for path, size in sizes.items():
            if not path.exists() or path.stat().st_size < size:
                problem = "too short" if path.exists() else "missing"
                raise UserError(
                    f"{path} is {problem}; restore it, or remove {self.directory} and type the same command"
                )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the unfinished files. Progress that was not saved is lost."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def tokens(self) -> int:
        """The number of tokens so far."""
        return sum(shard.tokens for shard in self.shards) + sum(shard.tokens for shard in self._open.values())

    def documents(self) -> int:
        """The number of documents so far."""
        return sum(shard.documents for shard in self.shards) + sum(shard.documents for shard in self._open.values())

    def append(self, split: Split, tokens: np.ndarray) -> None:
        """Appends uint16 [tokens] to a split."""
        while tokens.size:
            shard = self._open[split]
            fitting, tokens = np.split(tokens, [self._shard_tokens - shard.tokens])
            self._file(split).write(fitting.astype("<u2", copy=False).data)
            shard.tokens += fitting.size
            shard.documents += int(np.count_nonzero(fitting == self._end_of_text))
            if shard.tokens == self._shard_tokens:
                self._complete(split)

    def save_progress(self, cursor: Any) -> None:
        """Syncs the files to disk, then records their state and the position in the source, in JSON types."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.cursor = cursor
        progress = {
            "settings": self.settings,
            "cursor": cursor,
            "text_bytes": self.text_bytes,
            "skipped": self.skipped,
            "open": {split: dataclasses.asdict(shard) for split, shard in self._open.items()},
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        replace_text(self.directory / PROGRESS, json.dumps(progress, indent=2) + "\n")

    def finish(self) -> Manifest:
        """Completes the last shards and writes the manifest."""
        for split in SPLITS:
            if self._open[split].tokens:
                self._complete(split)
        shards = tuple(sorted(self.shards, key=lambda shard: shard.file))
        manifest = Manifest(self.settings, self.text_bytes, self.skipped, shards)
        if not self.finished:
            replace_text(self.directory / MANIFEST, manifest.to_json())
        (self.directory / PROGRESS).unlink(missing_ok=True)
        return manifest

    def discard(self) -> None:
        """Removes all files of a directory in which no tokens are recorded."""
        self.close()
        for split in SPLITS:
            for path in [*self.directory.glob(f"{split}_*.bin"), *self.directory.glob(f"{split}_*.bin{PARTIAL}")]:
                path.unlink()
        (self.directory / PROGRESS).unlink(missing_ok=True)

    def _name(self, split: Split) -> str:
        return f"{split}_{self._open[split].number:06d}.bin"

    def _file(self, split: Split) -> BinaryIO:
        """The partial file of a split. Opening it truncates it to its recorded tokens."""
        if split not in self._files:
            shard, path = self._open[split], self.directory / self._name(split)
            partial = path.with_name(path.name + PARTIAL)
            if path.exists():  # completed after the last save
                path.replace(partial)
            size = HEADER_BYTES + 2 * shard.tokens
            if not shard.tokens:
                partial.write_bytes(header_bytes(0))
            file = open(partial, "r+b")  # noqa: SIM115
            file.truncate(size)
            file.seek(size)
            self._files[split] = file
        return self._files[split]

    def _complete(self, split: Split) -> None:
        """Writes the header of the unfinished shard and gives it its final name."""
        file, shard, path = self._file(split), self._open[split], self.directory / self._name(split)
        file.seek(0)
        file.write(header_bytes(shard.tokens))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        del self._files[split]
        partial = path.with_name(path.name + PARTIAL)
        self.shards.append(Shard(path.name, shard.tokens, shard.documents, sha256(partial)))
        partial.replace(path)
        self._open[split] = _OpenShard(shard.number + 1)


def _flatten(table: dict[str, Any]) -> dict[str, Any]:
    """Merges the settings of the source into the other settings."""
    return {**table, **table.get("source", {}), "source": None}
