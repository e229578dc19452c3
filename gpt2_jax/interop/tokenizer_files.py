"""Tokenizer files of `transformers`: `vocab.json` with `merges.txt`, or `tokenizer.json`.

These files write a token as a string with one printable character per byte (`bytes_to_unicode` in GPT-2's
`encoder.py`). Bytes that are printable in Latin-1 are written as themselves, the others as the characters from U+0100
on.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2_jax.data.tokenizer import (
    END_OF_TEXT,
    GPT2_VOCAB_SIZE,
    CharTokenizer,
    Tokenizer,
    byte_encoding,
    end_of_text,
    gpt2_encoding,
    tokenizer_name,
)
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import FindFile

_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}

# `_fingerprint` of GPT-2's vocabulary.
GPT2_SHA256 = "b83936794d5c58d4bf7f24cb0100cd291b9306d80ba0e2ff11988886d2d9c1ec"


def read_tokenizer(find: FindFile, vocab_size: int) -> Tokenizer | None:
    """Reads the tokenizer of a model: byte pairs or characters. Returns None if it is of another kind, or unknown.

    Args:
        find: finds the files of the model.
        vocab_size: the model's. If there are no tokenizer files, GPT-2's size implies GPT-2's tokenizer.

    Raises:
        UserError: a file is damaged.
    """
    vocab, merges = find("vocab.json"), find("merges.txt")
    if vocab and merges:
        lines = _read(merges).splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        with _report_damage(vocab):
            return _byte_pair_encoding(_parse(vocab), pairs)
    if path := find("tokenizer.json"):
        with _report_damage(path):
            return _from_tokenizer_json(_parse(path))
    return gpt2_encoding() if vocab_size == GPT2_VOCAB_SIZE else None


@contextlib.contextmanager
def _report_damage(path: Path) -> Iterator[None]:
    """Turns the exceptions of a file with an unexpected structure into a `UserError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer of transformers ({error!r}); copy it again") from error


def _from_tokenizer_json(table: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a `tokenizer.json`; None if it is of another kind."""
    model, pre_tokenizer = table["model"], table["pre_tokenizer"]
    if model["type"] != "BPE" or table["normalizer"]:
        return None
    if pre_tokenizer is None and not model["merges"]:
        characters = sorted(model["vocab"], key=model["vocab"].get)
        plain = _has_no_gaps(model["vocab"]) and all(len(character) == 1 for character in characters)
        return CharTokenizer("".join(characters)) if plain else None
    if not pre_tokenizer or pre_tokenizer["type"] != "ByteLevel":
        return None
    if pre_tokenizer["add_prefix_space"] or not pre_tokenizer.get("use_regex", True):
        return None
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in table["added_tokens"]}
    return _byte_pair_encoding(model["vocab"] | added, pairs)


def _byte_pair_encoding(vocab: Mapping[str, int], merges: Iterable[list[str]]) -> tiktoken.Encoding | None:
    """Byte pairs with GPT-2's pattern; None if tiktoken cannot represent them.

    A token that is neither a byte nor the result of a merge is a special token.
    """
    merged = ["".join(pair) for pair in merges]
    special = vocab.keys() - CHARACTER_TO_BYTE.keys() - set(merged)
    # tiktoken merges in the order of the token numbers, so the merges have to be in that order.
    order = [vocab.get(piece, -1) for piece in merged]
    in_order = -1 not in order and order == sorted(order)
    if not in_order or not _has_no_gaps(vocab) or not CHARACTER_TO_BYTE.keys() <= vocab.keys():
        return None
    ranks = {
        bytes(CHARACTER_TO_BYTE[character] for character in piece): vocab[piece] for piece in vocab.keys() - special
    }
    if ranks == {bytes([byte]): byte for byte in range(256)} and special == {END_OF_TEXT}:
        return byte_encoding()
    name = "gpt2" if _fingerprint(ranks) == GPT2_SHA256 else "byte pairs"
    return tiktoken.Encoding(
        name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={token: vocab[token] for token in special}
    )


def _has_no_gaps(vocab: Mapping[str, int]) -> bool:
    """True if the token numbers are 0, 1, 2, … without gaps."""
    return sorted(vocab.values()) == list(range(len(vocab)))


def _fingerprint(ranks: Mapping[bytes, int]) -> str:
    """The SHA-256 of all tokens in order, each preceded by its length."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    return hashlib.sha256(b"".join(bytes([len(token)]) + token for token in ordered)).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from error


def _parse(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} holds {type(table).__name__}; expected a JSON object")
    return table


# --- writing -------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Tokenizer, directory: Path, block_size: int, end: int | None) -> None:
    """Writes the files from which `AutoTokenizer` reads the same tokenizer.

    Args:
        block_size: the longest text that the model reads, in tokens.
        end: the token that ends a text, if there is one.
    """
    settings: dict[str, Any] = {"model_max_length": block_size}
    if isinstance(tokenizer, tiktoken.Encoding):
        vocab, merges = _vocab_and_merges(tokenizer)
        (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    elif isinstance(tokenizer, CharTokenizer):
        vocab = {character: token for token, character in enumerate(tokenizer.characters)}
        table: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
        (directory / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        raise TypeError(f"transformers has no files for a {type(tokenizer).__name__}")
    if end is not None:
        name = tokenizer.decode_bytes([end]).decode("utf-8", "replace")
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), name)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_tokenizer_unless_gpt2(tokenizer: Tokenizer | None, directory: Path, block_size: int) -> None:
    """`write_tokenizer` for formats that imply GPT-2's tokenizer: writes any other one, if it is known."""
    if tokenizer and tokenizer_name(tokenizer) != "gpt2":
        write_tokenizer(tokenizer, directory, block_size, end_of_text(tokenizer))


def _vocab_and_merges(encoding: tiktoken.Encoding) -> tuple[dict[str, int], list[str]]:
    """The contents of `vocab.json`, and the lines of `merges.txt`, recovered from the order of tiktoken's tokens."""
    special = {encoding.encode_single_token(token): token for token in encoding.special_tokens_set}
    ranks = {
        encoding.decode_single_token_bytes(token): token for token in range(encoding.n_vocab) if token not in special
    }

    def text(token: bytes) -> str:
        return "".join(BYTE_TO_CHARACTER[byte] for byte in token)

    merges = [" ".join(map(text, _halves(token, ranks))) for token in ranks if len(token) > 1]
    vocab = {text(token): rank for token, rank in ranks.items()} | {token: rank for rank, token in special.items()}
    return vocab, merges


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens that merge into `token`: the encoding of its bytes with only lower-numbered tokens."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts
