"""GPT-2 (Radford et al. 2019) as a Flax module, with the parameter names of the released checkpoints.

    wte/embedding [padded_vocab, n_embd]      wpe/embedding [block_size, n_embd]
    h_N/ln_1, h_N/ln_2, ln_f: scale, bias [n_embd]
    h_N/attn/c_attn/kernel [n_embd, 3 n_embd]   h_N/attn/c_proj/kernel [n_embd, n_embd]
    h_N/mlp/c_fc/kernel [n_embd, 4 n_embd]      h_N/mlp/c_proj/kernel [4 n_embd, n_embd]   each with its bias

With `scan_layers` the blocks' parameters are stacked along a leading axis under `h`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpt2_jax.attention import get_backend
from gpt2_jax.attention.backend import Backend
from gpt2_jax.attention.cached import LayerCache, cached_attention
from gpt2_jax.attention.packed import Packed, packed_attention
from gpt2_jax.config import GPT2Config
from gpt2_jax.layers import stack_layers
from gpt2_jax.loss import head_logits

Params = dict[str, Any]


INIT_STD = 0.02  # of every matrix and both embeddings
LAYER_NORM_EPSILON = 1e-5  # Flax's default is 1e-6
VOCAB_MULTIPLE = 128  # tile size of matrix units; 50257 becomes 50304

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far. Sequences are padded on the left, so that all end in the same slot."""

    layers: tuple[tuple[jax.Array, jax.Array], ...]  # keys and values per layer: [batch · n_head, slots, head_dim]
    slot: jax.Array  # int32 [], the slot of the next token
    pad: jax.Array  # int32 [batch], empty slots before the first token of each sequence


def padded_vocab_size(config: GPT2Config) -> int:
    """Rows of the token embedding: `vocab_size` rounded up to a multiple of 128."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def flat_dot(x: jax.Array, kernel: jax.Array, dimensions: Any = None, **options: Any) -> jax.Array:
    """A `dot_general` for dense layers, [..., in] and [in, out] -> [..., out], as one matmul of two matrices.

    One matmul makes the kernel's gradient cheap. To sum over batch and time as two axes, XLA's CPU backend first
    transposes the gradient of the output, which took a fifth of a training step with 6 layers of width 384.
    """
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], -1)


def _dense(
    config: GPT2Config,
    dtype: jnp.dtype,
    features: int,
    name: str,
    std: float = INIT_STD,
    dot: Callable[..., jax.Array] = flat_dot,
) -> nn.Dense:
    init = nn.initializers.normal(std)
    return nn.Dense(features, use_bias=config.bias, dtype=dtype, kernel_init=init, name=name, dot_general=dot)


def _tanh_gelu(x: jax.Array) -> jax.Array:
    """GPT-2's approximation of GELU. In float16, x³ would overflow from 41 on, and its gradient would be NaN."""
    wide = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
    return nn.gelu(wide).astype(x.dtype)


def _exact_gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) by erf in float32, as in torch. (`jax.nn.gelu` uses erfc, which XLA's CPU backend computes twice.)"""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def _layer_norm(config: GPT2Config, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    # Flax computes the statistics in float32 for every dtype. The two-pass variance is torch's.
    return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=dtype, use_bias=config.bias, use_fast_variance=False, name=name)


class QueriesKeysValues(nn.Module):
    """The projection c_attn: one kernel for queries, keys and values, as in the released checkpoints.

    Attributes:
        backend: its `project_in`, if it has one, replaces the single matmul.
    """

    config: GPT2Config
    dtype: jnp.dtype
    backend: Backend

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """[batch, time, n_embd] -> q, k and v, each [batch, time, n_head, head_dim]."""
        n_embd, head_dim = self.config.n_embd, self.config.n_embd // self.config.n_head
        kernel = self.param("kernel", nn.initializers.normal(INIT_STD), (n_embd, 3 * n_embd)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * n_embd,)) if self.config.bias else jnp.zeros(3 * n_embd)
        project = self.backend.project_in or _project_in
        parts = project(x, kernel, bias.astype(self.dtype), head_dim)
        return [part.reshape(*x.shape[:-1], -1, head_dim) for part in parts]


def _project_in(x: jax.Array, kernel: jax.Array, bias: jax.Array, head_dim: int) -> list[jax.Array]:
    return jnp.split(flat_dot(x, kernel) + bias[None, None], 3, axis=-1)


class Attention(nn.Module):
    """Causal self-attention."""

    config: GPT2Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, deterministic: bool, cache: LayerCache | None, packed: Packed | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """[batch, time, n_embd] -> the same shape, and the cache, if there is one, with the tokens of `x` added."""
        config = self.config
        dropout = 0.0 if deterministic else config.dropout
        head_dim = config.n_embd // config.n_head
        backend = get_backend(config.attention, dtype=self.dtype, time=x.shape[1], head_dim=head_dim, dropout=dropout)
        q, k, v = QueriesKeysValues(config, self.dtype, backend, name="c_attn")(x)
        scale = 1.0 if backend.scales_queries else head_dim**-0.5
        if cache is not None:
            y, cache = cached_attention(q, k, v, cache, scale)
        elif packed is not None:
            y = packed_attention(q, k, v, packed, scale)
        else:
            key = self.make_rng("dropout") if dropout else None
            y = backend.attend(q, k, v, scale, dropout=dropout, dropout_key=key)

        def dot(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
            if backend.project_out:
                return backend.project_out(x, kernel, head_dim)
            return flat_dot(x, kernel, dimensions, **options)

        std = INIT_STD / (2 * config.n_layer) ** 0.5  # 2 residual branches per block (GPT-2 paper, section 2.3)
        y = _dense(config, self.dtype, config.n_embd, "c_proj", std, dot)(y.reshape(x.shape))
        return nn.Dropout(dropout)(y, deterministic), cache


class MLP(nn.Module):
    """The position-wise network, 4 n_embd wide inside, with GELU (Hendrycks and Gimpel 2016)."""

    config: GPT2Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """[batch, time, n_embd] -> [batch, time, n_embd]."""
        config = self.config
        gelu = _tanh_gelu if config.gelu == "tanh" else _exact_gelu
        y = gelu(_dense(config, self.dtype, 4 * config.n_embd, "c_fc")(x))
        std = INIT_STD / (2 * config.n_layer) ** 0.5
        y = _dense(config, self.dtype, config.n_embd, "c_proj", std)(y)
        return nn.Dropout(config.dropout)(y, deterministic)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: GPT2Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, deterministic: bool, cache: LayerCache | None = None, packed: Packed | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """[batch, time, n_embd] -> the same shape, and the cache, if there is one, with the tokens of `x` added."""
        y, cache = Attention(self.config, self.dtype, name="attn")(
            _layer_norm(self.config, self.dtype, "ln_1")(x), deterministic, cache, packed
        )
        x += y
        x += MLP(self.config, self.dtype, name="mlp")(_layer_norm(self.config, self.dtype, "ln_2")(x), deterministic)
        return x, cache


class GPT2(nn.Module):
    """The language model.

    Attributes:
        config: the architecture.
        dtype: the dtype of activations and matmul operands. Parameters are float32.
        gather_params: all-gathers the parameters of a block inside the block; None if they are not sharded. Only
            `step.py` sets it.
    """

    config: GPT2Config
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    gather_params: Callable[[Params], Params] | None = None

    def hidden(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """The output of the final layer norm, which is the input of `loss.cross_entropy`.

        Args:
            tokens: int [batch, time], `time` at most `block_size`.
            deterministic: False applies dropout with the random key "dropout".

        Returns:
            [batch, time, n_embd] in `dtype`.

        Raises:
            ValueError: the sequence is longer than `block_size`.
        """
        time = tokens.shape[-1]
        if time > self.config.block_size:
            raise ValueError(f"{time} tokens are more than the model's block_size of {self.config.block_size}")
        return self._backbone(tokens, jnp.arange(time)[None], deterministic)[0]

    def packed_hidden(self, tokens: jax.Array, packed: Packed) -> jax.Array:
        """`hidden` for rows that hold several texts: int [batch, time] -> [batch, time, n_embd] in `dtype`.

        A row may be longer than `block_size`; no position in it may be.
        """
        return self._backbone(tokens, packed.positions, True, packed=packed)[0]

    @nn.compact
    def _backbone(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        deterministic: bool,
        cache: KVCache | None = None,
        packed: Packed | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Everything before the head. Positions broadcast against tokens. With a cache, layers must not be scanned."""
        config = self.config
        init = nn.initializers.normal(INIT_STD)
        wte = nn.Embed(
            padded_vocab_size(config), config.n_embd, dtype=self.dtype, embedding_init=_init_wte(config), name="wte"
        )
        wpe = nn.Embed(config.block_size, config.n_embd, dtype=self.dtype, embedding_init=init, name="wpe")
        x = nn.Dropout(config.dropout)(wte(tokens) + wpe(positions), deterministic)
        block: Any = Block
        if gather := self.gather_params:
            block = nn.map_variables(block, "params", lambda variables: {"params": gather(variables["params"])})
        if config.remat in REMAT_POLICIES:
            block = nn.remat(
                block, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers, static_argnums=(2,)
            )
        if config.scan_layers:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.n_layer,
            )
            x, _ = layers(config, self.dtype, name="h")(x, deterministic, None, packed)
        else:
            layer_caches = []
            for layer in range(config.n_layer):
                before = cache and LayerCache(*cache.layers[layer], cache.slot, cache.pad)
                x, after = block(config, self.dtype, name=f"h_{layer}")(x, deterministic, before, packed)
                layer_caches.append(after and (after.keys, after.values))
            cache = cache and KVCache(tuple(layer_caches), cache.slot + tokens.shape[1], cache.pad)
        return _layer_norm(config, self.dtype, "ln_f")(x), cache

    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads tokens that follow those in the cache, for generation. Layers must not be scanned.

        Args:
            tokens: int [batch, time], `time` at most the number of free slots. Tokens in padding slots are ignored.
            cache: the cache from `init_cache` or from the previous call.

        Returns:
            Logits of the token after the last one, float32 [batch, vocab_size], and the cache with the tokens added.
        """
        slots = cache.slot + jnp.arange(tokens.shape[1])
        positions = jnp.maximum(slots[None, :] - cache.pad[:, None], 0)
        hidden, after = self._backbone(tokens, positions, True, cache)
        assert after is not None
        return self._head(hidden[:, -1]), after

    def _head(self, hidden: jax.Array) -> jax.Array:
        embedding: jax.Array = self.get_variable("params", "wte")["embedding"]
        return head_logits(hidden, embedding, self.config.vocab_size)[..., : self.config.vocab_size]

    def __call__(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """Logits of the next token at every position: int [batch, time] -> float32 [batch, time, vocab_size].

        Raises:
            ValueError: the sequence is longer than `block_size`.
        """
        return self._head(self.hidden(tokens, deterministic))


def _init_wte(config: GPT2Config) -> nn.initializers.Initializer:
    """Normal rows for the vocabulary, zero rows for the padding. Their gradient is zero, so they stay zero."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        rows = nn.initializers.normal(INIT_STD)(key, (config.vocab_size, config.n_embd), dtype)
        return jnp.pad(rows, ((0, shape[0] - config.vocab_size), (0, 0)))

    return init


def init_cache(model: GPT2, pad: jax.Array, slots: int) -> KVCache:
    """An empty cache for `GPT2.decode`.

    Args:
        pad: int32 [batch], empty slots before the first token of each sequence.
        slots: capacity in tokens, padding included.
    """
    config = model.config
    shape = (pad.size * config.n_head, slots, config.n_embd // config.n_head)
    zeros = jnp.zeros(shape, model.dtype)
    return KVCache(((zeros, zeros),) * config.n_layer, jnp.zeros((), jnp.int32), pad)


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: GPT2, key: jax.Array) -> Params:
    """Initial float32 parameters, equal with scanned and unrolled layers."""
    unrolled = model.clone(config=model.config.unrolled())
    tokens = jnp.zeros((1, 1), jnp.int32)
    params: Params = unrolled.init(key, tokens, method="hidden")["params"]
    return stack_layers(params) if model.config.scan_layers else params


@functools.cache
def abstract_params(model: GPT2) -> Params:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def n_params(params: Params, config: GPT2Config) -> int:
    """Number of parameters, without the padding of the vocabulary."""
    padding = (padded_vocab_size(config) - config.vocab_size) * config.n_embd
    return sum(leaf.size for leaf in jax.tree.leaves(params)) - padding
