"""Datasets that `prepare` knows by name: text streamed from the Hugging Face hub, Shakespeare, and FineWeb's tokens.

Text comes through the `datasets` library as streamed Parquet, which needs no disk for the text and runs no code of
the dataset. The revision is looked up once and kept, so that an interrupted run goes on with the same documents.
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

from gpt2_jax.data.corpus import WHERE_TO_GET
from gpt2_jax.data.prepared import Manifest, Shard, Side, read_manifest, sha256
from gpt2_jax.data.shards import open_tokens
from gpt2_jax.data.sources import BLOCK_BYTES, Block, Source, import_extra
from gpt2_jax.data.tokenizer import GPT2_VOCAB_SIZE
from gpt2_jax.errors import UserError
from gpt2_jax.files import replace_text

OFFLINE = (
    "without network, prepare on another machine and copy the directory, or download the Parquet files there and give "
    "them instead of the name"
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of text on the hub.

    Attributes:
        repository: its name there.
        subset: of its configurations, None for the only one.
        about: what it is, for the help.
        splits: its splits and where their documents belong; None lets a hash of each decide.
        val_fraction: share of those documents that is held out.
    """

    repository: str
    subset: str | None
    about: str
    splits: tuple[tuple[str, Side | None], ...] = (("train", None),)
    val_fraction: float = 0.01


# Nearly all GPT-2 reproductions train on a sample of 10 B tokens, of which llm.c holds 100 M out; as many here.
DATASETS = {
    "fineweb-edu-10b": Dataset("HuggingFaceFW/fineweb-edu", "sample-10BT", "10 B tokens of educational web pages"),
    "fineweb-edu-100b": Dataset("HuggingFaceFW/fineweb-edu", "sample-100BT", "100 B of them", val_fraction=0.001),
    "fineweb-10b": Dataset("HuggingFaceFW/fineweb", "sample-10BT", "10 B tokens of web pages"),
    "fineweb-100b": Dataset("HuggingFaceFW/fineweb", "sample-100BT", "100 B of them", val_fraction=0.001),
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


class Hub(Source):
    """The documents of a dataset, streamed.

    Args:
        name: in `DATASETS`.
        field: column of the text.
        val_fraction: None for the dataset's own.
        revision: of an interrupted run; None looks the newest up.

    Raises:
        UserError: the hub is not to be reached, or `datasets` is not installed.
    """

    def __init__(self, name: str, field: str, val_fraction: float | None, revision: str | None) -> None:
        self._dataset, self._field, self._name = DATASETS[name], field, name
        self._load = import_extra("datasets", f"reading {name}").load_dataset
        self.val_fraction = self._dataset.val_fraction if val_fraction is None else val_fraction
        repository = self._dataset.repository
        self._revision = revision or _online(repository, lambda: _info(repository).sha)
        self.identity = {"dataset": repository, "subset": self._dataset.subset, "revision": self._revision}
        self.identity["field"] = field
        self._streams = [_online(repository, functools.partial(self._open, split)) for split, _ in self._dataset.splits]
        counts = [
            self._rows(stream, split) for stream, (split, _) in zip(self._streams, self._dataset.splits, strict=True)
        ]
        self.total = sum(counts) if all(counts) else 0

    def _open(self, split: str) -> Any:
        dataset = self._dataset
        return self._load(dataset.repository, dataset.subset, split=split, streaming=True, revision=self._revision)

    @staticmethod
    def _rows(stream: Any, split: str) -> int:
        """Documents of a split, 0 if its description does not say."""
        info = (stream.info.splits or {}).get(split)
        return info.num_examples or 0 if info else 0

    def blocks(self, cursor: Any) -> Iterator[Block]:
        """As `Source.blocks`; a cursor is the split, the state of its stream, documents in it, documents in all."""
        first, state, row, read = cursor or (0, None, 0, 0)
        for number in range(first, len(self._streams)):
            split, side = self._dataset.splits[number]
            try:
                stream = self._streams[number].select_columns([self._field])
            except ValueError as error:
                raise UserError(f"{self._name}: {error}; type --field with one of its columns") from error
            if state is not None:
                stream.load_state_dict(state)
            where, documents = f"{self._name}, {split}", iter(stream)
            texts: list[Any] = []
            size, ended = 0, False
            while not ended:
                try:
                    text = next(documents)[self._field]
                    texts.append(text)
                    size += len(text) if isinstance(text, str) else 0
                except StopIteration:
                    ended = True
                except Exception as error:  # of the network or the hub: `datasets` promises no type
                    raise _unreachable(self._dataset.repository, error) from error
                if texts and (ended or size >= BLOCK_BYTES):
                    position = row + len(texts)
                    read += len(texts)
                    cursor = [number, stream.state_dict(), position, read]
                    yield Block("texts", texts, where, row + 1, side, cursor, read)
                    row, texts, size = position, [], 0
            state, row = None, 0


def _info(repository: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repository, files_metadata=True)


def _online(repository: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # whatever the HTTP stack raises: the libraries promise no type
        raise _unreachable(repository, error) from error


def _unreachable(repository: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{repository} cannot be read from the hub ({type(error).__name__}: {reason}); {OFFLINE}")


def download_shakespeare(directory: Path) -> Path:
    """The file of all small Shakespeare experiments, in `directory`.

    Raises:
        UserError: it cannot be downloaded, or is not what it was.
    """
    path = directory / SHAKESPEARE
    source = WHERE_TO_GET[SHAKESPEARE]
    if path.exists():
        content, where = path.read_bytes(), str(path)
    else:
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                content, where = response.read(), source
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{source} cannot be downloaded ({reason}); without network, copy it to {path}") from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{where} is not the known file, but {len(content):,} other bytes; copy that to {path}")
    if not path.exists():
        replace_text(path, content.decode("utf-8"))
    return path


def download_tokenized(directory: Path, limit: int, say: Callable[[str], None]) -> Manifest:
    """FineWeb's token files in llm.c's format, as they are: validation, and training up to `limit` tokens (0: all).

    Files that are there already are not downloaded again; every one is compared with the hub's checksum.

    Raises:
        UserError: the hub is not to be reached, or a file is damaged.
    """
    from huggingface_hub import hf_hub_download

    before = read_manifest(directory)
    foreign = [path.name for path in directory.glob("*.bin") if not path.name.startswith("fineweb_")]
    if foreign or (before and before.settings["source"].get("dataset") != TOKENIZED):
        raise UserError(f"{directory} holds {foreign[0] if foreign else 'other tokens'} already; give another --out")
    info = _online(TOKENIZED, lambda: _info(TOKENIZED))
    files = {file.rfilename: file for file in info.siblings if file.rfilename.endswith(".bin")}
    names = sorted(files, key=lambda name: ("_val_" not in name, name))
    shards: list[Shard] = []
    tokens = 0
    for name in names:
        path = directory / name
        if "_val_" not in name and limit and tokens >= limit and not path.exists():
            continue
        say(name)
        expected = files[name].lfs.sha256
        if not path.exists():
            where = {"repo_type": "dataset", "revision": info.sha, "local_dir": directory}
            _online(TOKENIZED, functools.partial(hf_hub_download, TOKENIZED, name, **where))
        found = sha256(path)
        if found != expected:
            raise UserError(f"{path} is damaged: its SHA-256 is not the hub's; remove it, and type the same command")
        stream = open_tokens(path)
        documents = sum(int(np.count_nonzero(piece == GPT2_VOCAB_SIZE - 1)) for piece in stream.pieces())
        shards.append(Shard(name, len(stream), documents, found))
        tokens += 0 if "_val_" in name else len(stream)
    if not shards:
        raise UserError(f"{TOKENIZED} has no token files any more; prepare fineweb-10b instead")
    settings = {"source": {"dataset": TOKENIZED, "revision": info.sha}, "tokenizer": "gpt2"}
    return Manifest(settings, 0, 0, tuple(sorted(shards, key=lambda shard: shard.file)))
