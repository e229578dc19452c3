"""From text to tokens, fast: gigatoken where it is installed and gives the ids of tiktoken, tiktoken elsewhere."""

from __future__ import annotations

import base64
import functools
import importlib.util
import re
import tempfile
import unicodedata
from collections.abc import Callable

import numpy as np
import tiktoken

from gpt2_jax.data.tokenizer import Tokenizer, end_of_text
from gpt2_jax.errors import UserError

SPACE_AFTER = re.compile(rb"[^ \t\n\r\x0b\x0c\x1c-\x1f](?=[ \t\n\r])")


def encoder(tokenizer: Tokenizer) -> Callable[[bytes], np.ndarray]:
    """The fastest way from UTF-8 to the tokens of `encode_ordinary`, uint16.

    With the byte encoding it takes any bytes. Others raise `ValueError` for what is not UTF-8, and tiktoken for a
    million spaces in a row.
    """
    if not isinstance(tokenizer, tiktoken.Encoding):
        return lambda text: np.array(tokenizer.encode_ordinary(text.decode("utf-8")), dtype=np.uint16)
    if tokenizer.name == "bytes":  # its own loop, at the speed of a copy
        return lambda text: np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    if uses_gigatoken(tokenizer.name):
        return _gigatoken(tokenizer)
    return lambda text: _tiktoken(tokenizer, text.decode("utf-8"))


def uses_gigatoken(tokenizer: str) -> bool:
    """Whether gigatoken makes the tokens of a tokenizer of this name: it is GPT-2's, and gigatoken is installed."""
    return tokenizer == "gpt2" and importlib.util.find_spec("gigatoken") is not None


def encode_document(tokenizer: Tokenizer, document: bytes, name: str = "text") -> np.ndarray:
    """Tokens of one document, uint16, end-of-text before them where the tokenizer has it.

    Raises:
        UserError: the document is not UTF-8, and the tokenizer is not bytes.
    """
    start = end_of_text(tokenizer)
    try:
        tokens = encoder(tokenizer)(document)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it, or type --data.tokenizer bytes"
        ) from error
    return np.concatenate([np.array([] if start is None else [start], dtype=np.uint16), tokens])


def boundary(data: bytes) -> int:
    """The last place at which UTF-8 text may be cut without changing GPT-2's tokens, 0 if there is none.

    No piece of GPT-2's splitting pattern reaches from a character that is no white space to white space behind it, and
    its one look ahead is about white space alone. So text may be cut between the two.
    """
    size = 1 << 10
    while True:  # the last kilobyte, then more
        start = max(len(data) - size, 0)
        for match in reversed(list(SPACE_AFTER.finditer(data, start))):
            first = match.start()
            while first > 0 and data[first] & 0xC0 == 0x80:  # within a character
                first -= 1
            if not data[first : match.end()].decode("utf-8", "replace").isspace():
                return match.end()
        if not start:
            return 0
        size *= 8


def _tiktoken(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


class _Gigatoken:
    """gigatoken's tokenizer of the same byte pairs, without special tokens: it would find those in any text."""

    PIECE_BYTES = 1 << 16  # Of longer texts it is slower, and keeps a hundred megabytes.
    FRESH_BYTES = 1 << 29  # It remembers what it has seen: a fresh one after so much text bounds its memory.

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        ranks = (encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab - 1))
        self._lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
        self._renew()

    def _renew(self) -> None:
        import gigatoken

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.writelines(self._lines)
            file.flush()
            self._tokenizer, self._bytes = gigatoken.Tokenizer.from_tiktoken(file.name, "gpt2", {}), 0

    def __call__(self, text: bytes) -> np.ndarray:
        if self._bytes > self.FRESH_BYTES:
            self._renew()
        self._bytes += len(text)
        parts, start = [], 0
        while start < len(text):
            piece = text[start : start + self.PIECE_BYTES]
            end = boundary(piece) if start + len(piece) < len(text) else len(piece)
            piece = piece[:end] if end else text[start:]
            parts.append(self._encode(piece.decode("utf-8")))
            start += len(piece)
        return np.concatenate([np.empty(0, np.uint16), *parts])

    def _encode(self, text: str) -> np.ndarray:
        # The two know letters of different versions of Unicode, newer than Python's.
        if not text.isascii() and _unassigned()[np.frombuffer(text.encode("utf-32-le"), "<u4")].any():
            return _tiktoken(self._encoding, text)
        return self._tokenizer.encode(text).astype(np.uint16)


_gigatoken = functools.cache(_Gigatoken)


@functools.cache
def _unassigned() -> np.ndarray:
    """Of each code point, whether it is no character of this Python's Unicode: bool [0x110000]."""
    return np.array([unicodedata.category(chr(point)) == "Cn" for point in range(0x110000)])
