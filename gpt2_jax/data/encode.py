"""Encodes text fast: with gigatoken where it is installed and gives the same tokens as tiktoken, else with tiktoken."""

from __future__ import annotations

import base64
import functools
import importlib.util
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from gpt2_jax.activity import tracked
from gpt2_jax.data.tokenizer import Tokenizer, encode_byte_pairs, end_of_text
from gpt2_jax.errors import UserError

PIECE_BYTES = 1 << 20  # of a text, encoded at once
SPACES = re.compile(r"\s*")
BEFORE_SPACE = re.compile(rb"[^ \t\n\r\x0b\x0c\x1c-\x1f](?=[ \t\n\r])")


def encoder(tokenizer: Tokenizer) -> Callable[[bytes], np.ndarray]:
    """Returns the fastest function from UTF-8 to the tokens of `encode_ordinary`, uint16 [tokens].

    The byte encoding takes any bytes. Others raise `ValueError` if the bytes are not UTF-8, and tiktoken also for more
    than `LONGEST_SPACE` white-space characters in a row. `flaw` describes both.
    """
    if not isinstance(tokenizer, tiktoken.Encoding):
        return lambda text: np.array(tokenizer.encode_ordinary(text.decode("utf-8")), dtype=np.uint16)
    if tokenizer.name == "bytes":  # as fast as a copy
        return lambda text: np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    if uses_gigatoken(tokenizer.name):
        return functools.partial(_encode_in_pieces, _gigatoken(tokenizer), _Gigatoken.PIECE_BYTES)
    return functools.partial(
        _encode_in_pieces, lambda piece: encode_byte_pairs(tokenizer, piece).astype(np.uint16), PIECE_BYTES
    )


def flaw(error: ValueError) -> str:
    """Says what is wrong with a text that `encoder` refuses, to continue a sentence: "is not UTF-8 text (byte 7)"."""
    return f"is not UTF-8 text (byte {error.start})" if isinstance(error, UnicodeDecodeError) else str(error)


def uses_gigatoken(tokenizer: str) -> bool:
    """True if gigatoken encodes for the tokenizer of this name: it has to be GPT-2's, and gigatoken installed."""
    return tokenizer == "gpt2" and importlib.util.find_spec("gigatoken") is not None


def encode_document(tokenizer: Tokenizer, document: bytes, name: str = "text") -> np.ndarray:
    """Encodes one document, uint16 [tokens], with end-of-text before it if the tokenizer has one.

    Args:
        tokenizer: encodes the document.
        document: UTF-8, or any bytes for the byte encoding.
        name: the name of the document, for errors.

    Raises:
        UserError: the document is not UTF-8, or has too many spaces in a row, and the tokenizer minds.
    """
    start = end_of_text(tokenizer)
    try:
        tokens = encoder(tokenizer)(document)
    except ValueError as error:
        raise UserError(f"{name} {flaw(error)}; correct it, or type --data.tokenizer bytes") from error
    return np.concatenate([np.array([] if start is None else [start], dtype=np.uint16), tokens])


def encode_prompt(tokenizer: Tokenizer, text: str, name: str = "the prompt") -> list[int]:
    """Encodes a text to continue or to score. Special tokens in it are encoded as text.

    Args:
        tokenizer: encodes the text.
        text: the text. Unpaired surrogates in it become U+FFFD.
        name: the name of the text, for errors.

    Raises:
        UserError: it has too many spaces in a row for tiktoken, or a character that the tokenizer does not have.
    """
    text = utf8(text).decode()
    try:
        if isinstance(tokenizer, tiktoken.Encoding):
            return encode_byte_pairs(tokenizer, text).tolist()
        return tokenizer.encode_ordinary(text)
    except ValueError as error:
        raise UserError(f"{name} {flaw(error)}; remove some of them") from error


def utf8(text: str) -> bytes:
    """Encodes UTF-8. Unpaired surrogates, which JSON can contain, become U+FFFD, as in tiktoken."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def last_safe_cut(data: bytes) -> int:
    """Finds the last offset where UTF-8 text can be cut without changing its GPT-2 tokens; 0 if there is none.

    A safe cut is between a character that is not white space and a white-space character. No match of GPT-2's splitting
    pattern contains such a pair, and the pattern's only lookahead is inside white space.
    """
    size = 1 << 10
    while True:  # searches the last kilobyte, then more
        start = max(len(data) - size, 0)
        for match in reversed(list(BEFORE_SPACE.finditer(data, start))):
            first = match.start()
            while first > 0 and data[first] & 0xC0 == 0x80:  # inside a character
                first -= 1
            if not data[first : match.end()].decode("utf-8", "replace").isspace():
                return match.end()
        if not start:
            return 0
        size *= 8


def _encode_in_pieces(encode: Callable[[str], np.ndarray], size: int, text: bytes) -> np.ndarray:
    """Encodes a text in pieces of up to `size` bytes, from one safe cut to the next, as `tracked` work."""
    parts = [np.empty(0, np.uint16)]
    for start, piece in tracked(_pieces(text, size), len(text), lambda item: len(item[1])):
        try:
            decoded = piece.decode("utf-8")
        except UnicodeDecodeError as error:  # the offset in the text, not in the piece
            raise UnicodeDecodeError("utf-8", text, start + error.start, start + error.end, error.reason) from None
        parts.append(encode(decoded))
    return np.concatenate(parts)


def _pieces(text: bytes, size: int) -> Iterator[tuple[int, bytes]]:
    """The offset and the bytes of each piece of a text. A piece without a safe cut extends to the end of the text."""
    start = 0
    while start < len(text):
        piece = text[start : start + size]
        if start + len(piece) < len(text):
            piece = piece[: last_safe_cut(piece)] or text[start:]
        yield start, piece
        start += len(piece)


class SpaceCounter:
    """Counts white-space characters in a row, over the blocks of a text."""

    def __init__(self) -> None:
        self._open = 0  # at the end of the last block

    def add(self, text: str) -> int:
        """Adds a block. Returns the longest row in it or up to it, if that is longer than half of a block."""
        size, middle = len(text), len(text) // 2
        first, last = _spaces_after(text, 0), _spaces_before(text, size)
        longest = self._open + first if first < size else 0
        if (right := _spaces_after(text, middle)) < size - middle:
            longest = max(longest, _spaces_before(text, middle) + right)
        self._open = self._open + size if first == size else last
        return longest


def _spaces_after(text: str, start: int) -> int:
    match = SPACES.match(text, start)
    return match.end() - start if match else 0


def _spaces_before(text: str, end: int) -> int:
    size = 64  # no copy of a whole block for a few spaces
    while True:
        part = text[max(end - size, 0) : end]
        rest = part.rstrip()
        if rest or size >= end:
            return len(part) - len(rest)
        size *= 8


class _Gigatoken:
    """gigatoken's tokenizer with GPT-2's byte pairs. It gets no special tokens, because it would find them in text."""

    PIECE_BYTES = 1 << 16  # With longer texts gigatoken is slower and holds a hundred megabytes.
    RENEW_CHARACTERS = 1 << 29  # gigatoken caches every word: a new tokenizer after this much text bounds its memory.

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        ranks = (encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab - 1))
        self._lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
        self._renew()

    def _renew(self) -> None:
        import gigatoken

        with tempfile.TemporaryDirectory() as directory:  # Windows would not open a temporary file again
            path = Path(directory, "gpt2.tiktoken")
            path.write_bytes(b"".join(self._lines))
            self._tokenizer, self._characters = gigatoken.Tokenizer.from_tiktoken(str(path), "gpt2", {}), 0

    def __call__(self, text: str) -> np.ndarray:
        if self._characters > self.RENEW_CHARACTERS:
            self._renew()
        self._characters += len(text)
        # gigatoken and tiktoken know different versions of Unicode, both newer than Python's. They can disagree only
        # about code points that Python's Unicode does not assign.
        if not text.isascii() and _unassigned()[np.frombuffer(text.encode("utf-32-le"), "<u4")].any():
            return encode_byte_pairs(self._encoding, text).astype(np.uint16)
        return self._tokenizer.encode(text).astype(np.uint16)


_gigatoken = functools.cache(_Gigatoken)


@functools.cache
def _unassigned() -> np.ndarray:
    """True for each code point that Python's version of Unicode does not assign, bool [0x110000]."""
    return np.array([unicodedata.category(chr(point)) == "Cn" for point in range(0x110000)])
