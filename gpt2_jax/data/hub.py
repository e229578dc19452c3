"""Datasets with a name in `prepare`: text streamed from the Hugging Face hub, Shakespeare, and tokenized FineWeb.

The `datasets` library streams text as Parquet, so it needs no disk space and runs no code of the dataset. The revision
is looked up once and saved, so that a resumed run reads the same documents.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.data.corpus import DOWNLOADS
from gpt2_jax.data.manifest import Manifest, Shard, Split, read_manifest, sha256
from gpt2_jax.data.shards import open_tokens
from gpt2_jax.data.sources import BLOCK_BYTES, Block, Source, checked_cursor
from gpt2_jax.data.tokenizer import end_of_text_token
from gpt2_jax.errors import UserError, import_optional, one_line
from gpt2_jax.files import check_hub_cache, replace_text

OFFLINE = (
    "without network, prepare on another machine and copy the directory, or download the Parquet files there and "
    "prepare those files"
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of text on the hub.

    Attributes:
        repository: its name on the hub.
        subset: its configuration; None if it has only one.
        description: text for --help.
        splits: pairs of a split on the hub and ours for its documents; None to choose by a hash of each document.
        val_fraction: the share of the documents that is held out, where a hash decides.
    """

    repository: str
    subset: str | None
    description: str
    splits: tuple[tuple[str, Split | None], ...] = (("train", None),)
    val_fraction: float = 0.01


# Most GPT-2 reproductions train on a sample of 10 B tokens. llm.c holds out 100 M of them, and so do these fractions.
DATASETS = {
    "fineweb-edu-10b": Dataset("HuggingFaceFW/fineweb-edu", "sample-10BT", "10 B tokens of educational web pages"),
    "fineweb-edu-100b": Dataset("HuggingFaceFW/fineweb-edu", "sample-100BT", "100 B such tokens", val_fraction=0.001),
    "fineweb-10b": Dataset("HuggingFaceFW/fineweb", "sample-10BT", "10 B tokens of web pages"),
    "fineweb-100b": Dataset("HuggingFaceFW/fineweb", "sample-100BT", "100 B such tokens", val_fraction=0.001),
    # nanoGPT holds out 0.05%.
    "openwebtext": Dataset("Skylion007/openwebtext", None, "9 B tokens, like GPT-2's own", val_fraction=0.0005),
    "tinystories": Dataset(
        "roneneldan/TinyStories",
        None,
        "0.5 B tokens of very simple stories",
        (("validation", "val"), ("train", "train")),
    ),
}

SHAKESPEARE = "tinyshakespeare.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TOKENIZED = "kjj0/fineweb10B-gpt2"


class HubSource(Source):
    """The documents of a dataset, streamed from the hub.

    Args:
        name: a key of `DATASETS`.
        field: the column with the text.
        val_fraction: None for the default of the dataset.
        revision: the revision that an unfinished run reads; None for the newest.

    Raises:
        UserError: the hub cannot be reached, or `datasets` is not installed.
    """

    def __init__(self, name: str, field: str, val_fraction: float | None, revision: str | None) -> None:
        self._dataset, self._field, self._name = DATASETS[name], field, name
        self._load = import_optional("datasets", f"reading {name}").load_dataset
        self.val_fraction = self._dataset.val_fraction if val_fraction is None else val_fraction
        repository = self._dataset.repository
        self._revision = revision or _from_hub(repository, lambda: _info(repository).sha)
        self.identity = {"dataset": repository, "subset": self._dataset.subset, "revision": self._revision}
        self.identity["field"] = field
        hub_splits = [hub_split for hub_split, _ in self._dataset.splits]
        self._streams = [_from_hub(repository, functools.partial(self._open, hub_split)) for hub_split in hub_splits]
        sizes = list(map(self._n_documents, self._streams, hub_splits))
        self.total = sum(sizes) if all(sizes) else 0

    def _open(self, hub_split: str) -> Any:
        dataset = self._dataset
        return self._load(dataset.repository, dataset.subset, split=hub_split, streaming=True, revision=self._revision)

    @staticmethod
    def _n_documents(stream: Any, hub_split: str) -> int:
        """The number of documents in a split; 0 if unknown."""
        info = (stream.info.splits or {}).get(hub_split)
        return info.num_examples or 0 if info else 0

    def blocks(self, cursor: Any) -> Iterator[Block]:
        """See `Source.blocks`. A cursor is [index of the split, stream state, documents read in it, documents read]."""
        first, state, row, total_read = checked_cursor(cursor, "count", "table", "count", "count") or (0, None, 0, 0)
        for number in range(first, len(self._streams)):
            hub_split, split = self._dataset.splits[number]
            try:
                stream = self._streams[number].select_columns([self._field])
            except ValueError as error:
                raise UserError(f"{self._name}: {error}; type --field with one of its columns") from error
            if state is not None:
                _from_hub(self._dataset.repository, functools.partial(stream.load_state_dict, state))
            origin, documents = f"{self._name}, {hub_split}", iter(stream)
            texts: list[Any] = []
            size, ended = 0, False
            while not ended:
                try:
                    text = next(documents)[self._field]
                    texts.append(text)
                    size += len(text) if isinstance(text, str) else 0
                except StopIteration:
                    ended = True
                except Exception as error:  # of the network or the hub: `datasets` does not document its type
                    raise _hub_error(self._dataset.repository, error) from error
                if texts and (ended or size >= BLOCK_BYTES):
                    first_row, row, total_read = row + 1, row + len(texts), total_read + len(texts)
                    cursor = [number, stream.state_dict(), row, total_read]
                    yield Block("texts", texts, origin, first_row, split, cursor, total_read)
                    texts, size = [], 0
            state, row = None, 0


def _info(repository: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repository, files_metadata=True)


def _from_hub(repository: str, call: Callable[[], Any]) -> Any:
    """Calls a function that needs the hub, and turns its errors into `UserError`s."""
    check_hub_cache(repository)
    try:
        return call()
    except Exception as error:  # of the HTTP stack: the libraries do not document its type
        raise _hub_error(repository, error) from error


def _hub_error(repository: str, error: Exception) -> UserError:
    return UserError(f"{repository} cannot be read from the hub ({type(error).__name__}: {one_line(error)}); {OFFLINE}")


def download_shakespeare(directory: Path) -> Path:
    """Downloads the file that all small Shakespeare experiments use into `directory`, unless it is there.

    Raises:
        UserError: the file cannot be downloaded, or has another content.
    """
    path = directory / SHAKESPEARE
    source = DOWNLOADS[SHAKESPEARE]
    if path.exists():
        content, origin = path.read_bytes(), str(path)
    else:
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                content, origin = response.read(), source
        except (OSError, http.client.HTTPException) as error:
            reason = one_line(error, None)
            raise UserError(f"{source} cannot be downloaded ({reason}); without network, copy it to {path}") from error
    if (found := hashlib.sha256(content).hexdigest()) != SHAKESPEARE_SHA256:
        raise UserError(
            f"{origin} is not the expected file: its SHA-256 is {found[:12]}…, expected {SHAKESPEARE_SHA256[:12]}…; "
            f"copy the right file to {path}"
        )
    if not path.exists():
        replace_text(path, content.decode("utf-8"))
    return path


def download_tokenized(directory: Path, limit: int, print_line: Callable[[str], None]) -> Manifest:
    """Downloads FineWeb's token files, which have llm.c's format: the validation file and training files.

    Existing files are not downloaded again. Every file is compared with its checksum on the hub.

    Args:
        directory: where the files go.
        limit: stop after the training file that reaches this many tokens; 0 for all.
        print_line: called with the name of each file.

    Raises:
        UserError: the hub cannot be reached, a file is damaged, or the directory has other token files.
    """
    from huggingface_hub import hf_hub_download

    before = read_manifest(directory)
    foreign = [path.name for path in directory.glob("*.bin") if not path.name.startswith("fineweb_")]
    if foreign or (before and before.settings["source"].get("dataset") != TOKENIZED):
        raise UserError(f"{directory} already has {foreign[0] if foreign else 'other tokens'}; give another --out")
    info = _from_hub(TOKENIZED, lambda: _info(TOKENIZED))
    files = {file.rfilename: file for file in info.siblings if file.rfilename.endswith(".bin")}
    names = sorted(files, key=lambda name: ("_val_" not in name, name))
    shards: list[Shard] = []
    tokens = 0
    for name in names:
        path = directory / name
        if "_val_" not in name and limit and tokens >= limit and not path.exists():
            continue
        print_line(name)
        expected = files[name].lfs.sha256
        if not path.exists():
            options = {"repo_type": "dataset", "revision": info.sha, "local_dir": directory}
            _from_hub(TOKENIZED, functools.partial(hf_hub_download, TOKENIZED, name, **options))
        found = sha256(path)
        if found != expected:
            raise UserError(f"{path} is damaged: its SHA-256 is not the hub's; remove it, and type the same command")
        file = open_tokens(path)
        documents = sum(int(np.count_nonzero(chunk == end_of_text_token("gpt2"))) for chunk in file.chunks())
        shards.append(Shard(name, len(file), documents, found))
        tokens += 0 if "_val_" in name else len(file)
    if not shards:
        raise UserError(f"{TOKENIZED} no longer has token files; prepare fineweb-10b instead")
    settings = {"source": {"dataset": TOKENIZED, "revision": info.sha}, "tokenizer": "gpt2"}
    return Manifest(settings, 0, 0, tuple(sorted(shards, key=lambda shard: shard.file)))
