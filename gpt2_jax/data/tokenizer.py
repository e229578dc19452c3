"""Tokenizers: GPT-2's byte pairs, raw bytes, or the characters of one text.

The first two are `tiktoken.Encoding`s. A literal `<|endoftext|>` in a text is encoded as ordinary text. Only the data
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
    """The methods that data preparation and sampling call; `tiktoken.Encoding` has them."""

    @property
    def n_vocab(self) -> int:
        """The number of tokens in the vocabulary."""
        ...

    def encode_ordinary(self, text: str) -> list[int]:
        """Encodes a text; special tokens in it are encoded as text."""
        ...

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """Decodes tokens to bytes, which may end inside a UTF-8 character."""
        ...


class CharTokenizer:
    """One token per character of an alphabet, like nanoGPT's `shakespeare_char`. It has no end-of-text token."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._token = {character: token for token, character in enumerate(characters)}

    @property
    def n_vocab(self) -> int:
        """The number of characters in the alphabet."""
        return len(self.characters)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encodes a text.

        Raises:
            UserError: a character is not in the alphabet.
        """
        try:
            return [self._token[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"the text has the character {error.args[0]!r}, which is not among the {self.n_vocab} of the "
                "tokenizer; remove it, or train with it in data.characters"
            ) from None

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """Decodes tokens to UTF-8."""
        return "".join(self.characters[token] for token in tokens).encode()


class _SafeUnpickler(pickle.Unpickler):
    """Reads only numbers, strings and built-in containers. Any other type would run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_characters(meta: Path) -> CharTokenizer:
    """Reads the alphabet in a nanoGPT `meta.pkl`.

    Raises:
        UserError: the file has another content, or would run code when it is unpickled.
    """
    try:
        with open(meta, "rb") as file:
            characters: dict[int, str] = _SafeUnpickler(file).load()["itos"]
        return CharTokenizer("".join(characters[token] for token in range(len(characters))))
    except (pickle.UnpicklingError, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{meta} is not nanoGPT's table of characters ({error}); prepare it again") from error


def byte_encoding() -> tiktoken.Encoding:
    """Makes the encoding of raw bytes: tokens 0–255 are the bytes, token 256 is end-of-text."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )


def gpt2_encoding() -> tiktoken.Encoding:
    """Loads tiktoken's "gpt2", 50,257 tokens. tiktoken downloads the vocabulary at first use and caches it.

    Raises:
        UserError: the vocabulary is not in tiktoken's cache and cannot be downloaded.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # of the HTTP stack: tiktoken does not document its type
        raise UserError(
            f"tiktoken cannot download GPT-2's vocabulary ({type(error).__name__}); without network, set "
            "TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache from another machine (training on token files needs it "
            "only for samples: --eval.sample_tokens 0)"
        ) from error


def get_tokenizer(name: TokenizerName, characters: str = "") -> Tokenizer:
    """Makes the tokenizer that a config's `data.tokenizer` and `data.characters` select."""
    if name == "chars":
        return CharTokenizer(characters)
    return byte_encoding() if name == "bytes" else gpt2_encoding()


def vocab_size(name: TokenizerName, characters: str = "") -> int:
    """The vocabulary size of a tokenizer, without loading it.

    Raises:
        UserError: the name is "chars", and the alphabet is missing.
    """
    if name == "chars" and not characters:
        raise UserError("data.tokenizer = 'chars' with token files needs their alphabet in data.characters")
    return {"gpt2": GPT2_VOCAB_SIZE, "bytes": 257, "chars": len(characters)}[name]


def end_of_text_token(name: TokenizerName) -> int | None:
    """The end-of-text token of a tokenizer, without loading it; None if it has none."""
    return {"gpt2": GPT2_VOCAB_SIZE - 1, "bytes": 256, "chars": None}[name]


def tokenizer_name(tokenizer: Tokenizer) -> TokenizerName | None:
    """The name of a tokenizer in `data.tokenizer`; None if `get_tokenizer` does not make it."""
    if isinstance(tokenizer, CharTokenizer):
        return "chars"
    names: dict[str, TokenizerName] = {"gpt2": "gpt2", "bytes": "bytes"}
    return names.get(tokenizer.name) if isinstance(tokenizer, tiktoken.Encoding) else None


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that precedes each document, None if the tokenizer has none."""
    if isinstance(tokenizer, tiktoken.Encoding) and END_OF_TEXT in tokenizer.special_tokens_set:
        return tokenizer.eot_token
    return None


class TextStream:
    """Decodes a stream of tokens to text. Bytes of an unfinished UTF-8 character wait for the rest.

    Args:
        tokenizer: decodes the tokens.
        stop: the token that ends the text; None if there is none.
    """

    def __init__(self, tokenizer: Tokenizer, stop: int | None) -> None:
        self._tokenizer, self._stop, self._ended = tokenizer, stop, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: np.ndarray) -> str:
        """Decodes the next tokens, int32 [n], up to the first `stop` token; everything after it is ignored."""
        ends = np.flatnonzero(tokens == self._stop)
        if ends.size or self._ended:
            tokens = tokens[: 0 if self._ended else ends[0]]
            self._ended = True
        return self._decoder.decode(self._tokenizer.decode_bytes(tokens.tolist()))

    def end(self) -> str:
        """Ends the stream: a replacement character if a character is unfinished, else nothing."""
        return self._decoder.decode(b"", final=True)
