"""Tokenizers: GPT-2's byte pairs, raw bytes, or the characters of one text.

The first two are `tiktoken.Encoding`s. A literal `<|endoftext|>` in a text is encoded as ordinary text. Only the data
pipeline writes the end-of-text token.
"""

from __future__ import annotations

import codecs
import dataclasses
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken

from gpt2_jax.config import TokenizerName
from gpt2_jax.errors import UserError, one_line

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
LONGEST_SPACE = 999_998  # White-space characters in a row. With more, tiktoken's pattern overflows its stack.
TOO_MANY_SPACES = f"has more than {LONGEST_SPACE:,} spaces in a row, which tiktoken cannot split"
BYTES_PATTERN = r"[\s\S]"  # splits a text into characters, so that no bytes merge


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


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """The tokens around a text.

    Attributes:
        start: precedes a text ("BOS"); None if it is not known.
        ends: each of them ends a text ("EOS").
        pad: fills the shorter texts of a batch; it is never part of a text.
        prefix: precede a text to continue. Most models have none; their `start` only replaces an empty text.
    """

    start: int | None = None
    ends: tuple[int, ...] = ()
    pad: int | None = None
    prefix: tuple[int, ...] = ()

    def or_else(self, other: Boundaries) -> Boundaries:
        """Fills in from `other` what is not known here."""
        return Boundaries(
            other.start if self.start is None else self.start,
            self.ends or other.ends,
            other.pad if self.pad is None else self.pad,
            self.prefix or other.prefix,
        )


UNKNOWN = Boundaries()


class ExtendedTokenizer:
    """A tokenizer of byte pairs or characters with tokens that somebody added to it.

    Args:
        base: encodes the text between added words.
        added: the added tokens by their text.
        words: matches those that are part of ordinary text, with one group for the text of each; None if there are
            none. The others are special tokens, whose text in a text is only text.
        boundaries: the tokens around a text.
    """

    def __init__(
        self,
        base: tiktoken.Encoding | CharTokenizer,
        added: Mapping[str, int],
        words: re.Pattern[str] | None,
        boundaries: Boundaries,
    ) -> None:
        self.base, self.words, self.boundaries = base, words, boundaries
        self._token = dict(added)
        self._bytes = {token: text.encode("utf-8", "replace") for text, token in added.items()}

    @property
    def n_vocab(self) -> int:
        """The number of tokens in the vocabulary, added ones included."""
        return max(self.base.n_vocab, *(token + 1 for token in self._bytes), 0)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encodes a text; added words become their tokens, and special tokens in it are encoded as text.

        Raises:
            UserError: a character is not in the alphabet.
            ValueError: as `encode_byte_pairs`.
        """
        tokens: list[int] = []
        start = 0
        for match in self.words.finditer(text) if self.words else ():
            assert match.lastindex
            tokens += [*self._encode(text[start : match.start()]), self._token[match[match.lastindex]]]
            start = match.end()
        return tokens + self._encode(text[start:])

    def _encode(self, text: str) -> list[int]:
        if isinstance(self.base, CharTokenizer):
            return self.base.encode_ordinary(text)
        tokens: list[int] = encode_byte_pairs(self.base, text).tolist()
        return tokens

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """Decodes tokens to UTF-8, with the text of special tokens."""
        known = self._bytes
        return b"".join(known[token] if token in known else self.base.decode_bytes([token]) for token in tokens)


LARGEST_META = 1 << 21  # bytes. 65,536 characters, the most that uint16 tokens can name, take at most 1.6 MB.
_META_DICTS = 3  # a meta.pkl is a dict with the dicts `itos` and `stoi`


def read_characters(meta: Path) -> CharTokenizer:
    """Reads the alphabet in a nanoGPT `meta.pkl`. Nothing is unpickled, so no content can run code or take memory.

    Raises:
        UserError: the file cannot be read, is larger than `LARGEST_META`, or has another content.
    """
    try:
        with open(meta, "rb") as file:
            data = file.read(LARGEST_META + 1)
        if len(data) > LARGEST_META:
            raise ValueError(f"it is larger than {LARGEST_META:,} bytes")
        table = _read_dicts(data)
        itos = table.get("itos") if isinstance(table, dict) else None
        if not isinstance(itos, dict):
            raise ValueError("it has no dict itos")
        characters = [itos[token] for token in range(len(itos))]
        if not all(isinstance(character, str) and len(character) == 1 for character in characters):
            raise ValueError("a token is not one character")
        if len(set(characters)) < len(characters) or any("\ud800" <= character <= "\udfff" for character in characters):
            raise ValueError("a character is there twice, or half of one")
        if not characters:
            raise ValueError("it has no characters")
    except OSError as error:
        raise UserError(f"{meta} cannot be read: {error.strerror}; prepare it again, or make it readable") from error
    except KeyError as error:
        raise UserError(f"{meta} is not nanoGPT's table of characters (no token {error}); prepare it again") from error
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        reason = one_line(error, 100)
        raise UserError(f"{meta} is not nanoGPT's table of characters ({reason}); prepare it again") from error
    return CharTokenizer("".join(characters))


def _read_dicts(data: bytes) -> Any:
    """Interprets a pickle of numbers, strings and up to `_META_DICTS` dicts, of any protocol.

    Python's unpickler would make room for a table of any size that an opcode names.

    Raises:
        ValueError, IndexError, KeyError or TypeError: it is not a pickle, or holds anything else.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    n_dicts = 0
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "INT" | "SHORT_BINUNICODE" | "BINUNICODE" | "UNICODE":
                stack.append(argument)
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT" | "DICT":
                n_dicts += 1
                if n_dicts > _META_DICTS:
                    raise ValueError("it has too many dicts")
                if opcode.name == "DICT" and marks.pop() != len(stack):
                    raise ValueError("a dict is not empty at first")
                stack.append({})
            case "SETITEM" | "SETITEMS":
                first = marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2
                items = stack[first:]
                del stack[first:]
                if not isinstance(stack[-1], dict):
                    raise ValueError("an item is not in a dict")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it holds {name}")
    raise ValueError("it does not end")


def byte_encoding() -> tiktoken.Encoding:
    """Makes the encoding of raw bytes: tokens 0–255 are the bytes, token 256 is end-of-text."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=BYTES_PATTERN,
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )


def encode_byte_pairs(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Encodes a text without surrogates, uint32 [tokens]. `encode_ordinary` gives the same, but panics on failure.

    Raises:
        ValueError: more than `LONGEST_SPACE` white-space characters in a row.
    """
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError as error:
        raise ValueError(TOO_MANY_SPACES) from error


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
            "only for eval.sample_tokens, eval.prompts and eval.tasks)"
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
    """The name in `data.tokenizer` of the tokenizer that gives the same tokens for every text; None if there is none.

    Special tokens may have been added to byte pairs. An alphabet with more tokens has no name.
    """
    if isinstance(tokenizer, ExtendedTokenizer):
        return None if tokenizer.words or isinstance(tokenizer.base, CharTokenizer) else tokenizer_name(tokenizer.base)
    if isinstance(tokenizer, CharTokenizer):
        return "chars"
    names: dict[str, TokenizerName] = {"gpt2": "gpt2", "bytes": "bytes"}
    return names.get(tokenizer.name) if isinstance(tokenizer, tiktoken.Encoding) else None


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that precedes each document, None if the tokenizer has none."""
    if isinstance(tokenizer, tiktoken.Encoding) and END_OF_TEXT in tokenizer.special_tokens_set:
        return tokenizer.eot_token
    return None


def boundaries(tokenizer: Tokenizer) -> Boundaries:
    """The tokens around a text, as far as the tokenizer names them."""
    if isinstance(tokenizer, ExtendedTokenizer):
        return tokenizer.boundaries
    end = end_of_text(tokenizer)
    return UNKNOWN if end is None else Boundaries(end, (end,))


class TextStream:
    """Decodes a stream of tokens to text. Bytes of an unfinished UTF-8 character wait for the rest.

    Args:
        tokenizer: decodes the tokens.
        ends: the tokens that end the text.

    Attributes:
        ended: True once one of them came.
    """

    def __init__(self, tokenizer: Tokenizer, ends: tuple[int, ...]) -> None:
        self._tokenizer, self._ends, self.ended = tokenizer, ends, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: np.ndarray) -> str:
        """Decodes the next tokens, int32 [n], up to the first that ends the text; everything after it is ignored."""
        ends = np.flatnonzero(np.isin(tokens, self._ends))
        if ends.size or self.ended:
            tokens = tokens[: 0 if self.ended else ends[0]]
            self.ended = True
        return self._decoder.decode(self._tokenizer.decode_bytes(tokens.tolist()))

    def end(self) -> str:
        """Ends the stream: a replacement character if a character is unfinished, else nothing."""
        return self._decoder.decode(b"", final=True)
