"""The contents of token files as SHA-256, so that a run notices files that changed, also in the middle.

A digest comes from the first of these that knows it: the manifest of `prepare`, if the file is not newer; an earlier
start of the run, if size, time and inode are the same; process 0, if they are the same there; the file itself. Hashing
takes about a second per gigabyte, so large files are hashed in the background while the run trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from gpt2_jax.activity import tracked
from gpt2_jax.data.manifest import MANIFEST, check_sha256, from_table, read_json, read_manifest, require_sha256, sha256
from gpt2_jax.errors import UserError
from gpt2_jax.files import replace_text

FOREGROUND_BYTES = 1 << 27  # Hashed at once: 0.14 s on an AMD EPYC.

KEPT = "data*.json"  # The files of a run directory that keep digests, one per process that hashed.

Identity = tuple[int, int, int]
"""Size, modification time in nanoseconds, and inode: equal for a file that was not written since."""


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a run directory keeps about a token file."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    sha256: str

    def __post_init__(self) -> None:
        require_sha256(self.sha256)


class _Listing:
    """The digests in a directory's manifest, and when it was written: later than the files that it lists."""

    def __init__(self, directory: Path) -> None:
        manifest = read_manifest(directory)
        self.sha256 = {shard.file: shard.sha256 for shard in manifest.shards} if manifest else {}
        self.mtime_ns = _identity(directory / MANIFEST)[1] if manifest else 0


class Contents:
    """The digests of the token files of a run.

    Attributes:
        paths: the files, in a fixed order.
        sha256: their digests; None while unknown.

    Args:
        paths: the files.
        directory: the run directory, which keeps the digests of files that were hashed.
        process: the number of this process. Each keeps a file of its own, and reads those of all.

    Raises:
        UserError: a file or a manifest cannot be read.
    """

    def __init__(self, paths: Sequence[Path], directory: Path, process: int) -> None:
        self.paths = paths
        self._store = directory / ("data.json" if process == 0 else f"data-{process}.json")
        self._identities = [_identity(path) for path in paths]
        kept = _read_kept(directory)
        listings = {folder: _Listing(folder) for folder in {path.parent for path in paths}}
        self._listed = [listings[path.parent].sha256.get(path.name) for path in paths]  # to compare with
        self.sha256: list[str | None] = []
        for path, identity, listed in zip(paths, self._identities, self._listed, strict=True):
            trusted = listed and identity[1] <= listings[path.parent].mtime_ns
            self.sha256.append(listed if trusted else kept.get(identity))
        self._elsewhere = [False] * len(paths)  # the same file as that of process 0, which hashes it

    def state(self) -> str:
        """What other processes compare: JSON of [size, time, inode, digest or null] for each file."""
        pairs = zip(self._identities, self.sha256, strict=True)
        return json.dumps([[*identity, digest] for identity, digest in pairs])

    def agree(self, state: str) -> None:
        """Takes over what process 0 knows of the same files, and compares the rest.

        Args:
            state: of process 0.

        Raises:
            UserError: a file has another content there.
        """
        for number, (*identity, theirs) in enumerate(json.loads(state)[: len(self.paths)]):
            ours = self.sha256[number]
            self._elsewhere[number] = tuple(identity) == self._identities[number]
            if self._elsewhere[number]:
                self.sha256[number] = ours or theirs
            elif ours and theirs and ours != theirs:
                raise UserError(
                    f"the data differs from process 0: {self.paths[number]} has the SHA-256 {ours[:12]}… here, "
                    f"{theirs[:12]}… on process 0; copy the same files to every host"
                )

    def check(self, trained_on: Sequence[str | None], out: Path) -> list[str | None]:
        """Compares the digests, as far as they are known, with those of manifests and of a checkpoint.

        Args:
            trained_on: the result at an earlier checkpoint; empty if there was none.
            out: the run directory, for the error.

        Returns:
            The digests that are known now or were known then.

        Raises:
            UserError: a file has another content.
        """
        digests = list(self.sha256)  # a copy, as the background adds to them
        for number, (path, found, listed) in enumerate(zip(self.paths, digests, self._listed, strict=True)):
            if found and listed:
                check_sha256(path, found, listed)
            before = trained_on[number] if number < len(trained_on) else None
            if found and before and found != before:
                raise UserError(
                    f"the data of {out} has changed: the SHA-256 of {path} is {found[:12]}…, and was {before[:12]}… "
                    "when the run was trained on it; restore the old data, or train in another --out"
                )
            digests[number] = found or before
        return digests

    def hash_rest(self) -> int:
        """Hashes the files that are not known, except those that process 0 hashes.

        Returns:
            The number of bytes that are left to a thread in the background; 0 if all are hashed.
        """
        numbers = [n for n, digest in enumerate(self.sha256) if digest is None and not self._elsewhere[n]]
        size = sum(self._identities[number][0] for number in numbers)
        if size <= FOREGROUND_BYTES:
            self._hash(numbers)
            return 0
        threading.Thread(target=self._hash, args=(numbers, True), daemon=True).start()
        return size

    def _hash(self, numbers: Sequence[int], in_background: bool = False) -> None:
        """Hashes files and keeps each digest. A file that changes meanwhile or cannot be read stays unknown."""
        if in_background and sys.platform == "linux":  # elsewhere a thread has no priority under its number
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        sizes = {number: self._identities[number][0] for number in numbers}
        for number in tracked(numbers, sum(sizes.values()), sizes.__getitem__):
            with contextlib.suppress(OSError, UserError):
                digest = sha256(self.paths[number])
                if _identity(self.paths[number]) == self._identities[number]:
                    self.sha256[number] = digest
            if in_background or number == numbers[-1]:
                self._keep()

    def _keep(self) -> None:
        rows = [
            dataclasses.asdict(_Kept(str(path), *identity, digest))
            for path, identity, digest in zip(self.paths, self._identities, self.sha256, strict=True)
            if digest
        ]
        with contextlib.suppress(OSError):  # it is only hashed again
            replace_text(self._store, json.dumps({"files": rows}, indent=1) + "\n")


def _identity(path: Path) -> Identity:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read_kept(directory: Path) -> dict[Identity, str]:
    """The digests that earlier starts of a run kept. A damaged file knows none: the digests are computed again."""
    kept: dict[Identity, str] = {}
    for path in sorted(directory.glob(KEPT)):
        with contextlib.suppress(UserError, ValueError, TypeError):
            for table in (read_json(path) or {}).get("files", []):
                row = from_table(_Kept, table)
                kept[row.size, row.mtime_ns, row.inode] = row.sha256
    return kept
