"""What is split over `fsdp`, how it becomes whole, and where the devices of several slices go."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import MeshConfig
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, init_params
from gpt2_jax.sharding import devices_for, gather, make_mesh, state_sharding

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


# --- Slices that a slower network joins -------------------------------------------------------------------


def simulated(kind, platform, slices):
    """Devices that JAX's functions accept, of slices with this many devices each."""
    ids = itertools.count()
    return [
        SimpleNamespace(
            id=next(ids), device_kind=kind, platform=platform, slice_index=index, process_index=index,
            coords=(place % 4, place // 4, 0), core_on_chip=0, client=SimpleNamespace(runtime_type=""),
        )
        for index, size in enumerate(slices)
        for place in range(size)
    ]  # fmt: skip


def ids_of(devices, data, fsdp, monkeypatch):
    """Where each device is on the mesh. JAX makes no mesh of simulated devices, so only the array is compared."""

    def make_slice(shape, names, devices):
        split = devices[0].platform == "tpu"
        return SimpleNamespace(devices=mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split))

    monkeypatch.setattr("gpt2_jax.sharding.Mesh", lambda devices, *_, **__: devices)
    monkeypatch.setattr(jax, "make_mesh", make_slice)
    return np.vectorize(lambda device: device.id)(make_mesh(MeshConfig(data, fsdp), devices))


@pytest.mark.parametrize(("kind", "platform"), [("TPU v5 lite", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu")])
@pytest.mark.parametrize("fsdp", [1, 2, 4, 8, 16])
def test_fsdp_stays_within_a_slice_and_data_crosses(kind, platform, fsdp, monkeypatch):
    devices = simulated(kind, platform, [16, 16, 16])
    ids = ids_of(devices, -1, fsdp, monkeypatch)
    assert sorted(ids.flat) == list(range(48))
    assert all(len({id // 16 for id in group}) == 1 for group in ids)
    split = platform == "tpu"
    hybrid = mesh_utils.create_hybrid_device_mesh(
        (16 // fsdp, fsdp), (3, 1), devices, allow_split_physical_axes=split
    )  # fmt: skip
    assert (ids == np.vectorize(lambda device: device.id)(hybrid)).all()


def test_the_order_of_the_devices_does_not_matter(monkeypatch):
    """`jax.devices()` orders them by process, and a slice has several."""
    devices = simulated("NVIDIA L4", "gpu", [4, 4])
    shuffled = [devices[place] for place in (0, 4, 1, 5, 2, 6, 3, 7)]
    ids = ids_of(shuffled, 2, 4, monkeypatch)
    assert (ids == ids_of(devices, 2, 4, monkeypatch)).all()


def test_fsdp_over_whole_slices(monkeypatch):
    """A model that is too large for a host is sharded over two of them, at the speed of the network."""
    ids = ids_of(simulated("Tesla T4", "gpu", [4, 4, 4, 4]), -1, 8, monkeypatch)
    assert ids.tolist() == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize(
    ("slices", "fsdp", "message"),
    [
        ([8, 8, 8], 12, "mesh.fsdp = 12 neither fits into a slice or host of 8 devices nor fills several; type --mesh"),
        ([8, 8, 8], 3, "type --mesh.data -1 --mesh.fsdp 8"),
        ([4, 2, 2], 4, "a slice or host of 2 devices .* type --mesh.data -1 --mesh.fsdp 2"),
    ],
)
def test_fsdp_that_would_cross_slices_in_part(slices, fsdp, message, monkeypatch):
    devices = simulated("NVIDIA L4", "gpu", slices)
    with pytest.raises(UserError, match=message):
        ids_of(devices, -1, fsdp, monkeypatch)


def test_slices_of_different_sizes(monkeypatch):
    assert ids_of(simulated("NVIDIA L4", "gpu", [4, 2]), -1, 2, monkeypatch).shape == (3, 2)


@pytest.mark.parametrize(
    ("batch_sizes", "mesh", "count"),
    [
        ([4], MeshConfig(), 4),  # the quickstart
        ([12], MeshConfig(), 6),
        ([16, 64], MeshConfig(), 8),
        ([16, 36], MeshConfig(), 4),
        ([7], MeshConfig(), 7),
        ([4], MeshConfig(data=8), 8),  # what the config names is refused later, where it does not fit
        ([4], MeshConfig(fsdp=2), 8),
    ],
)
def test_a_run_takes_as_many_devices_as_its_batches_divide_over(batch_sizes, mesh, count):
    assert devices_for(batch_sizes, mesh) == jax.devices()[:count]


def test_on_a_tpu_a_run_takes_a_divisor_of_the_slice(monkeypatch):
    devices = [SimpleNamespace(platform="tpu", id=number) for number in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert devices_for([12], MeshConfig()) == devices[:4]


def test_several_processes_all_take_part(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert devices_for([4], MeshConfig()) == jax.devices()
