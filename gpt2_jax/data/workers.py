"""Tokenizes blocks in other processes, and hands back what comes of them in order."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gpt2_jax.config import TokenizerName
from gpt2_jax.data.corpus import hashed_share
from gpt2_jax.data.encode import encoder
from gpt2_jax.data.sources import Block, Span
from gpt2_jax.data.tokenizer import Tokenizer, end_of_text, get_tokenizer
from gpt2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """What workers have to know.

    Attributes:
        field: of the JSON objects.
        val_fraction: share of the documents that is held out, where a hash decides.
        skip: whether a document with something wrong is left out, instead of being an error.
    """

    tokenizer: TokenizerName
    field: str
    val_fraction: float
    skip: bool


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The tokens of a block: uint16 [tokens] of each side, bytes of text, and documents that were left out."""

    train: np.ndarray
    val: np.ndarray
    text_bytes: int
    skipped: int


class BlockTokenizer:
    """From blocks to tokens."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer) -> None:
        self._settings, self._encode = settings, encoder(tokenizer)
        self._start = np.array([end_of_text(tokenizer)], dtype=np.uint16)

    def __call__(self, block: Block) -> Tokenized:
        """Its tokens.

        Raises:
            UserError: something is wrong with a document, and it is not to be skipped.
        """
        parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
        text_bytes, skipped, fraction = 0, block.skipped, self._settings.val_fraction
        content = block.content.read() if isinstance(block.content, Span) else block.content
        if block.kind == "text":
            assert isinstance(content, bytes)
            text_bytes = len(content)
            tokens = self._tokens(content, block.where)
            if isinstance(tokens, UserError):
                raise tokens
            parts[block.side == "val"] = [self._start[: int(block.starts)], tokens]
        for where, document in self._documents(block, content):
            tokens = document if isinstance(document, UserError) else self._tokens(document, where)
            if isinstance(tokens, UserError):
                if not self._settings.skip:
                    raise tokens
                skipped += 1
            elif document:
                assert isinstance(document, bytes)
                val = block.side == "val" or (block.side is None and fraction > 0 and hashed_share(document) < fraction)
                parts[val] += [self._start, tokens]
                text_bytes += len(document)
        train, val_tokens = (np.concatenate([np.empty(0, np.uint16), *parts[val]]) for val in (False, True))
        return Tokenized(train, val_tokens, text_bytes, skipped)

    def _tokens(self, document: bytes, where: str) -> np.ndarray | UserError:
        try:
            return self._encode(document)
        except ValueError as error:  # not UTF-8, or more white space than tiktoken's pattern takes
            reason = " ".join(str(error).split())[:100]
            return UserError(f"{where} cannot be tokenized ({reason}); leave it out, or type --on-error skip")

    def _documents(self, block: Block, content: bytes | list[Any]) -> Iterator[tuple[str, bytes | UserError]]:
        """The documents of lines or texts with their places, or what is wrong with them."""
        field = self._settings.field
        if block.kind == "text":
            return
        lines = content.split(b"\n") if isinstance(content, bytes) else content
        for number, line in enumerate(lines, block.first):
            where = f"{block.where}, {'line' if block.kind == 'lines' else 'row'} {number}"
            document: Any = line
            if block.kind == "lines":
                if not line.strip():
                    continue
                try:
                    table = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield where, UserError(f"{where} is not JSON ({error}); {MEND}")
                    continue
                if not isinstance(table, dict) or field not in table:
                    found = f"the fields {', '.join(table)}" if isinstance(table, dict) else type(table).__name__
                    yield where, UserError(f"{where} has no field {field!r}, but {found}; type --field; or {MEND}")
                    continue
                document = table[field]
            if isinstance(document, str):
                yield where, _utf8(document)
            elif isinstance(document, bytes):
                yield where, document
            else:
                yield where, UserError(f"{where}: {field} is {type(document).__name__}, not text; {MEND}")


MEND = "mend it and give another --out, or type --on-error skip"


def _utf8(text: str) -> bytes:
    """UTF-8, with a replacement character for half a surrogate pair, which JSON can spell; tiktoken does the same."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def tokenize_all(blocks: Iterable[Block], settings: Settings, workers: int) -> Iterator[tuple[Block, Tokenized]]:
    """Every block with its tokens, in order; a few blocks per worker are read ahead.

    Processes are spawned: a fork of one with threads can hang.

    Raises:
        UserError: something is wrong with the source or a document, or a worker was killed.
    """
    get_tokenizer(settings.tokenizer)  # fails here rather than in every worker, and fills tiktoken's cache
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (settings,))
    waiting: collections.deque[tuple[Block, concurrent.futures.Future[Tokenized]]] = collections.deque()
    source, error = iter(blocks), None

    def finished() -> tuple[Block, Tokenized]:
        block, future = waiting.popleft()
        return dataclasses.replace(block, content=b""), future.result()

    try:
        while True:
            try:
                block = next(source, None)
            except UserError as caught:  # what the source gave before it counts
                block, error = None, caught
            if block is None:
                break
            with _without_interrupts():
                waiting.append((block, pool.submit(_work, block)))
            if len(waiting) > 2 * workers + 1:
                yield finished()
        while waiting:
            yield finished()
        if error:
            raise error
    except concurrent.futures.process.BrokenProcessPool as broken:
        raise UserError("a worker was killed, perhaps for want of memory; type the same with --workers 1") from broken
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start within do not hear Ctrl-C, which is this one's to answer, not even while they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_tokenizer: BlockTokenizer | None = None  # of this worker


def _start_worker(settings: Settings) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _tokenizer = BlockTokenizer(settings, get_tokenizer(settings.tokenizer))


def _work(block: Block) -> Tokenized:
    assert _tokenizer is not None
    return _tokenizer(block)
