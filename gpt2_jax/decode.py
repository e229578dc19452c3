"""Generation: a prefill that reads the prompts, then a loop over single tokens with cached keys and values.

Sequences of different lengths are padded on the left, and lengths are rounded up to buckets: all lengths in a bucket
run the same two compiled programs. What is drawn after a prompt depends on the prompt, the seed and the number of
the sample, not on the others in the batch (but for the order of float additions, which may decide between tokens
that are as good as equally probable; in bfloat16 those are more).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import UserError
from gpt2_jax.model import GPT2, Cache, Params, init_cache, unstack_layers
from gpt2_jax.sampling import COLDEST, UNCHANGED, Sampling, draw, restrict

CHUNK = 64  # The most tokens that the loop draws before the host sees them.
CHUNK_SECONDS = 0.2  # A loop that took less draws twice as many tokens the next time.


def generate(
    model: GPT2,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    samples: int = 1,
    sampling: Sampling = UNCHANGED,
    seed: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
    slide: bool = False,
) -> list[np.ndarray]:
    """Continues prompts.

    Args:
        params: of `model`, with layers stacked or not.
        prompts: tokens, at least one in each; of any lengths.
        max_new_tokens: to draw after each prompt, at most.
        samples: continuations of each prompt.
        stop: a token that ends a sequence, such as end-of-text.
        vocab_size: only tokens below it are drawn; a model may have room for more than its tokenizer has.
        slide: past `block_size`, draw each token from the last `block_size` ones. Every position is then another one
            than before, so each token takes a forward pass over the whole window.

    Returns:
        `samples` continuations of the first prompt, then those of the second, …: int32 [up to max_new_tokens] each,
        without the prompt and without `stop`.

    Raises:
        UserError: an empty prompt, tokens that the model does not have, or more than `block_size` without `slide`.
    """
    chunks = stream(
        model,
        params,
        prompts,
        max_new_tokens,
        samples=samples,
        sampling=sampling,
        seed=seed,
        stop=stop,
        vocab_size=vocab_size,
        slide=slide,
    )
    rows = np.concatenate([np.zeros((len(prompts) * samples, 0), np.int32), *chunks], axis=1)
    ends = [np.flatnonzero(row == stop) for row in rows]
    return [row[: end[0]] if end.size else row for row, end in zip(rows, ends, strict=True)]


def stream(
    model: GPT2,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    samples: int = 1,
    sampling: Sampling = UNCHANGED,
    seed: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
    slide: bool = False,
) -> Iterator[np.ndarray]:
    """`generate`, as the tokens come.

    Yields:
        int32 [len(prompts) · samples, some]: the next tokens of every sequence; after its `stop`, more of that. No
        more come when all sequences have met `stop`, or after `max_new_tokens`.
    """
    config = model.config
    _check(prompts, max_new_tokens, config.vocab_size, config.block_size, slide)
    if samples < 1:
        raise UserError(f"samples = {samples}; expected at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed = {seed}; expected 0 or more and below 2**32")
    if vocab_size is not None and vocab_size < 1:
        raise UserError(f"vocab_size = {vocab_size}; expected at least 1")
    if "h" in params:
        params = unstack_layers(params)
    if model.dtype != jnp.float32:  # the model casts them anyway, to read them for every token in half the time
        params = jax.tree.map(lambda leaf: leaf.astype(model.dtype) if leaf.ndim > 1 else leaf, params)
    # Kernels want their own lengths and placements, which single tokens do not have.
    plain = dataclasses.replace(config, attention="xla", scan_layers=False, remat="none")
    program = _Program(
        model.clone(config=plain),
        vocab_size=min(vocab_size or config.vocab_size, config.vocab_size),
        greedy=sampling.temperature < COLDEST,
        top_k=sampling.top_k > 0,
        top_p=sampling.top_p < 1,
    )
    number = jnp.tile(jnp.arange(samples), len(prompts))
    settings = _Settings(
        keys=jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(number),
        temperature=jnp.float32(sampling.temperature),
        top_k=jnp.int32(sampling.top_k),
        top_p=jnp.float32(sampling.top_p),
        stop=jnp.int32(-1 if stop is None else stop),
    )
    return _stream(program, params, settings, [np.asarray(prompt, np.int32) for prompt in prompts], max_new_tokens)


def _stream(
    program: _Program, params: Params, settings: _Settings, prompts: list[np.ndarray], max_new_tokens: int
) -> Iterator[np.ndarray]:
    if not prompts:
        return
    block_size = program.model.config.block_size
    sequences = [prompt for prompt in prompts for _ in range(settings.keys.size // len(prompts))]
    longest = max(map(len, sequences))
    ended = np.zeros(len(sequences), bool)
    n_drawn = 0

    # With the cache, as far as `block_size` goes. The last token that is drawn needs no position.
    in_cache = min(max_new_tokens, block_size - longest + 1)
    if in_cache > 0:
        length = min(bucket(longest), block_size)
        tokens, pad = left_padded(prompts, length)
        slots = cache_slots(length, max_new_tokens, block_size)
        state = _prefill(program, slots, params, tokens, pad, settings, jnp.int32(0), ended)
        out, n, size = state.token[:, None], 1, 1
        while True:
            drawn = np.asarray(out)[:, :n]
            n_drawn += n
            sequences = [np.concatenate(pair) for pair in zip(sequences, drawn, strict=True)]
            yield drawn
            ended = np.asarray(state.ended)
            if n_drawn == in_cache or ended.all():
                break
            n, start = min(size, in_cache - n_drawn), time.perf_counter()
            state, out = jax.block_until_ready(_decode(program, params, state, settings, jnp.int32(n)))
            if time.perf_counter() - start < CHUNK_SECONDS:
                size = min(2 * size, CHUNK)

    while n_drawn < max_new_tokens and not ended.all():
        sequences = [sequence[-block_size:] for sequence in sequences]
        tokens, pad = left_padded(sequences, block_size)
        state = _prefill(program, 0, params, tokens, pad, settings, jnp.int32(n_drawn), ended)
        drawn, ended = np.asarray(state.token)[:, None], np.asarray(state.ended)
        n_drawn += 1
        sequences = [np.concatenate(pair) for pair in zip(sequences, drawn, strict=True)]
        yield drawn


def bucket(length: int) -> int:
    """The compiled length for `length` tokens: 16, 24, 32, 48, 64, 96, …, at most half as much again."""
    size = 16
    while length > size:
        size = size * 3 // 2 if size.bit_count() == 1 else size // 3 * 4
    return size


def cache_slots(length: int, max_new_tokens: int, block_size: int) -> int:
    """Room for what is read and drawn until `block_size` is full, the same for all prompts that are padded to `length`.

    In the smallest bucket up to 15 slots are padding, in the others less than a third.
    """
    return bucket(min(length + max_new_tokens - 1, block_size + max(length // 3, 15)))


def left_padded(sequences: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences with zeros before them -> int32 [sequences, length], and how many zeros, int32 [sequences]."""
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[length - len(sequence) :] = sequence
    return tokens, np.array([length - len(sequence) for sequence in sequences], np.int32)


def _check(prompts: Sequence[Sequence[int]], new: int, vocab_size: int, block_size: int, slide: bool) -> None:
    if new < 1:
        raise UserError(f"max_new_tokens = {new}; expected at least 1")
    for prompt in prompts:
        if len(prompt) == 0:
            raise UserError("a prompt has no tokens; give at least one, such as end-of-text")
        if not np.issubdtype(np.asarray(prompt).dtype, np.integer):
            raise UserError(f"a prompt has tokens of {np.asarray(prompt).dtype}; expected integers")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise UserError(f"a prompt has the token {wrong}; the model's vocabulary is 0 to {vocab_size - 1}")
        if len(prompt) + new > block_size and not slide:
            left = block_size - len(prompt)
            advice = f"take max_new_tokens = {left}, or --slide" if left > 0 else "shorten the prompt, or --slide"
            raise UserError(
                f"{len(prompt)} tokens of prompt and {new} new ones are more than the model's block_size of "
                f"{block_size}; {advice}"
            )


# --- the compiled programs -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a program is compiled for, besides shapes."""

    model: GPT2
    vocab_size: int
    greedy: bool
    top_k: bool
    top_p: bool


class _Settings(NamedTuple):
    """What may change from call to call without compiling again."""

    keys: jax.Array  # random keys [rows], one for each sequence
    temperature: jax.Array  # float32 []
    top_k: jax.Array  # int32 []
    top_p: jax.Array  # float32 []
    stop: jax.Array  # int32 [], -1 for none


class _State(NamedTuple):
    cache: Cache | None
    token: jax.Array  # int32 [rows], drawn last, and not yet in the cache
    ended: jax.Array  # bool [rows], the sequence has met `stop`
    n_drawn: jax.Array  # int32 []


@functools.partial(jax.jit, static_argnames=("program", "slots"))
def _prefill(
    program: _Program,
    slots: int,
    params: Params,
    tokens: jax.Array,
    pad: jax.Array,
    settings: _Settings,
    n_drawn: jax.Array,
    ended: jax.Array,
) -> _State:
    """Reads int32 [prompts, length], draws a token for each row, and keeps a cache of `slots` slots (0: none).

    Each prompt has as many rows, one after the other, as there are rows for each prompt.
    """
    n_prompts, length = tokens.shape
    rows = ended.size // n_prompts

    def spread(x: jax.Array) -> jax.Array:
        """[prompts · any, …] -> [rows · any, …]."""
        return jnp.repeat(x.reshape(n_prompts, -1, *x.shape[1:]), rows, axis=0).reshape(-1, *x.shape[1:])

    logits, cache = _read(program, params, tokens, init_cache(program.model, pad, length))
    token, ended = _next(program, settings, spread(logits), n_drawn, ended)
    if not slots:
        return _State(None, token, ended, n_drawn + 1)
    room = ((0, 0), (0, slots - length), (0, 0))
    layers = jax.tree.map(lambda kept: spread(jnp.pad(kept, room)), cache.layers)
    return _State(Cache(layers, cache.slot, spread(pad)), token, ended, n_drawn + 1)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _decode(
    program: _Program, params: Params, state: _State, settings: _Settings, n: jax.Array
) -> tuple[_State, jax.Array]:
    """Draws the next `n` tokens, or fewer if all sequences end -> int32 [rows, CHUNK], of which `n` are filled."""

    def goes_on(carry: tuple[jax.Array, _State, jax.Array]) -> jax.Array:
        index, state, _ = carry
        return (index < n) & ~jnp.all(state.ended)

    def step(carry: tuple[jax.Array, _State, jax.Array]) -> tuple[jax.Array, _State, jax.Array]:
        index, state, out = carry
        assert state.cache is not None
        logits, cache = _read(program, params, state.token[:, None], state.cache)
        token, ended = _next(program, settings, logits, state.n_drawn, state.ended)
        return index + 1, _State(cache, token, ended, state.n_drawn + 1), out.at[:, index].set(token)

    out = jnp.full((state.token.size, CHUNK), settings.stop)
    _, state, out = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, out))
    return state, out


def _read(program: _Program, params: Params, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    # float32 means float32: left alone, GPUs would round the operands of products to TF32 and TPUs to bfloat16.
    precision = "highest" if program.model.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precision):
        return cast(Any, program.model.apply({"params": params}, tokens, cache, method="decode"))


def _next(
    program: _Program, settings: _Settings, logits: jax.Array, n_drawn: jax.Array, ended: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next token of every sequence, int32 [rows], and whether the sequence has ended."""
    logits = logits[:, : program.vocab_size]
    if program.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = restrict(
            logits / settings.temperature,
            settings.top_k if program.top_k else None,
            settings.top_p if program.top_p else None,
        )
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(settings.keys, n_drawn)
        token = draw(keys, logits)
    token = jnp.where(ended, settings.stop, token)
    return token, ended | (token == settings.stop)
