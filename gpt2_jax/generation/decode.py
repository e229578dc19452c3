"""Decoding: a prefill that reads the prompts, then a loop over single tokens with cached keys and values.

Prompts of different lengths are padded on the left, and lengths are rounded up to buckets. All lengths in a bucket run
the same two compiled programs. A continuation depends on the prompt, the seed and the index of the sample, not on the
other sequences of the batch. (Batching changes the order of float additions, which can decide between tokens of nearly
equal probability; bfloat16 has more such ties.)
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

from gpt2_jax.errors import UserError
from gpt2_jax.generation.sampling import MIN_TEMPERATURE, Sampling, mask_top_k_top_p, sample_categorical
from gpt2_jax.layers import unstack_layers
from gpt2_jax.model import GPT2, KVCache, Params, init_cache
from gpt2_jax.resolve import matmul_precision

CHUNK = 64  # the most tokens that the loop draws before the host sees them
CHUNK_SECONDS = 0.2  # a loop that took less draws twice as many tokens the next time
DEFAULT = Sampling()  # the model's own distribution


def generate(
    model: GPT2, params: Params, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = DEFAULT
) -> list[np.ndarray]:
    """Continues prompts of tokens.

    Args:
        params: the parameters of `model`, stacked or not.
        prompts: lists of at least one token, which may differ in length.
        max_new_tokens: the most tokens to draw after each prompt.

    Returns:
        `sampling.samples` continuations of the first prompt, then those of the second, …: int32
        [at most max_new_tokens] each, without the prompt and without `sampling.stop`.

    Raises:
        UserError: an empty prompt, a token outside the vocabulary, or more than `block_size` tokens without
            `sampling.slide`.
    """
    chunks = stream(model, params, prompts, max_new_tokens, sampling)
    rows = np.concatenate([np.zeros((len(prompts) * sampling.samples, 0), np.int32), *chunks], axis=1)
    ends = [np.flatnonzero(row == sampling.stop) for row in rows]
    return [row[: end[0]] if end.size else row for row, end in zip(rows, ends, strict=True)]


def stream(
    model: GPT2, params: Params, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = DEFAULT
) -> Iterator[np.ndarray]:
    """`generate` as an iterator: yields tokens while they are drawn.

    Yields:
        The next tokens of every sequence, int32 [len(prompts) · samples, n]. A sequence that has met `stop` is padded
        with it. The iterator ends when all sequences have met `stop`, or after `max_new_tokens`.
    """
    config = model.config
    _check(prompts, max_new_tokens, config.vocab_size, config.block_size, sampling.slide)
    static, args = _arguments(model, sampling, len(prompts))
    params = in_compute_dtype(unstack_layers(params), model.dtype)
    return _stream(static, params, args, [np.asarray(prompt, np.int32) for prompt in prompts], max_new_tokens)


def in_compute_dtype(params: Params, dtype: jnp.dtype) -> Params:
    """Casts the matrices once, as the model would for every token: with half of the bits, half of the bytes to read."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)


def lower_programs(
    model: GPT2, params: Params, length: int, max_new_tokens: int, sampling: Sampling = DEFAULT
) -> list[jax.stages.Lowered]:
    """The two programs of `stream` for one prompt, lowered to be compiled and not to be run.

    Args:
        params: shapes, dtypes and placements of the parameters, not stacked.
        length: tokens of the prompt.
    """
    static, args = _arguments(model, sampling, 1)
    block_size = model.config.block_size
    length = min(bucket(length), block_size)
    tokens, pad = left_padded([np.zeros(length, np.int32)], length)
    slots = cache_slots(length, max_new_tokens, block_size)
    rest = tokens, pad, args, jnp.int32(0), np.zeros(sampling.samples, bool)
    state = jax.eval_shape(functools.partial(_prefill, static, slots), params, *rest)
    return [_prefill.lower(static, slots, params, *rest), _decode.lower(static, params, state, args, jnp.int32(1))]


def _arguments(model: GPT2, sampling: Sampling, n_prompts: int) -> tuple[_StaticArgs, _Args]:
    """The arguments of the programs that depend on the model and on how tokens are drawn."""
    vocab_size = model.config.vocab_size
    static = _StaticArgs(
        model.clone(config=model.config.unrolled()),
        vocab_size=min(sampling.vocab_size or vocab_size, vocab_size),
        greedy=sampling.temperature < MIN_TEMPERATURE,
        top_k=sampling.top_k > 0,
        top_p=sampling.top_p < 1,
    )
    sample = jnp.tile(jnp.arange(sampling.samples), n_prompts)
    args = _Args(
        keys=jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(sample),
        temperature=jnp.float32(sampling.temperature),
        top_k=jnp.int32(sampling.top_k),
        top_p=jnp.float32(sampling.top_p),
        stop=jnp.int32(-1 if sampling.stop is None else sampling.stop),
    )
    return static, args


def _stream(
    static: _StaticArgs, params: Params, args: _Args, prompts: list[np.ndarray], max_new_tokens: int
) -> Iterator[np.ndarray]:
    if not prompts:
        return
    block_size = static.model.config.block_size
    sequences = [prompt for prompt in prompts for _ in range(args.keys.size // len(prompts))]
    longest = max(map(len, sequences))
    ended = np.zeros(len(sequences), bool)
    n_drawn = 0

    # With the cache, up to `block_size`. The last token drawn needs no position.
    in_cache = min(max_new_tokens, block_size - longest + 1)
    if in_cache > 0:
        length = min(bucket(longest), block_size)
        tokens, pad = left_padded(prompts, length)
        slots = cache_slots(length, max_new_tokens, block_size)
        state = _prefill(static, slots, params, tokens, pad, args, jnp.int32(0), ended)
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
            state, out = jax.block_until_ready(_decode(static, params, state, args, jnp.int32(n)))
            if time.perf_counter() - start < CHUNK_SECONDS:
                size = min(2 * size, CHUNK)

    while n_drawn < max_new_tokens and not ended.all():
        sequences = [sequence[-block_size:] for sequence in sequences]
        tokens, pad = left_padded(sequences, block_size)
        state = _prefill(static, 0, params, tokens, pad, args, jnp.int32(n_drawn), ended)
        drawn, ended = np.asarray(state.token)[:, None], np.asarray(state.ended)
        n_drawn += 1
        sequences = [np.concatenate(pair) for pair in zip(sequences, drawn, strict=True)]
        yield drawn


def bucket(length: int) -> int:
    """The compiled length for `length` tokens: 16, 24, 32, 48, 64, 96, …, at most 1.5 times as long."""
    size = 16
    while length > size:
        size = size * 3 // 2 if size.bit_count() == 1 else size // 3 * 4
    return size


def cache_slots(length: int, max_new_tokens: int, block_size: int) -> int:
    """Slots for the tokens read and drawn until `block_size` is full, equal for all prompts padded to `length`.

    Padding takes up to 15 slots of the smallest bucket, and less than a third of any other.
    """
    return bucket(min(length + max_new_tokens - 1, block_size + max(length // 3, 15)))


def left_padded(sequences: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads sequences with leading zeros: int32 [sequences, length], and the number of zeros, int32 [sequences]."""
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
class _StaticArgs:
    """Arguments that a program is compiled for."""

    model: GPT2
    vocab_size: int
    greedy: bool
    top_k: bool
    top_p: bool


class _Args(NamedTuple):
    """Arguments that change from call to call without another compilation."""

    keys: jax.Array  # random keys [rows], one per sequence
    temperature: jax.Array  # float32 []
    top_k: jax.Array  # int32 []
    top_p: jax.Array  # float32 []
    stop: jax.Array  # int32 [], -1 for none


class _State(NamedTuple):
    cache: KVCache | None
    token: jax.Array  # int32 [rows], drawn last and not in the cache yet
    ended: jax.Array  # bool [rows], the sequence has met `stop`
    n_drawn: jax.Array  # int32 []


@functools.partial(jax.jit, static_argnames=("static", "slots"))
def _prefill(
    static: _StaticArgs,
    slots: int,
    params: Params,
    tokens: jax.Array,
    pad: jax.Array,
    args: _Args,
    n_drawn: jax.Array,
    ended: jax.Array,
) -> _State:
    """Reads int32 [prompts, length], draws a token for each row, and makes a cache of `slots` slots (0: none).

    The rows are the samples of the first prompt, then those of the second, ….
    """
    n_prompts, length = tokens.shape
    rows = ended.size // n_prompts

    def repeat(x: jax.Array) -> jax.Array:
        """Repeats each prompt's part for its samples: [prompts · n, …] -> [rows · n, …]."""
        return jnp.repeat(x.reshape(n_prompts, -1, *x.shape[1:]), rows, axis=0).reshape(-1, *x.shape[1:])

    logits, cache = _read(static, params, tokens, init_cache(static.model, pad, length))
    token, ended = _next(static, args, repeat(logits), n_drawn, ended)
    if not slots:
        return _State(None, token, ended, n_drawn + 1)
    room = ((0, 0), (0, slots - length), (0, 0))
    layers = jax.tree.map(lambda leaf: repeat(jnp.pad(leaf, room)), cache.layers)
    return _State(KVCache(layers, cache.slot, repeat(pad)), token, ended, n_drawn + 1)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def _decode(static: _StaticArgs, params: Params, state: _State, args: _Args, n: jax.Array) -> tuple[_State, jax.Array]:
    """Draws the next `n` tokens, or fewer if all sequences end: int32 [rows, CHUNK], the first `n` filled."""

    def continues(carry: tuple[jax.Array, _State, jax.Array]) -> jax.Array:
        index, state, _ = carry
        return (index < n) & ~jnp.all(state.ended)

    def step(carry: tuple[jax.Array, _State, jax.Array]) -> tuple[jax.Array, _State, jax.Array]:
        index, state, out = carry
        assert state.cache is not None
        logits, cache = _read(static, params, state.token[:, None], state.cache)
        token, ended = _next(static, args, logits, state.n_drawn, state.ended)
        return index + 1, _State(cache, token, ended, state.n_drawn + 1), out.at[:, index].set(token)

    out = jnp.full((state.token.size, CHUNK), args.stop)
    _, state, out = jax.lax.while_loop(continues, step, (jnp.int32(0), state, out))
    return state, out


def _read(static: _StaticArgs, params: Params, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    with jax.default_matmul_precision(matmul_precision(static.model.dtype)):
        return cast(Any, static.model.apply({"params": params}, tokens, cache, method="decode"))


def _next(
    static: _StaticArgs, args: _Args, logits: jax.Array, n_drawn: jax.Array, ended: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next token of every sequence, int32 [rows], and whether the sequence has ended, bool [rows]."""
    logits = logits[:, : static.vocab_size]
    if static.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = mask_top_k_top_p(
            logits / args.temperature,
            args.top_k if static.top_k else None,
            args.top_p if static.top_p else None,
        )
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(args.keys, n_drawn)
        token = sample_categorical(keys, logits)
    token = jnp.where(ended, args.stop, token)
    return token, ended | (token == args.stop)
