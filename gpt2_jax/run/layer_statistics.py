"""What happens inside the layers while a model trains: `log.layers`.

The step measures the norms of gradients and of updates over weights (`layers.norms_by_layer`). Here another program
reads the new parameters and one sequence per device of the batch, and measures activations. Neither exists when
`log.layers` is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.layers import layer_names, unstack_layers
from gpt2_jax.model import GPT2, MLP, Block, Params, QueriesKeysValues
from gpt2_jax.step import Metrics

SATURATED = 0.01  # a GELU whose derivative is smaller passes nearly no gradient
NORMS = ("grad_norm", "update_ratio")  # of embeddings and the last norm too
STATISTICS = {
    "grad_norm": "gradient norm",
    "update_ratio": "update norm / weight norm",
    "residual_rms": "RMS of the residual stream",
    "saturated_gelu": f"GELUs with a derivative < {SATURATED}",
    "attention_entropy": "attention entropy (nats)",
}

AddActivations = Callable[[Metrics, Params, jax.Array], Metrics]


def make_add_activations(model: GPT2, mesh: Mesh) -> AddActivations:
    """The function that adds the statistics of activations to `Metrics.layers`, each float32 [n_layer]."""
    unrolled = model.clone(config=model.config.unrolled())

    def statistics(params: Params, tokens: jax.Array) -> dict[str, jax.Array]:
        batch = tokens[0, :: tokens.shape[1] // mesh.size, :-1]  # one sequence per device
        _, variables = unrolled.apply(
            {"params": unstack_layers(params)},
            batch,
            method="hidden",
            capture_intermediates=_is_read,
            mutable=[CAPTURED],
        )
        blocks = [variables[CAPTURED][f"h_{layer}"] for layer in range(model.config.n_layer)]
        return {
            "residual_rms": jnp.stack([_rms(block["__call__"][0][0]) for block in blocks]),
            "saturated_gelu": jnp.stack(
                [_saturated(block["mlp"]["c_fc"]["__call__"][0], model.config.gelu == "tanh") for block in blocks]
            ),
            "attention_entropy": jnp.stack([_entropy(*block["attn"]["c_attn"]["__call__"][0][:2]) for block in blocks]),
        }

    measure = jax.jit(statistics, out_shardings=NamedSharding(mesh, P()))

    def add(metrics: Metrics, params: Params, tokens: jax.Array) -> Metrics:
        return metrics._replace(layers={**(metrics.layers or {}), **measure(params, tokens)})

    return add


CAPTURED = "intermediates"  # Flax's name


def _is_read(module: nn.Module, method: str) -> bool:
    """Keeps the outputs of blocks, of the first layer of each MLP, and the queries, keys and values."""
    is_c_fc = module.name == "c_fc" and isinstance(module.parent, MLP)
    return method == "__call__" and (is_c_fc or isinstance(module, Block | QueriesKeysValues))


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def _saturated(x: jax.Array, approximate: bool) -> jax.Array:
    """The share of GELUs with a derivative near 0, for inputs of any shape."""
    x = x.astype(jnp.float32)
    derivative = jax.jvp(lambda x: jax.nn.gelu(x, approximate), (x,), (jnp.ones_like(x),))[1]
    return jnp.mean(jnp.abs(derivative) < SATURATED, dtype=jnp.float32)


def _entropy(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """The mean entropy of the attention weights in nats, over heads and positions: [batch, time, n_head, head_dim]."""
    time, head_dim = queries.shape[1], queries.shape[-1]
    causal = jnp.tril(jnp.ones((time, time), bool))[None]

    def of_head(pair: tuple[jax.Array, jax.Array]) -> jax.Array:  # one at a time, as the weights are large
        logits = jnp.einsum("btd,bsd->bts", *pair, preferred_element_type=jnp.float32) * head_dim**-0.5
        logs = jax.nn.log_softmax(jnp.where(causal, logits, -jnp.inf))
        return -jnp.mean(jnp.sum(jnp.where(causal, jnp.exp(logs) * logs, 0.0), -1))

    return jnp.mean(jax.lax.map(of_head, (jnp.moveaxis(queries, 2, 0), jnp.moveaxis(keys, 2, 0))))


def to_row(layers: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Statistics by name and layer, with 6 digits; None for what is not finite, which JSON does not have."""
    row: dict[str, dict[str, float | None]] = {}
    for name, values in layers.items():
        names = layer_names(len(values) - 3) if name in NORMS else [f"h_{layer}" for layer in range(len(values))]
        numbers = (float(f"{value:.6g}") for value in values)
        row[name] = dict(zip(names, (value if math.isfinite(value) else None for value in numbers), strict=True))
    return row
