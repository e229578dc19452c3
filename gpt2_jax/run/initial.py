"""`init_from`: the model that a training run starts from, and whether the run's config fits it."""

from __future__ import annotations

import dataclasses

from gpt2_jax.config import TrainConfig
from gpt2_jax.data.tokenizer import CharTokenizer, tokenizer_name
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model
from gpt2_jax.interop.stored import StoredModel

SAME = ("n_layer", "n_head", "n_embd", "bias", "gelu")  # of the config and of the model


def open_initial(config: TrainConfig, written: TrainConfig | None = None) -> tuple[StoredModel | None, TrainConfig]:
    """The model of `config.init_from`, and the config with what only that could tell filled in.

    Args:
        written: the config of the run that is to be continued. It has what is to be filled in, and the model, which
            may be gone, is not needed again.

    Returns:
        None for the model where none is needed.

    Raises:
        UserError: there is no such model, or the config is that of another one.
    """
    if not config.init_from:
        return None, config
    if written:
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or written.model.vocab_size)
        data = dataclasses.replace(config.data, characters=config.data.characters or written.data.characters)
        return None, dataclasses.replace(config, model=model, data=data)
    stored = open_model(config.init_from)
    ours, theirs = config.model, stored.config
    wrong = {key: getattr(theirs, key) for key in SAME if getattr(ours, key) != getattr(theirs, key)}
    if ours.vocab_size not in (0, theirs.vocab_size):
        wrong["vocab_size"] = theirs.vocab_size
    if ours.block_size > theirs.block_size:  # fewer positions are the first ones
        wrong["block_size"] = theirs.block_size
    if wrong:
        found = ", ".join(f"{key} {value}, not {getattr(ours, key)}" for key, value in wrong.items())
        flags = " ".join(f"--model.{key} {value}" for key, value in wrong.items())
        raise UserError(f"init_from = {config.init_from!r} has {found}; type {flags.replace('False', 'false')}")
    data = config.data
    if data.text:  # files of tokens are as whoever made them says
        tokenizer = stored.tokenizer()
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
