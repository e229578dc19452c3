"""Tokenizes blocks in worker processes and yields the results in order."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gpt2_jax.config import TokenizerName
from gpt2_jax.data.corpus import hash_fraction
from gpt2_jax.data.encode import encoder, flaw, utf8
from gpt2_jax.data.manifest import SPLITS, Split
from gpt2_jax.data.sources import Block, Span
from gpt2_jax.data.tokenizer import Tokenizer, end_of_text, get_tokenizer
from gpt2_jax.errors import UserError

MAX_WORKERS = 61 if sys.platform == "win32" else 1024  # a process of Windows waits for 64 things at most

FIX_OR_SKIP = "fix it and give another --out, or type --on-error skip"


@dataclasses.dataclass(frozen=True)
class TokenizeOptions:
    """Options of tokenization.

    Attributes:
        tokenizer: its name.
        field: the field of JSON objects that has the text.
        val_fraction: the share of the documents that is held out, where a hash decides.
        skip_errors: leaves out a damaged document, instead of raising an error.
    """

    tokenizer: TokenizerName
    field: str
    val_fraction: float
    skip_errors: bool


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The tokens of a block.

    Attributes:
        train: uint16 [tokens].
        val: uint16 [tokens].
        text_bytes: the number of bytes in the documents.
        skipped: the number of documents that were left out.
    """

    train: np.ndarray
    val: np.ndarray
    text_bytes: int
    skipped: int


class BlockTokenizer:
    """A function from blocks to tokens."""

    def __init__(self, options: TokenizeOptions, tokenizer: Tokenizer) -> None:
        self._options, self._encode = options, encoder(tokenizer)
        self._end_of_text = np.array([end_of_text(tokenizer)], dtype=np.uint16)

    def __call__(self, block: Block) -> Tokenized:
        """Tokenizes a block.

        Raises:
            UserError: a document is damaged, and errors are not skipped.
        """
        parts: dict[Split, list[np.ndarray]] = {"train": [], "val": []}
        text_bytes, skipped = 0, block.skipped
        content = block.content.read() if isinstance(block.content, Span) else block.content
        if block.kind == "text":
            assert isinstance(content, bytes)
            text_bytes = len(content)
            tokens = self._tokens(content, block.origin)
            if isinstance(tokens, UserError):
                raise tokens
            parts[block.split or "train"] = [self._end_of_text[: int(block.starts_document)], tokens]
        for name, document in self._documents(block, content):
            tokens = document if isinstance(document, UserError) else self._tokens(document, name)
            if isinstance(tokens, UserError):
                if not self._options.skip_errors:
                    raise tokens
                skipped += 1
            elif document:
                assert isinstance(document, bytes)
                parts[block.split or self._split(document)] += [self._end_of_text, tokens]
                text_bytes += len(document)
        train, val = (np.concatenate([np.empty(0, np.uint16), *parts[split]]) for split in SPLITS)
        return Tokenized(train, val, text_bytes, skipped)

    def _split(self, document: bytes) -> Split:
        fraction = self._options.val_fraction
        return "val" if fraction > 0 and hash_fraction(document) < fraction else "train"

    def _tokens(self, document: bytes, name: str) -> np.ndarray | UserError:
        try:
            return self._encode(document)
        except ValueError as error:
            return UserError(f"{name} {flaw(error)}; correct it, leave it out, or type --on-error skip")

    def _documents(self, block: Block, content: bytes | list[Any]) -> Iterator[tuple[str, bytes | UserError]]:
        """Yields (name, document) of lines or texts, with an error in place of a damaged document."""
        field = self._options.field
        if block.kind == "text":
            return
        lines = content.split(b"\n") if isinstance(content, bytes) else content
        for number, line in enumerate(lines, block.first):
            name = f"{block.origin}, {'line' if block.kind == 'lines' else 'row'} {number}"
            document: Any = line
            if block.kind == "lines":
                if not line.strip():
                    continue
                try:
                    table = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield name, UserError(f"{name} is not JSON ({error}); {FIX_OR_SKIP}")
                    continue
                if not isinstance(table, dict) or field not in table:
                    found = f"the fields {', '.join(table)}" if isinstance(table, dict) else type(table).__name__
                    yield name, UserError(f"{name} has no field {field!r}, but {found}; type --field, or {FIX_OR_SKIP}")
                    continue
                document = table[field]
            if isinstance(document, str):
                yield name, utf8(document)
            elif isinstance(document, bytes):
                yield name, document
            else:
                yield name, UserError(f"{name}: {field} is {type(document).__name__}, not text; {FIX_OR_SKIP}")


def tokenize_blocks(
    blocks: Iterable[Block], options: TokenizeOptions, workers: int
) -> Iterator[tuple[Block, Tokenized]]:
    """Yields every block, without its content, and its tokens, in order. Reads a few blocks per worker ahead.

    Workers are spawned, because forking a process with threads can hang.

    Raises:
        UserError: the source cannot be read, a document is damaged, or a worker was killed. All blocks before the error
            are yielded first.
    """
    get_tokenizer(options.tokenizer)  # fails here and not in every worker, and fills tiktoken's cache
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (options,))
    pending: collections.deque[tuple[Block, concurrent.futures.Future[Tokenized]]] = collections.deque()
    source, error = iter(blocks), None

    def next_result() -> tuple[Block, Tokenized]:
        block, future = pending.popleft()
        return dataclasses.replace(block, content=b""), future.result()

    try:
        while True:
            try:
                block = next(source, None)
            except UserError as caught:  # raised after the blocks before it are yielded
                block, error = None, caught
            if block is None:
                break
            with _without_interrupts():
                pending.append((block, pool.submit(_tokenize, block)))
            if len(pending) > 2 * workers + 1:
                yield next_result()
        while pending:
            yield next_result()
        if error:
            raise error
    except concurrent.futures.process.BrokenProcessPool as broken:
        raise UserError("a worker was killed, perhaps for lack of memory; rerun with --workers 1") from broken
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Starts processes with Ctrl-C blocked, even while they import. This process handles it.

    Windows blocks no signals: there a worker that still imports prints its interrupt too.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_tokenizer: BlockTokenizer | None = None  # of this worker process


def _start_worker(options: TokenizeOptions) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    _tokenizer = BlockTokenizer(options, get_tokenizer(options.tokenizer))


def _tokenize(block: Block) -> Tokenized:
    assert _tokenizer is not None
    return _tokenizer(block)
