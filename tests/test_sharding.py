"""What is split over `fsdp`, and how it becomes whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import MeshConfig
from gpt2_jax.config.toml import read_config
from gpt2_jax.model import GPT2, init_params
from gpt2_jax.sharding import gather, make_mesh, state_sharding

# 1,600 = 2⁶ · 25 and 50,304 = 2⁷ · 393: what 128 or 256 devices do not divide stays whole on each of them. Of
# GPT-2 XL that is 1,600 × 4,800 and 1,600 × 1,600 in every block at 128, and the token embedding too at 256.
XL_WHOLE = {128: 48 * 1600 * 6400, 256: 48 * 1600 * 6400 + 50304 * 1600}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("preset", ["gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m"])
def test_all_matrices_of_the_four_sizes_are_split_and_vectors_are_not(preset, scan_layers):
    config = dataclasses.replace(read_config(preset).model, scan_layers=scan_layers, attention="xla")
    shapes = jax.eval_shape(lambda: init_params(GPT2(config), jax.random.key(0)))
    for fsdp in (2, 4, 8, 16, 32, 64, 128, 256):
        shardings = state_sharding(AbstractMesh((1, fsdp), ("data", "fsdp")), shapes)
        whole = 0
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
        ):
            part = sharding.shard_shape(leaf.shape)
            is_matrix = path[-1].key in ("kernel", "embedding")
            if path[0].key == "h":
                assert part[0] == config.n_layer
            if part == leaf.shape:
                whole += is_matrix * leaf.size
            else:
                assert is_matrix
                assert np.prod(part) * fsdp == leaf.size
        assert whole == (XL_WHOLE.get(fsdp, 0) if preset == "gpt2-1558m" else 0)


def test_scanned_and_unrolled_layers_are_split_alike(tiny_config):
    mesh = make_mesh(MeshConfig(1, 8))
    unrolled, stacked = (
        state_sharding(
            mesh,
            jax.eval_shape(
                lambda scan=scan: init_params(
                    GPT2(dataclasses.replace(tiny_config, n_layer=8, scan_layers=scan)), jax.random.key(0)
                )
            ),
        )
        for scan in (False, True)
    )
    expected = jax.tree.map(lambda sharding: P(None, *sharding.spec) if sharding.spec else P(), unrolled["h_0"])
    assert jax.tree.map(lambda sharding: sharding.spec, stacked["h"]) == expected


def test_gather_rounds_the_parameters_and_not_their_gradients():
    specs = {"rows": P("fsdp"), "columns": P(None, "fsdp"), "whole": P()}
    params = {name: jax.random.normal(jax.random.key(3), (4, 8)) for name in specs}
    # The devices' gradients: in bfloat16, with 8 bits, 256 + 1 is 256 again.
    weights = jnp.array([256.0, 1.0, 1.0, 1.0])

    def on_device(params, weight):
        def loss(params):
            whole = gather(params, specs, jnp.bfloat16)
            return weight[0] * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(whole)), whole

        return jax.grad(loss, has_aux=True)(params)

    grads, whole = jax.jit(
        jax.shard_map(
            on_device,
            mesh=make_mesh(MeshConfig(1, 4), jax.devices()[:4]),
            in_specs=(specs, P("fsdp")),
            out_specs=(specs, P()),
            check_vma=False,
        )
    )(params, weights)
    for name in ("rows", "columns"):
        np.testing.assert_array_equal(whole[name], params[name].astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(grads[name], np.full((4, 8), 259, np.float32))
    np.testing.assert_array_equal(whole["whole"], params["whole"])
