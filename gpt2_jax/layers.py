"""The two layouts of a parameter tree: one entry per layer (`h_0`, `h_1`, …), or all layers stacked under `h`.

Checkpoints and exports hold one entry per layer. A model with `scan_layers` holds them stacked, with the layer as the
leading axis of each array.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

STACKED = "h"


def is_stacked(path: tuple[Any, ...]) -> bool:
    """True if the leaf at a `jax.tree_util` key path has a leading layer axis."""
    return any(getattr(key, "key", None) == STACKED for key in path)


def stack_layers(tree: Any) -> Any:
    """Stacks `h_0`, `h_1`, … into `h` in every parameter tree inside `tree`, which may be a whole training state."""

    def stack(params: dict[str, Any]) -> dict[str, Any]:
        layers = [params[f"h_{layer}"] for layer in range(sum(name.startswith("h_") for name in params))]
        rest = {name: value for name, value in params.items() if not name.startswith("h_")}
        return rest | {STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}

    return jax.tree.map(lambda node: stack(node) if _is_params(node) else node, tree, is_leaf=_is_params)


def unstack_layers(tree: Any) -> Any:
    """The inverse of `stack_layers`. Parameter trees that are not stacked are returned as they are."""

    def unstack(params: dict[str, Any]) -> dict[str, Any]:
        if STACKED not in params:
            return params
        n_layer = jax.tree.leaves(params[STACKED])[0].shape[0]
        rest = {name: value for name, value in params.items() if name != STACKED}
        return rest | {
            f"h_{layer}": jax.tree.map(lambda leaf, layer=layer: leaf[layer], params[STACKED])
            for layer in range(n_layer)
        }

    return jax.tree.map(lambda node: unstack(node) if _is_params(node) else node, tree, is_leaf=_is_params)


def norms_by_layer(params: dict[str, Any]) -> jax.Array:
    """The norms of parameters, gradients or updates in the order of `layer_names`: float32 [n_layer + 3]."""

    def squares(tree: Any) -> jax.Array:
        return sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)), jnp.zeros(()))

    if STACKED in params:
        blocks = [*jax.vmap(squares)(params[STACKED])]
    else:
        blocks = [squares(params[f"h_{layer}"]) for layer in range(len(params) - 3)]  # JAX sorts h_10 before h_2
    return jnp.sqrt(jnp.stack([squares(params["wte"]), squares(params["wpe"]), *blocks, squares(params["ln_f"])]))


def layer_names(n_layer: int) -> list[str]:
    """The names of all layers in the order of the forward pass."""
    return ["wte", "wpe", *(f"h_{layer}" for layer in range(n_layer)), "ln_f"]


def _is_params(node: Any) -> bool:
    return isinstance(node, dict) and "wte" in node
