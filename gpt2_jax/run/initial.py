"""`init_from`: opens the model that a run starts from, checks that the config matches it, and keeps its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gpt2_jax.config import TrainConfig
from gpt2_jax.data.tokenizer import CharTokenizer, tokenizer_name
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model
from gpt2_jax.interop.keep_tokenizer import has_tokenizer_files, keep_tokenizer
from gpt2_jax.interop.stored import StoredModel

MUST_MATCH = ("n_layer", "n_head", "n_embd", "bias", "gelu")


def open_initial(config: TrainConfig, saved: TrainConfig | None = None) -> tuple[StoredModel | None, TrainConfig]:
    """Opens the model of `config.init_from`, and fills in the config's open keys from it.

    Args:
        saved: the config of the run to resume, if there is one. It has the open keys, so the model is not opened and
            may be gone.

    Returns:
        The model, or None for random initial parameters and for a run to resume; and the config.

    Raises:
        UserError: there is no such model, or the config does not match it.
    """
    if not config.init_from:
        return None, config
    if saved:
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or saved.model.vocab_size)
        data = dataclasses.replace(config.data, characters=config.data.characters or saved.data.characters)
        return None, dataclasses.replace(config, model=model, data=data)
    stored = open_model(config.init_from)
    ours, theirs = config.model, stored.config
    wrong = {key: getattr(theirs, key) for key in MUST_MATCH if getattr(ours, key) != getattr(theirs, key)}
    if ours.vocab_size not in (0, theirs.vocab_size):
        wrong["vocab_size"] = theirs.vocab_size
    if ours.block_size > theirs.block_size:  # a shorter block takes the first positions
        wrong["block_size"] = theirs.block_size
    if wrong:
        found = ", ".join(f"{key} {value}, not {getattr(ours, key)}" for key, value in wrong.items())
        flags = " ".join(f"--model.{key} {value}" for key, value in wrong.items())
        raise UserError(f"init_from = {config.init_from!r} has {found}; type {flags.replace('False', 'false')}")
    data = config.data
    if data.text:  # token files were encoded by their maker, with any tokenizer
        tokenizer = stored.tokenizer
        name = tokenizer_name(tokenizer) if tokenizer else None
        if name != data.tokenizer:
            advice = f"type --data.tokenizer {name}" if name else "prepare token files with its own tokenizer"
            raise UserError(
                f"init_from = {config.init_from!r} was not trained on data.tokenizer = {data.tokenizer!r}; {advice}"
            )
        if isinstance(tokenizer, CharTokenizer):
            if data.characters not in ("", tokenizer.characters):
                raise UserError(f"init_from = {config.init_from!r} has another alphabet; leave data.characters empty")
            data = dataclasses.replace(data, characters=tokenizer.characters)
    model = dataclasses.replace(ours, vocab_size=theirs.vocab_size)
    return stored, dataclasses.replace(config, model=model, data=data)


def keep_initial_tokenizer(initial: StoredModel, config: TrainConfig, out: Path) -> None:
    """Keeps the tokenizer's files of the initial model in the run directory: a config cannot name added tokens.

    Not if token files were encoded with another tokenizer.

    Raises:
        UserError: the files are damaged, or may not be read.
    """
    if has_tokenizer_files(initial):
        name = tokenizer_name(initial.tokenizer) if initial.tokenizer else None
        if name in (None, config.data.tokenizer):
            keep_tokenizer(initial, out, make=False)
