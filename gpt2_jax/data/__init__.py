"""The data of a run: which windows to train and to validate on, and with which tokenizer."""

from __future__ import annotations

import dataclasses
import zlib

from gpt2_jax.config import DataConfig, GPT2Config, TrainConfig, UserError
from gpt2_jax.data.corpus import read_corpus, tokenize
from gpt2_jax.data.pipeline import Windows
from gpt2_jax.data.shards import find_shards, read_shard
from gpt2_jax.data.tokenizer import CharTokenizer, Tokenizer, get_tokenizer, vocab_size

EDGE = 4096  # Tokens at either end of a token file that its fingerprint covers.


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and validation windows.

    Attributes:
        tokenizer: None where nothing is to be decoded.
        val_text: the held-out bytes that `val` predicts; None for token files, whose text is not at hand.
        fingerprint: of all tokens (of token files: sizes and edges); a run does not continue on other data.
    """

    train: Windows
    val: Windows
    tokenizer: Tokenizer | None
    val_text: bytes | None
    fingerprint: str


def open_data(config: TrainConfig) -> tuple[Data, TrainConfig]:
    """Opens what `config.data` names; also returns the config with what only the data could tell filled in.

    Raises:
        UserError: data that is missing, damaged, too short, or not of this vocabulary.
    """
    data, model = config.data, config.model
    if data.text:
        corpus = tokenize(read_corpus(data), data)
        if isinstance(corpus.tokenizer, CharTokenizer):
            data = dataclasses.replace(data, characters=corpus.tokenizer.characters)
        model = _with_vocab(model, corpus.tokenizer.n_vocab, data)
        windows = [
            Windows([stream], [f"the {side} part of {data.text!r}"], model.block_size, model.vocab_size)
            for side, stream in (("training", corpus.train), ("validation", corpus.val))
        ]
        crc = zlib.crc32(corpus.val.tobytes(), zlib.crc32(corpus.train.tobytes()))
        fingerprint = f"{len(corpus.train)} + {len(corpus.val)} tokens, crc32 {crc:08x}"
        opened = Data(windows[0], windows[1], corpus.tokenizer, corpus.val_text, fingerprint)
    else:
        train_files, val_files = find_shards(data.train, "data.train"), find_shards(data.val, "data.val")
        model = _with_vocab(model, vocab_size(data.tokenizer, data.characters), data)
        train, val = (
            Windows([read_shard(path) for path in paths], list(map(str, paths)), model.block_size, model.vocab_size)
            for paths in (train_files, val_files)
        )
        # Tokens need no tokenizer to train on: it is asked for, and perhaps downloaded, only to write a sample.
        tokenizer = get_tokenizer(data.tokenizer, data.characters) if config.eval.sample_tokens else None
        crc = 0
        for stream in (*train.streams, *val.streams):  # sizes and edges: read at once, however large it all is
            crc = zlib.crc32(b"%d" % len(stream) + stream[:EDGE].tobytes() + stream[-EDGE:].tobytes(), crc)
        fingerprint = f"{train.n_tokens} + {val.n_tokens} tokens, crc32 {crc:08x}"
        opened = Data(train, val, tokenizer, None, fingerprint)
    return opened, dataclasses.replace(config, data=data, model=model)


def _with_vocab(model: GPT2Config, n_vocab: int, data: DataConfig) -> GPT2Config:
    if model.vocab_size == 0:
        return dataclasses.replace(model, vocab_size=n_vocab)
    if model.vocab_size < n_vocab:
        raise UserError(
            f"model.vocab_size = {model.vocab_size} is below the {n_vocab} tokens of data.tokenizer = "
            f"{data.tokenizer!r}; type --model.vocab_size 0 to take the tokenizer's"
        )
    return model
