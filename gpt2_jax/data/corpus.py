"""Reads text to train on, and splits it: the user's files, or the standard library of the running Python.

The standard library is about 10 MB of real text that needs no download.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.activity import tracked
from gpt2_jax.config import DataConfig
from gpt2_jax.data.encode import encode_document
from gpt2_jax.data.tokenizer import Tokenizer, end_of_text, get_tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.files import find_paths

STDLIB = "stdlib"
# Tests, third-party packages, and generated files: code pages, help texts, character tables, build settings.
STDLIB_EXCLUDED_FOLDERS = re.compile(r"tests?|idle_test|(site|dist)-packages|lib2to3|encodings|pydoc_data|__pycache__")
STDLIB_EXCLUDED_FILES = re.compile(r"html/entities\.py|_sysconfigdata.*")

DOWNLOADS = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text as bytes, and its name, which decides whether it is held out."""

    name: str
    content: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training documents and held-out documents."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """The tokens of a corpus.

    Attributes:
        train: uint16 [tokens].
        val: uint16 [tokens].
        val_text: the held-out bytes that `val` predicts.
        tokenizer: made the tokens.
        documents: the names of the training documents, each with the number of tokens before it in `train`.
    """

    train: np.ndarray
    val: np.ndarray
    val_text: bytes
    tokenizer: Tokenizer
    documents: tuple[tuple[str, int], ...]


def read_corpus(config: DataConfig) -> Corpus:
    """Reads the documents of `data.text` and splits them.

    A single file is split near its end. Several files are split by a hash of their names, relative to their common
    folder, so a file stays in its split when others are added or removed.

    Raises:
        UserError: no file matches, all files are empty, or a file cannot be read.
    """
    if config.text == STDLIB:
        return split_by_name(_read_documents(stdlib_files()), config.val_fraction)
    paths = match_files(config.text, "data.text")
    if not paths:
        name = Path(config.text).name
        advice = f"curl -o {name} {DOWNLOADS[name]}" if name in DOWNLOADS else "--data.text FILE_OR_GLOB"
        raise UserError(f"data.text = {config.text!r} matches no file; type {advice}")
    documents = _read_documents(name_files(paths))
    if not documents:
        raise UserError(f"data.text = {config.text!r} is empty; give files with text in them")
    if len(documents) > 1:
        return split_by_name(documents, config.val_fraction)
    return _split_single(documents[0], config)


def match_files(pattern: str, name: str) -> list[str]:
    """Finds the files that match a glob. The path of an existing file matches only that file, even with `*` in it.

    Args:
        name: the flag or the config key that the pattern comes from, for errors.

    Raises:
        UserError: no file can have this path, or it is that of a FIFO, a socket or a device.
    """
    return [str(path) for path in find_paths(pattern, name) if path.is_file()]


def name_files(paths: Iterable[str]) -> dict[str, Path]:
    """Maps names relative to the common folder to the files, sorted. A name has `/` between folders on every system."""
    found = {os.path.abspath(path) for path in paths}
    try:
        root = os.path.dirname(*found) if len(found) == 1 else os.path.commonpath(found)
    except ValueError:  # drives of Windows have nothing in common
        root = ""
    names = {Path(os.path.relpath(path, root) if root else path).as_posix(): Path(path) for path in found}
    return dict(sorted(names.items()))


def _read_documents(paths: dict[str, Path]) -> list[Document]:
    """Reads the files of {name: path} that are not empty, without byte order marks."""
    try:
        documents = [Document(name, path.read_bytes().removeprefix(codecs.BOM_UTF8)) for name, path in paths.items()]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    return [document for document in documents if document.content]


def held_out_names(names: Sequence[str], val_fraction: float) -> set[str]:
    """Selects the names whose `hash_fraction` is below `val_fraction`, but at least one and not all."""

    def fraction(name: str) -> float:
        return hash_fraction(name.encode("utf-8", "surrogateescape"))

    ordered = sorted(names, key=lambda name: (fraction(name), name))
    n_val = sum(fraction(name) < val_fraction for name in ordered)
    return set(ordered[: min(max(n_val, 1), len(ordered) - 1)])


def hash_fraction(data: bytes) -> float:
    """Hashes bytes to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def split_by_name(documents: Sequence[Document], val_fraction: float) -> Corpus:
    """Holds out the documents of `held_out_names`."""
    held_out = held_out_names([document.name for document in documents], val_fraction)
    return Corpus(
        train=tuple(document for document in documents if document.name not in held_out),
        val=tuple(document for document in documents if document.name in held_out),
    )


def _split_single(document: Document, config: DataConfig) -> Corpus:
    """Holds out the last `val_fraction` of the characters (for the bytes tokenizer: of the bytes), like nanoGPT."""
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
    """Maps names relative to the standard library's folder to its source files, sorted.

    Raises:
        UserError: this Python has no library sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        # Prunes the walk: site-packages may be huge.
        folders[:] = [name for name in folders if not STDLIB_EXCLUDED_FOLDERS.fullmatch(name)]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    ordered = sorted(files, key=lambda name: name.split("/"))
    files = {name: files[name] for name in ordered if not STDLIB_EXCLUDED_FILES.fullmatch(name)}
    if not files:
        raise UserError(f"this Python has no library sources in {root}; type --data.text FILE_OR_GLOB")
    return files


def tokenize(corpus: Corpus, config: DataConfig) -> TokenizedCorpus:
    """Tokenizes a corpus. An end-of-text token precedes each document if the tokenizer has one.

    Raises:
        UserError: a document is not UTF-8, or has a character that is not in `data.characters`.
    """
    characters = config.characters
    if config.tokenizer == "chars" and not characters:
        used: set[str] = set()
        for document in corpus.train + corpus.val:
            used.update(document.content.decode("utf-8", "replace"))
        if len(used) > 1 << 16:
            raise UserError(
                f"the text has {len(used):,} different characters, and token files have room for "
                "65,536; type --data.tokenizer bytes"
            )
        characters = "".join(sorted(used))
    tokenizer = get_tokenizer(config.tokenizer, characters)

    val_text = b"".join(document.content for document in corpus.val)
    if end_of_text(tokenizer) is None:  # nothing precedes the first character, so it is not predicted
        val_text = val_text.decode("utf-8", "replace")[1:].encode()
    texts = [*corpus.train, *corpus.val]
    total = sum(len(document.content) for document in texts)
    tokens = [
        encode_document(tokenizer, document.content, document.name)
        for document in tracked(texts, total, lambda document: len(document.content))
    ]
    train, val = tokens[: len(corpus.train)], tokens[len(corpus.train) :]
    names = [document.name for document in corpus.train]
    documents = tuple(zip(names, itertools.accumulate(map(len, train), initial=0), strict=False))
    return TokenizedCorpus(np.concatenate(train), np.concatenate(val), val_text, tokenizer, documents)
