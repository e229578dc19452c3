"""Shows the sequences that an update of a run trains on: a function of its config and its data, without a log."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2_jax.checkpoint_info import complete_checkpoints, read_info
from gpt2_jax.config import TrainConfig
from gpt2_jax.config.toml import read_config
from gpt2_jax.config.validation import validate
from gpt2_jax.data import Data, open_data
from gpt2_jax.data.contents import Contents
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import BatchSource, Location
from gpt2_jax.data.tokenizer import Tokenizer, end_of_text, get_tokenizer
from gpt2_jax.display import count
from gpt2_jax.errors import UserError, strip_controls

CONFIG = "config.toml"  # of a run directory


def describe_update(directory: Path, update: int, limit: int, window_tokens: int) -> Iterator[str]:
    """Yields lines about an update of a run: its size, then the place and the text of each sequence.

    Args:
        directory: the run directory. Nothing is written to it.
        update: 1 for the first update, as `step` in metrics.jsonl.
        limit: the most sequences to show.
        window_tokens: the most tokens of each to show.

    Raises:
        UserError: it is not a run directory, the run has no such update, or its data is missing or has changed.
    """
    config = _read_config(directory)
    if not 1 <= update <= config.steps:
        raise UserError(f"--update {update}: {directory} has the updates 1 to {config.steps}; type one of them")
    data, config = open_data(config)
    compared = _compare_data(directory, data)
    tokenizer = data.tokenizer or get_tokenizer(config.data.tokenizer, config.data.characters)
    block_size = config.model.block_size
    schedule = BatchSchedule(config.batch_size, config.batch_ramp, block_size)
    # The order of the sequences does not depend on micro-batches and processes.
    batches = BatchSource(data.train, schedule, dict.fromkeys(schedule.sizes(), 1))
    locations = batches.locate(update - 1)
    n_sequences = len(locations)
    yield (
        f"update {update:,} of {config.steps:,}: {count(n_sequences, 'sequence')} of {block_size:,} tokens, after "
        f"{schedule.tokens_after(update - 1):,} tokens"
    )
    yield compared
    for number, location in enumerate(locations[:limit], 1):
        stream = data.train.sources[location.source].streams[location.stream]
        length = min(window_tokens, block_size + 1)
        text = _decode(tokenizer, stream[location.start : location.start + length].tolist())
        yield f"\nsequence {number:,}: {strip_controls(_name(location, data, config, tokenizer))}:"
        yield f"    {text!r}{' …' if length <= block_size else ''}"
    if limit < n_sequences:
        yield f"\n… {n_sequences - limit:,} more; --windows {n_sequences} shows all"


def _read_config(directory: Path) -> TrainConfig:
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} has no {CONFIG}; --update needs the directory of a run")
    try:
        config = read_config(str(path), note=lambda line: None)
        validate(config)
    except UserError as error:  # a converted model has a config without a run
        raise UserError(
            f"{path} is not the config of a run ({error}); --update needs the directory of a run"
        ) from error
    return config


def _compare_data(directory: Path, data: Data) -> str:
    """Compares the data with what the newest checkpoint says of it, and returns a line about the result.

    Digests of whole files are compared as far as they are known: computing them would take a second per gigabyte.

    Raises:
        UserError: the data has changed, or the checkpoint cannot be read.
    """
    try:
        steps = complete_checkpoints(directory / "checkpoints")
    except FileNotFoundError:
        steps = []
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    if not steps:
        return "no checkpoint yet: nothing to compare the data with"
    newest = steps[-1]
    info = read_info(newest)
    recorded = info.get("data")
    if recorded != data.fingerprint:
        raise UserError(
            f"the data of {directory} has changed since checkpoint {newest.name} ({recorded} -> {data.fingerprint}), "
            "and with it the sequences of every update; restore the old data"
        )
    Contents(data.files, directory, 0).check(info.get("sha256", []), directory)
    return f"the data is that of checkpoint {newest.name}"


def _name(location: Location, data: Data, config: TrainConfig, tokenizer: Tokenizer) -> str:
    """The file of a sequence and its offset there, in tokens; for a text also in bytes."""
    source, start = data.train.sources[location.source], location.start
    tokens = f"tokens {start:,} to {start + source.block_size + 1:,}"
    if data.documents:
        name, first = next(document for document in reversed(data.documents) if document[1] <= start)
        first += end_of_text(tokenizer) is not None  # it precedes the document, and is not in the file
        n_bytes = len(tokenizer.decode_bytes(source.streams[0][first:start].tolist()))
        return f"{name}, byte {n_bytes:,} ({tokens} of {source.names[0]})"
    glob = f"{config.data.sources[location.source].train}: " if len(data.train.sources) > 1 else ""
    return f"{glob}{source.names[location.stream]}, {tokens}"


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Decodes tokens. Those beyond the tokenizer, for which a model may have room, are shown as numbers: <|50300|>."""
    text = b""
    for known, group in itertools.groupby(tokens, lambda token: token < tokenizer.n_vocab):
        run = list(group)
        text += tokenizer.decode_bytes(run) if known else b"".join(b"<|%d|>" % token for token in run)
    return text.decode("utf-8", "replace")
