"""Writes tokenizer files of `transformers` beside a model.

The files travel with a model through every format, unchanged, so that `AutoTokenizer` gives the same tokens for the
copy. Only a model without files gets files that are made here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiktoken

from gpt2_jax.data.tokenizer import END_OF_TEXT, UNKNOWN, Boundaries, CharTokenizer, Tokenizer, end_of_text
from gpt2_jax.errors import UserError
from gpt2_jax.files import replace_text
from gpt2_jax.interop.model_files import permission
from gpt2_jax.interop.stored import StoredModel
from gpt2_jax.interop.tokenizer_files import BYTE_TO_CHARACTER, GENERATION, GPT2_VOCABS, SETTINGS, VOCABULARIES

KEPT = (*VOCABULARIES, *SETTINGS, GENERATION)  # the files that `keep_tokenizer` may write


def is_implied(model: StoredModel) -> bool:
    """True if `implied_tokenizer` gives the tokenizer of a model."""
    tokenizer = model.tokenizer
    known = isinstance(tokenizer, tiktoken.Encoding) and tokenizer.name == "gpt2"
    return known and model.config.vocab_size in GPT2_VOCABS


def has_tokenizer_files(model: StoredModel) -> bool:
    """True if a model comes with the files of a tokenizer, of any kind."""
    return any(model.files(name) for name in VOCABULARIES)


def keep_tokenizer(model: StoredModel, directory: Path, make: bool) -> None:
    """Writes the tokenizer of a model beside it, and `generation_config.json` with the tokens around a text.

    Files that the model has are copied as they are.

    Args:
        make: if the model has a tokenizer without files, make files.

    Raises:
        UserError: the copy would be taken for a model with GPT-2's tokenizer, or a file cannot be read.
    """
    if has_tokenizer_files(model):
        for name in (*VOCABULARIES, *SETTINGS):
            if path := model.files(name):
                with permission(path):
                    (directory / name).write_bytes(path.read_bytes())
    elif make and model.tokenizer:
        write_tokenizer(model.tokenizer, directory, model.config.block_size)
    elif make and model.config.vocab_size in GPT2_VOCABS:
        raise UserError(
            f"the tokenizer of {model.where} is not known, and a model with {model.config.vocab_size:,} tokens and no "
            "tokenizer files is taken for one with GPT-2's; put its tokenizer.json beside the model"
        )
    around = model.boundaries if make else model.named
    if make or around != UNKNOWN:
        table = {"_from_model_config": True} | special_ids(around)
        replace_text(directory / GENERATION, json.dumps(table, indent=2) + "\n")


def special_ids(around: Boundaries) -> dict[str, Any]:
    """The inverse of `boundaries_in`: the keys of a config of transformers."""
    ends = around.ends[0] if len(around.ends) == 1 else list(around.ends) or None
    return {"bos_token_id": around.start, "eos_token_id": ends, "pad_token_id": around.pad}


def write_tokenizer(tokenizer: Tokenizer, directory: Path, block_size: int) -> None:
    """Makes the files from which `AutoTokenizer` reads the tokenizer `gpt2`, `bytes` or `chars`.

    Args:
        block_size: the longest text that the model reads, in tokens.
    """
    settings: dict[str, Any] = {"model_max_length": block_size}
    if isinstance(tokenizer, tiktoken.Encoding):
        vocab, merges = _vocab_and_merges(tokenizer)
        replace_text(directory / "vocab.json", json.dumps(vocab))
        replace_text(directory / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
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
        replace_text(directory / "tokenizer.json", json.dumps(table))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        raise TypeError(f"transformers has no files for a {type(tokenizer).__name__}")
    if end_of_text(tokenizer) is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    replace_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


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
