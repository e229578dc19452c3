"""Opens the data of a run: training and validation windows, and the tokenizer."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

from gpt2_jax.config import DataConfig, GPT2Config, SourceConfig, TrainConfig
from gpt2_jax.data.corpus import read_corpus, tokenize
from gpt2_jax.data.manifest import read_manifest
from gpt2_jax.data.pipeline import ShuffledWindows, TokenWindows
from gpt2_jax.data.shards import TokenArray, Tokens, find_token_files, open_token_files
from gpt2_jax.data.tokenizer import (
    CharTokenizer,
    Tokenizer,
    end_of_text_token,
    get_tokenizer,
    read_characters,
    vocab_size,
)
from gpt2_jax.errors import UserError

EDGE_TOKENS = 4096  # The fingerprint covers this many tokens at both ends of a token file.


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        train: the endless sequence of training windows.
        train_tokens: the number of tokens in all training sources.
        val: the validation windows.
        tokenizer: None if the run decodes no tokens.
        val_text: the held-out bytes that `val` predicts; None for token files.
        fingerprint: a checksum of all tokens of a text, or of the sizes and ends of token files, at once. A run is only
            resumed with the same data. `contents.py` has the checksums of whole files.
        files: the token files, those to validate on last; empty for a text.
        documents: the names of the training documents of a text, each with the number of tokens before it; empty for
            token files.
    """

    train: ShuffledWindows
    train_tokens: int
    val: TokenWindows
    tokenizer: Tokenizer | None
    val_text: bytes | None
    fingerprint: str
    files: tuple[Path, ...] = ()
    documents: tuple[tuple[str, int], ...] = ()


def open_data(config: TrainConfig) -> tuple[Data, TrainConfig]:
    """Opens the data that `config.data` names.

    Returns:
        The data, and the config with the vocabulary size and the characters of the data filled in.

    Raises:
        UserError: the data is missing, damaged or too short, or has tokens of another vocabulary.
    """
    return _open_text(config) if config.data.text else _open_files(config)


def _open_text(config: TrainConfig) -> tuple[Data, TrainConfig]:
    data = config.data
    corpus = tokenize(read_corpus(data), data)
    if isinstance(corpus.tokenizer, CharTokenizer):
        data = dataclasses.replace(data, characters=corpus.tokenizer.characters)
    model = _with_vocab(config.model, corpus.tokenizer.n_vocab, data)
    config = dataclasses.replace(config, data=data, model=model)
    train = _windows(config, [TokenArray(corpus.train)], [f"the training part of {data.text!r}"], data.document_starts)
    val = _windows(config, [TokenArray(corpus.val)], [f"the validation part of {data.text!r}"])
    crc = zlib.crc32(corpus.val.tobytes(), zlib.crc32(corpus.train.tobytes()))
    fingerprint = f"{len(corpus.train)} + {len(corpus.val)} tokens, crc32 {crc:08x}"
    sequences = ShuffledWindows([train], [1.0], config.seed)
    opened = Data(sequences, train.n_tokens, val, corpus.tokenizer, corpus.val_text, fingerprint, (), corpus.documents)
    return opened, config


def _open_files(config: TrainConfig) -> tuple[Data, TrainConfig]:
    data = config.data
    sources = data.sources or (SourceConfig(data.train),)
    key = "data.sources" if data.sources else "data.train"
    files = [find_token_files(source.train, key) for source in sources]
    val_files = find_token_files(data.val, "data.val")
    all_files = tuple(path for paths in [*files, val_files] for path in paths)
    for directory in dict.fromkeys(path.parent for path in all_files):
        manifest = read_manifest(directory)
        if manifest and manifest.settings["tokenizer"] != data.tokenizer:
            raise UserError(
                f"{directory} was made with the tokenizer {manifest.settings['tokenizer']!r}, but data.tokenizer is "
                f"{data.tokenizer!r}; type --data.tokenizer {manifest.settings['tokenizer']}, and do not mix the two"
            )
    meta = files[0][0].parent / "meta.pkl"
    if data.tokenizer == "chars" and not data.characters and meta.exists():
        data = dataclasses.replace(data, characters=read_characters(meta).characters)
    model = _with_vocab(config.model, vocab_size(data.tokenizer, data.characters), data)
    config = dataclasses.replace(config, data=data, model=model)
    train = [_windows(config, open_token_files(paths), paths, data.document_starts) for paths in files]
    val = _windows(config, open_token_files(val_files), val_files)
    # Only samples, prompts and tasks need the tokenizer, and loading it may download it.
    needed = config.eval.sample_tokens or config.eval.prompts or config.eval.tasks
    tokenizer = get_tokenizer(data.tokenizer, data.characters) if needed else None
    crc = 0
    for windows in (*train, val):
        for stream in windows.streams:  # only the size and the ends: fast for files of any size
            ends = stream[:EDGE_TOKENS].tobytes() + stream[-EDGE_TOKENS:].tobytes()
            crc = zlib.crc32(b"%d" % len(stream) + ends, crc)
    n_tokens = sum(windows.n_tokens for windows in train)
    shares = "".join(
        f", {source.weight} × {windows.n_tokens}" for source, windows in zip(data.sources, train, strict=False)
    )
    fingerprint = f"{n_tokens} + {val.n_tokens} tokens, crc32 {crc:08x}{shares}"
    sequences = ShuffledWindows(train, [source.weight for source in sources], config.seed)
    return Data(sequences, n_tokens, val, tokenizer, None, fingerprint, all_files), config


def _windows(
    config: TrainConfig, streams: Sequence[Tokens], names: Sequence[str | Path], document_starts: bool = False
) -> TokenWindows:
    document_start = end_of_text_token(config.data.tokenizer) if document_starts else None
    model = config.model
    return TokenWindows(streams, list(map(str, names)), model.block_size, model.vocab_size, document_start)


def _with_vocab(model: GPT2Config, n_vocab: int, data: DataConfig) -> GPT2Config:
    if model.vocab_size == 0:
        return dataclasses.replace(model, vocab_size=n_vocab)
    if model.vocab_size < n_vocab:
        raise UserError(
            f"model.vocab_size = {model.vocab_size} is below the {n_vocab} tokens of data.tokenizer = "
            f"{data.tokenizer!r}; type --model.vocab_size 0 to use the tokenizer's"
        )
    return model
