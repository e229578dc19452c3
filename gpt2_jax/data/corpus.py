"""Text to train on: the user's files, or the standard library of the running Python.

The standard library is there wherever this package runs: about 10 MB of real text that needs no download.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.config import DataConfig
from gpt2_jax.data.encode import encode_document
from gpt2_jax.data.tokenizer import Tokenizer, end_of_text, get_tokenizer
from gpt2_jax.errors import UserError

STDLIB = "stdlib"
# Tests, third-party packages, and what programs wrote: code pages, help texts, character tables, build settings.
STDLIB_WITHOUT_FOLDERS = re.compile(r"tests?|idle_test|(site|dist)-packages|lib2to3|encodings|pydoc_data|__pycache__")
STDLIB_WITHOUT = re.compile(r"html/entities\.py|_sysconfigdata.*")

WHERE_TO_GET = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text: its name, which decides whether it is held out, and its bytes."""

    name: str
    content: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on and held-out ones."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """The two streams of tokens (uint16), their tokenizer, and the held-out bytes that `val` predicts."""

    train: np.ndarray
    val: np.ndarray
    val_text: bytes
    tokenizer: Tokenizer


def read_corpus(config: DataConfig) -> Corpus:
    """The documents of `data.text`, split.

    Of several files those with the smallest hashes of their names (below their common folder) are held out,
    `val_fraction` of them: a file stays on its side when others come and go. Of one file the end is held out.

    Raises:
        UserError: no file matches, or a file is empty or cannot be read.
    """
    if config.text == STDLIB:
        return split_by_name(_read(stdlib_files()), config.val_fraction)
    pattern = os.path.expanduser(config.text)
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted(path for path in found if os.path.isfile(path))
    if not paths:
        source = WHERE_TO_GET.get(Path(pattern).name)
        advice = f"curl -o {Path(pattern).name} {source}" if source else "--data.text FILE_OR_GLOB"
        raise UserError(f"data.text = {config.text!r} matches no file; type {advice}")
    documents = _read(by_name(paths))
    if not documents:
        raise UserError(f"data.text = {config.text!r} is empty; give files with text in them")
    if len(documents) > 1:
        return split_by_name(documents, config.val_fraction)
    return _split_end(documents[0], config)


def by_name(paths: Iterable[str]) -> dict[str, Path]:
    """Files by their names below their common folder, in order."""
    ordered = sorted({os.path.abspath(path) for path in paths})
    root = os.path.dirname(ordered[0]) if len(ordered) == 1 else os.path.commonpath(ordered)
    return {os.path.relpath(path, root): Path(path) for path in ordered}


def _read(paths: dict[str, Path]) -> list[Document]:
    """The documents of {name: path} that have content."""
    try:
        documents = [Document(name, path.read_bytes()) for name, path in paths.items()]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    return [document for document in documents if document.content]


def held_out_names(names: Sequence[str], val_fraction: float) -> set[str]:
    """Those whose hashes fall into the first `val_fraction` of all hashes; at least one is on either side."""

    def share(name: str) -> float:
        return hashed_share(name.encode("utf-8", "surrogateescape"))

    ordered = sorted(names, key=lambda name: (share(name), name))
    n_val = sum(share(name) < val_fraction for name in ordered)
    return set(ordered[: min(max(n_val, 1), len(ordered) - 1)])


def hashed_share(data: bytes) -> float:
    """A number in [0, 1) that looks random and depends on the bytes alone."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def split_by_name(documents: Sequence[Document], val_fraction: float) -> Corpus:
    """Holds out the documents of `held_out_names`."""
    held_out = held_out_names([document.name for document in documents], val_fraction)
    return Corpus(
        train=tuple(document for document in documents if document.name not in held_out),
        val=tuple(document for document in documents if document.name in held_out),
    )


def _split_end(document: Document, config: DataConfig) -> Corpus:
    """As nanoGPT splits: the first characters (or bytes) train, the last `val_fraction` of them validates."""
    if config.tokenizer == "bytes":
        whole: bytes | str = document.content
    else:
        try:
            whole = document.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{document.name} is not UTF-8 text (byte {error.start}); convert it, or type --data.tokenizer bytes"
            ) from error
    cut = int(len(whole) * (1 - config.val_fraction))
    parts = [part.encode() if isinstance(part, str) else part for part in (whole[:cut], whole[cut:])]
    train, val = (Document(document.name, part) for part in parts)
    return Corpus((train,), (val,))


def stdlib_files() -> dict[str, Path]:
    """The sources of the standard library by their names below its folder, in order.

    Raises:
        UserError: this Python has none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        # Not even looked into: site-packages may be huge.
        folders[:] = [name for name in folders if not STDLIB_WITHOUT_FOLDERS.fullmatch(name)]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    ordered = sorted(files, key=lambda name: name.split("/"))
    files = {name: files[name] for name in ordered if not STDLIB_WITHOUT.fullmatch(name)}
    if not files:
        raise UserError(f"this Python has no library sources in {root}; type --data.text FILE_OR_GLOB")
    return files


def tokenize(corpus: Corpus, config: DataConfig) -> TokenizedCorpus:
    """The two token streams of a corpus, end-of-text before each document where the tokenizer has one.

    Raises:
        UserError: a document is not what the tokenizer takes.
    """
    characters = config.characters
    if config.tokenizer == "chars" and not characters:
        used: set[str] = set()
        for document in corpus.train + corpus.val:
            used.update(document.content.decode("utf-8", "replace"))
        if len(used) > 1 << 16:
            raise UserError(
                f"the text has {len(used):,} different characters, more than 16 bits can number; type "
                "--data.tokenizer bytes"
            )
        characters = "".join(sorted(used))
    tokenizer = get_tokenizer(config.tokenizer, characters)

    def stream(documents: Sequence[Document]) -> np.ndarray:
        parts = [encode_document(tokenizer, document.content, document.name) for document in documents]
        return np.concatenate(parts)

    val_text = b"".join(document.content for document in corpus.val)
    if end_of_text(tokenizer) is None:  # then nothing stands before the first character to predict it from
        val_text = val_text.decode("utf-8", "replace")[1:].encode()
    return TokenizedCorpus(stream(corpus.train), stream(corpus.val), val_text, tokenizer)
