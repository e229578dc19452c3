"""Reads tokenizers of `transformers`: `tokenizer.json`, or `vocab.json` with `merges.txt`, and their special tokens.

These files write a token as a string with one printable character per byte (`bytes_to_unicode` in GPT-2's
`encoder.py`). Bytes that are printable in Latin-1 are written as themselves, the others as the characters from U+0100
on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2_jax.data.tokenizer import (
    BYTES_PATTERN,
    END_OF_TEXT,
    GPT2_VOCAB_SIZE,
    UNKNOWN,
    Boundaries,
    CharTokenizer,
    ExtendedTokenizer,
    Tokenizer,
    boundaries,
    gpt2_encoding,
)
from gpt2_jax.errors import UserError
from gpt2_jax.interop.model_files import FindFile, read_json, read_text

# The files that hold a tokenizer, of any kind, in the order in which transformers prefers them.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SETTINGS = (
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
GENERATION = "generation_config.json"  # names the tokens around a text, for `generate` of transformers and for ours

# Vocabularies that imply GPT-2's tokenizer. nanoGPT pads to 50304 when it trains from scratch, and trains the padding.
GPT2_VOCABS = (GPT2_VOCAB_SIZE, 50304)

# The roles of special tokens, in the order in which transformers numbers those that no file numbers.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")

_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}

# `_fingerprint` of GPT-2's vocabulary.
GPT2_SHA256 = "b83936794d5c58d4bf7f24cb0100cd291b9306d80ba0e2ff11988886d2d9c1ec"


@dataclasses.dataclass(frozen=True)
class _Added:
    """A token that was added to a vocabulary, with the flags of transformers' `AddedToken`."""

    token: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def implied_tokenizer(vocab_size: int) -> Tokenizer | None:
    """GPT-2's tokenizer for a model of its vocabulary that comes without tokenizer files; None for others.

    Raises:
        UserError: its vocabulary cannot be downloaded.
    """
    return gpt2_encoding() if vocab_size in GPT2_VOCABS else None


def read_tokenizer(find: FindFile, without_files: Callable[[], Tokenizer | None]) -> Tokenizer | None:
    """Reads the tokenizer of a model: byte pairs or characters. Returns None if it is of another kind, or unknown.

    Args:
        find: finds the files of the model.
        without_files: gives the tokenizer of a model without tokenizer files.

    Raises:
        UserError: a file is damaged, or may not be read.
    """
    path = next((path for name in VOCABULARIES if (path := find(name))), None)
    if path is None:
        return without_files()
    if path.name not in ("tokenizer.json", "vocab.json"):
        return None
    names = [name for name in SETTINGS if name.endswith(".json")]
    settings = {name: read_json(file) if (file := find(name)) else {} for name in names}
    table = read_json(path)
    with _report_damage(path):
        if path.name == "tokenizer.json":
            return _from_tokenizer_json(table, settings)
        merges = find("merges.txt")
        if not merges:
            return None
        lines = read_text(merges).splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        tokenizer, config = _byte_pairs(table, pairs, {}, settings), settings["tokenizer_config.json"]
        start = boundaries(tokenizer).start if tokenizer and config.get("add_bos_token") else None
        return _with_prefix(tokenizer, () if start is None else (start,))


@contextlib.contextmanager
def _report_damage(path: Path) -> Iterator[None]:
    """Turns the exceptions of a file with an unexpected structure into a `UserError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer of transformers ({error!r}); copy it again") from error


def _from_tokenizer_json(table: Mapping[str, Any], settings: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a `tokenizer.json`; None if it is of another kind."""
    model, pre_tokenizer, prefix = table["model"], table.get("pre_tokenizer"), _prefix(table.get("post_processor"))
    if model.get("type", "BPE") != "BPE" or table.get("normalizer") or prefix is None:
        return None
    added = {entry["content"]: _flags(entry, entry["id"]) for entry in table.get("added_tokens") or ()}
    if pre_tokenizer is None and not model["merges"]:
        return _with_prefix(_characters(model["vocab"], added, settings), prefix)
    if not pre_tokenizer or pre_tokenizer["type"] != "ByteLevel":
        return None
    if pre_tokenizer["add_prefix_space"] or not pre_tokenizer.get("use_regex", True):
        return None
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return _with_prefix(_byte_pairs(model["vocab"], pairs, added, settings), prefix)


def _prefix(processor: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    """The tokens that a post-processor puts before a text; None if its kind is unknown.

    It may also put some at the end, but a text to continue has no end.
    """
    if processor is None or processor["type"] == "ByteLevel":
        return ()
    if processor["type"] == "Sequence":
        others = [part for part in processor["processors"] if part["type"] != "ByteLevel"]
        return _prefix(others[0] if others else None) if len(others) <= 1 else None
    if processor["type"] != "TemplateProcessing":
        return None
    pieces = itertools.takewhile(lambda piece: "SpecialToken" in piece, processor["single"])
    known = processor["special_tokens"]
    return tuple(token for piece in pieces for token in known[piece["SpecialToken"]["id"]]["ids"])


def _with_prefix(
    tokenizer: tiktoken.Encoding | CharTokenizer | ExtendedTokenizer | None, prefix: tuple[int, ...]
) -> Tokenizer | None:
    """A tokenizer with the tokens that precede a text to continue."""
    if tokenizer is None or not prefix:
        return tokenizer
    if not all(type(token) is int and 0 <= token < tokenizer.n_vocab for token in prefix):
        raise ValueError("a token before each text is not in the vocabulary")
    if not isinstance(tokenizer, ExtendedTokenizer):
        tokenizer = _extended(tokenizer, {}, boundaries(tokenizer))
    tokenizer.boundaries = dataclasses.replace(tokenizer.boundaries, prefix=prefix)
    return tokenizer


def _flags(entry: Mapping[str, Any], token: int) -> _Added:
    return _Added(token, **{key: bool(entry.get(key)) for key in ("special", "lstrip", "rstrip", "single_word")})


def _content(entry: Any) -> str | None:
    """The text of a special token in a settings file: a string, an AddedToken, or null."""
    return entry["content"] if isinstance(entry, dict) else entry


def _with_settings(
    vocab: Mapping[str, int], added: Mapping[str, _Added], settings: Mapping[str, Any]
) -> tuple[dict[str, _Added], Boundaries]:
    """All added tokens, from the vocabulary file and the settings of any version of transformers, and their roles."""
    config, roles = settings["tokenizer_config.json"], settings["special_tokens_map.json"]
    decoder = config.get("added_tokens_decoder") or {}
    roles = roles | config if decoder else config | roles
    added = dict(added)
    added |= {content: _Added(token, special=False) for content, token in settings["added_tokens.json"].items()}
    added |= {entry["content"]: _flags(entry, int(token)) for token, entry in decoder.items()}
    named = {role: _content(roles.get(role)) for role in ROLES}
    more = [_content(entry) for key in MORE_SPECIAL for entry in _entries(roles.get(key) or ())]
    for content in filter(None, [*named.values(), *more]):
        number = added[content].token if content in added else vocab.get(content)
        if number is None:  # transformers adds what is named and nowhere numbered
            number = 1 + max([*vocab.values(), *(token.token for token in added.values())], default=-1)
        added[content] = dataclasses.replace(added.get(content, _Added(number)), special=True)
    # A token that is in the vocabulary too has its number there.
    added = {content: dataclasses.replace(one, token=vocab.get(content, one.token)) for content, one in added.items()}
    tokens = {role: added[content].token for role, content in named.items() if content}
    ends = (tokens["eos_token"],) if "eos_token" in tokens else ()
    return added, Boundaries(tokens.get("bos_token"), ends, tokens.get("pad_token"))


def _entries(part: Any) -> Iterable[Any]:
    """The further special tokens of one key: a list, or a dict by names."""
    return part.values() if isinstance(part, dict) else part


def _characters(
    vocab: Mapping[str, int], added: Mapping[str, _Added], settings: Mapping[str, Any]
) -> CharTokenizer | ExtendedTokenizer | None:
    """One token per character; None if there are longer tokens."""
    added, around = _with_settings(vocab, added, settings)
    everything = {content: token.token for content, token in added.items()} | dict(vocab)
    alphabet = {content: token for content, token in vocab.items() if content not in added}
    characters = sorted(alphabet, key=alphabet.__getitem__)
    in_order = _has_no_gaps(alphabet) and _has_no_gaps(everything)
    if not in_order or any(len(character) != 1 for character in characters):
        return None
    base = CharTokenizer("".join(characters))
    return _extended(base, added, around) if added else base


def _byte_pairs(
    vocab: Mapping[str, int],
    merges: Iterable[list[str]],
    added: Mapping[str, _Added],
    settings: Mapping[str, Any],
) -> tiktoken.Encoding | ExtendedTokenizer | None:
    """Byte pairs with GPT-2's pattern; None if tiktoken cannot represent them.

    A token that is neither a byte nor the result of a merge nor an added word is a special token.
    """
    if settings["tokenizer_config.json"].get("add_prefix_space"):  # tiktoken adds none
        return None
    merged = ["".join(pair) for pair in merges]
    added, around = _with_settings(vocab, added, settings)
    vocab = {content: token.token for content, token in added.items()} | dict(vocab)
    # tiktoken merges in the order of the token numbers, so the merges have to be in that order.
    order = [vocab.get(piece, -1) for piece in merged]
    in_order = -1 not in order and order == sorted(order)
    if not in_order or not _has_no_gaps(vocab) or not CHARACTER_TO_BYTE.keys() <= vocab.keys():
        return None
    others = vocab.keys() - CHARACTER_TO_BYTE.keys() - set(merged)
    ranks = {
        bytes(CHARACTER_TO_BYTE[character] for character in piece): vocab[piece] for piece in vocab.keys() - others
    }
    special = {content: vocab[content] for content in others}
    if ranks == {bytes([byte]): byte for byte in range(256)} and special.get(END_OF_TEXT) == 256:
        name, pattern = "bytes", BYTES_PATTERN
    else:
        is_gpt2 = _fingerprint(ranks) == GPT2_SHA256 and special.get(END_OF_TEXT) == GPT2_VOCAB_SIZE - 1
        name, pattern = "gpt2" if is_gpt2 else "byte pairs", r50k_pat_str
    base = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    end = special.get(END_OF_TEXT)
    as_made = special.keys() == {END_OF_TEXT} and {around.start, *around.ends} <= {None, end}
    if as_made and all(token.special for token in added.values()):
        return base
    default = UNKNOWN if end is None else Boundaries(end, (end,))
    return _extended(base, added, around.or_else(default))


def _extended(
    base: tiktoken.Encoding | CharTokenizer, added: Mapping[str, _Added], around: Boundaries
) -> ExtendedTokenizer:
    words = [_pattern(content, token) for content, token in added.items() if content and not token.special]
    words.sort(key=len, reverse=True)  # of two that start at the same place, transformers takes the longer one
    tokens = {content: token.token for content, token in added.items()}
    return ExtendedTokenizer(base, tokens, re.compile("|".join(words)) if words else None, around)


def _pattern(content: str, token: _Added) -> str:
    """Matches an added word, with the text of the word as a group."""
    edges = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    space = (r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else "")
    return f"{space[0]}{edges[0]}({re.escape(content)}){edges[1]}{space[1]}"


def _has_no_gaps(vocab: Mapping[str, int]) -> bool:
    """True if the token numbers are 0, 1, 2, … without gaps."""
    return sorted(vocab.values()) == list(range(len(vocab)))


def _fingerprint(ranks: Mapping[bytes, int]) -> str:
    """The SHA-256 of all tokens in order, each preceded by its length."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    return hashlib.sha256(b"".join(bytes([len(token)]) + token for token in ordered)).hexdigest()


def boundaries_in(table: Mapping[str, Any], vocab_size: int) -> Boundaries:
    """The tokens around a text that a config of transformers names, without those that the model does not have."""

    def tokens(key: str) -> tuple[int, ...]:
        value = table.get(key)
        values = value if isinstance(value, list) else [value]
        return tuple(token for token in values if type(token) is int and 0 <= token < vocab_size)

    start, pad = tokens("bos_token_id"), tokens("pad_token_id")
    return Boundaries(start[0] if start else None, tokens("eos_token_id"), pad[0] if pad else None)


def read_named(find: FindFile, vocab_size: int) -> Boundaries:
    """The tokens around a text that the model's `generation_config.json` names, if it has one.

    Raises:
        UserError: the file is damaged, or may not be read.
    """
    path = find(GENERATION)
    return boundaries_in(read_json(path), vocab_size) if path else UNKNOWN
