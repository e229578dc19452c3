"""Fingerprints: equal on any mesh and in any layout, different for any change."""

import dataclasses
import re
import zlib

import jax
import numpy as np
import pytest

from gpt2_jax import fingerprint as fingerprints
from gpt2_jax.config import MeshConfig, OptimizerConfig
from gpt2_jax.fingerprint import array_hash, make_state_fingerprint, to_hex
from gpt2_jax.layers import stack_layers, unstack_layers
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import make_mesh, state_sharding
from gpt2_jax.step import TrainState, abstract_state, init_state

OPTIMIZER = OptimizerConfig(decay_steps=1000)


def murmur(x: int) -> int:
    """MurmurHash3's finalizer in Python's integers, from its description."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def test_the_hash_of_an_array_is_the_documented_sum():
    array = np.array([[1.5, -0.0, 0.0], [float("nan"), 3e38, -7.0]], np.float32)
    bits = [int(word) for word in array.view(np.uint32).flatten()]
    salt = zlib.crc32(b"b")
    expected = sum(murmur(word ^ murmur(place ^ salt)) for place, word in enumerate(bits) if word)
    assert array_hash("b", array) == expected


@pytest.fixture(scope="module")
def state(tiny_config):
    """A state whose arrays are all different from 0, on the host."""
    model = GPT2(tiny_config)
    mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    initial = jax.device_get(init_state(model, OPTIMIZER, mesh, 0))
    rng = np.random.default_rng(0)

    def fill(leaf: np.ndarray) -> np.ndarray:
        return np.asarray(leaf + rng.normal(size=leaf.shape) if leaf.dtype == np.float32 else leaf + 3, leaf.dtype)

    return TrainState(np.int32(5), initial.params, jax.tree.map(fill, initial.opt_state))


def place(state, config, data, fsdp):
    """The state and its fingerprint function on a mesh."""
    model, mesh = GPT2(config), make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    abstract = abstract_state(model, OPTIMIZER, mesh)
    placed = jax.device_put(stack_layers(state) if config.scan_layers else state, state_sharding(mesh, abstract))
    return placed, make_state_fingerprint(mesh, abstract)


@pytest.mark.parametrize(
    ("data", "fsdp", "scan"),
    [(8, 1, False), (2, 4, True), (1, 1, True), pytest.param(1, 8, False, marks=pytest.mark.slow)],
)
def test_it_is_equal_on_any_mesh_and_in_any_layout(state, tiny_config, data, fsdp, scan):
    placed, fingerprint = place(state, tiny_config, 1, 1)
    expected = fingerprint(placed)
    named = jax.tree_util.tree_leaves_with_path(unstack_layers(state.params))
    sums = [array_hash("/".join(key.key for key in path), leaf) for path, leaf in named]
    assert expected.params == to_hex(sum(sums)) != expected.state
    placed, fingerprint = place(state, dataclasses.replace(tiny_config, scan_layers=scan), data, fsdp)
    found = fingerprint(placed)
    assert (found.params, found.state, found.deviating()) == (expected.params, expected.state, [])


def test_it_changes_with_any_bit_and_with_swapped_rows(state, tiny_config):
    placed, fingerprint = place(state, tiny_config, 2, 4)
    before = fingerprint(placed)
    kernel = state.params["h_1"]["mlp"]["c_fc"]["kernel"]
    rng = np.random.default_rng(1)
    changed = []
    for _ in range(8):
        flipped = kernel.copy()
        flipped.view(np.uint32)[tuple(map(rng.integers, kernel.shape))] ^= 1 << rng.integers(32)
        changed.append(flipped)
    swapped = kernel.copy()
    swapped[[3, 7]] = kernel[[7, 3]]
    seen = {before.state}
    for other in (*changed, swapped):
        params = {**state.params, "h_1": {**state.params["h_1"], "mlp": {**state.params["h_1"]["mlp"]}}}
        params["h_1"]["mlp"]["c_fc"] = {**params["h_1"]["mlp"]["c_fc"], "kernel": other}
        found, _ = place(state._replace(params=params), tiny_config, 2, 4)
        seen.add(fingerprint(found).state)
    moved = {**state.params, "h_0": state.params["h_1"], "h_1": state.params["h_0"]}  # the layers
    seen.add(fingerprint(place(state._replace(params=moved), tiny_config, 2, 4)[0]).state)
    assert len(seen) == 11


@pytest.mark.parametrize(("name", "device", "named"), [("wte", 5, [5]), ("wpe", 5, [5]), ("ln_f", 0, [0])])
def test_the_device_whose_copy_differs_is_named(state, tiny_config, name, device, named):
    """On a mesh of 4 × 2, `wte` and `wpe` are sharded and `ln_f` is replicated."""
    placed, fingerprint = place(state, tiny_config, 4, 2)
    leaf = jax.tree.leaves(placed.params[name])[0]
    shards = [np.array(shard.data) for shard in leaf.addressable_shards]
    shards[device].view(np.uint32).flat[1] ^= 1 << 20
    pieces = [jax.device_put(shard, old.device) for shard, old in zip(shards, leaf.addressable_shards, strict=True)]
    broken = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)
    key = next(iter(placed.params[name]))
    params = {**placed.params, name: {**placed.params[name], key: broken}}
    assert fingerprint(placed._replace(params=params)).deviating() == named


def test_of_two_copies_both_are_named(state, tiny_config):
    placed, fingerprint = place(state, tiny_config, 2, 1)
    scale = placed.params["ln_f"]["scale"]
    pieces = [
        jax.device_put(np.array(shard.data) + index, shard.device)
        for index, shard in enumerate(scale.addressable_shards)
    ]
    broken = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, pieces)
    params = {**placed.params, "ln_f": {**placed.params["ln_f"], "scale": broken}}
    assert fingerprint(placed._replace(params=params)).deviating() == [0, 1]


def test_zeros_do_not_count(tiny_config):
    array = np.zeros((4, 8), np.float32)
    assert array_hash("wte", array) == 0
    array[:2] = 1.0
    assert array_hash("wte", array) == array_hash("wte", array[:2].copy())


def test_the_only_collective_gathers_16_bytes_of_each_device(state, tiny_config, monkeypatch):
    """Read from the compiled programs, with arrays that are sharded and arrays that are not."""
    jit, programs = jax.jit, []

    def recorded(jitted):
        def call(*args):
            programs.append(jitted.lower(*args).compile().as_text())
            return jitted(*args)

        return call

    monkeypatch.setattr(jax, "jit", lambda function, **options: recorded(jit(function, **options)))
    monkeypatch.setattr(fingerprints, "_add", recorded(fingerprints._add))
    placed, fingerprint = place(state, tiny_config, 2, 4)
    programs.clear()  # those that placed the state
    fingerprint(placed)
    assert len(programs) > 5
    collectives = re.findall(
        r"= (\S+) (?:all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", "\n".join(programs), re.MULTILINE
    )
    assert [re.sub(r"\{.*", "", shape) for shape in collectives] == ["u32[8,2,2]"]
