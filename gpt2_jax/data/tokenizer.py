"""Tokenizers: GPT-2's byte pairs, raw bytes, or the characters of one text.

The first two are `tiktoken.Encoding`s. A literal `<|endoftext|>` in a text is always text: only the data
pipeline writes the end-of-text token.
"""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken

from gpt2_jax.config import TokenizerName
from gpt2_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257


class Tokenizer(Protocol):
    """What data preparation and sampling ask of a tokenizer; `tiktoken.Encoding` has it."""

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""
        ...

    def encode_ordinary(self, text: str) -> list[int]:
        """Tokens of a text, special tokens taken as text."""
        ...

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The bytes that tokens stand for; they need not be whole UTF-8 characters."""
        ...


class CharTokenizer:
    """One token per character of an alphabet, as nanoGPT's `shakespeare_char`; it has no end-of-text token."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._token = {character: token for token, character in enumerate(characters)}

    @property
    def n_vocab(self) -> int:
        """Number of characters."""
        return len(self.characters)

    def encode_ordinary(self, text: str) -> list[int]:
        """Tokens of a text.

        Raises:
            UserError: a character is not in the alphabet.
        """
        try:
            return [self._token[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"the text has the character {error.args[0]!r}, which is not among the {self.n_vocab} of the "
                "tokenizer; leave it out, or train with it in data.characters"
            ) from None

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The characters in UTF-8."""
        return "".join(self.characters[token] for token in tokens).encode()


class _Plain(pickle.Unpickler):
    """Takes numbers, strings and containers, for which pickle imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_characters(meta: Path) -> CharTokenizer:
    """The alphabet of a nanoGPT `meta.pkl`.

    Raises:
        UserError: it is no such file, or would run code to be read.
    """
    try:
        with open(meta, "rb") as file:
            characters: dict[int, str] = _Plain(file).load()["itos"]
        return CharTokenizer("".join(characters[token] for token in range(len(characters))))
    except (pickle.UnpicklingError, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{meta} is not nanoGPT's table of characters ({error}); prepare it again") from error


def byte_encoding() -> tiktoken.Encoding:
    """256 bytes, then end-of-text as token 256."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )


def gpt2_encoding() -> tiktoken.Encoding:
    """tiktoken's "gpt2": 50,257 tokens. tiktoken downloads the vocabulary at its first use and keeps it.

    Raises:
        UserError: the vocabulary is neither in tiktoken's cache nor to be downloaded.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the HTTP stack raises: tiktoken promises no type
        raise UserError(
            f"tiktoken cannot download GPT-2's vocabulary ({type(error).__name__}); on a machine without network set "
            "TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache from another one (token files need it only to write a "
            "sample: --eval.sample_tokens 0)"
        ) from error


def get_tokenizer(name: TokenizerName, characters: str = "") -> Tokenizer:
    """The tokenizer of a config's `data.tokenizer` and `data.characters`."""
    if name == "chars":
        return CharTokenizer(characters)
    return byte_encoding() if name == "bytes" else gpt2_encoding()


def vocab_size(name: TokenizerName, characters: str = "") -> int:
    """The size of a tokenizer's vocabulary, without loading it.

    Raises:
        UserError: the alphabet of "chars" is not given.
    """
    if name == "chars" and not characters:
        raise UserError("data.tokenizer = 'chars' with token files needs their alphabet in data.characters")
    return {"gpt2": GPT2_VOCAB_SIZE, "bytes": 257, "chars": len(characters)}[name]


def end_of_text_token(name: TokenizerName) -> int | None:
    """`end_of_text` of a tokenizer, without loading it."""
    return {"gpt2": GPT2_VOCAB_SIZE - 1, "bytes": 256, "chars": None}[name]


def tokenizer_name(tokenizer: Tokenizer) -> TokenizerName | None:
    """What `data.tokenizer` calls it; None for one that `get_tokenizer` does not make."""
    if isinstance(tokenizer, CharTokenizer):
        return "chars"
    names: dict[str, TokenizerName] = {"gpt2": "gpt2", "bytes": "bytes"}
    return names.get(tokenizer.name) if isinstance(tokenizer, tiktoken.Encoding) else None


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that stands before each document, None if the tokenizer has none."""
    if isinstance(tokenizer, tiktoken.Encoding) and END_OF_TEXT in tokenizer.special_tokens_set:
        return tokenizer.eot_token
    return None


class TextStream:
    """Text from tokens as they come, held back while a UTF-8 character is not whole."""

    def __init__(self, tokenizer: Tokenizer, stop: int | None) -> None:
        self._tokenizer, self._stop, self._ended = tokenizer, stop, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: np.ndarray) -> str:
        """The text that int32 [some] adds, nothing from `stop` on."""
        ends = np.flatnonzero(tokens == self._stop)
        if ends.size or self._ended:
            tokens = tokens[: 0 if self._ended else ends[0]]
            self._ended = True
        return self._decoder.decode(self._tokenizer.decode_bytes(tokens.tolist()))

    def end(self) -> str:
        """What is left: a replacement character for an unfinished one."""
        return self._decoder.decode(b"", final=True)
