"""Checkpoints: which are kept, what is restored, and recovery from an interrupted save."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.checkpoint_info import complete_checkpoints
from gpt2_jax.config import MeshConfig
from gpt2_jax.errors import DamagedError
from gpt2_jax.sharding import make_mesh


def state(value):
    return {"step": jnp.asarray(value, jnp.int32), "params": {"kernel": jnp.full((8, 4), value, jnp.float32)}}


def abstract(sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state(0))


SINGLE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = enumerate([3.0, 1.0, None, 2.0, None, 5.0], start=1)
    for step, val_loss in losses:
        if step in (1, 4, 5):  # reopened: it still knows the best one
            checkpoints = Checkpoints(tmp_path / "c", keep=2)
        checkpoints.save(step, state(step), {}, {"val_loss": val_loss} if val_loss else None)
        if step in (3, 4, 6):
            checkpoints.close()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert (checkpoints.latest(), checkpoints.best()) == (6, 2)


def test_a_restored_state_equals_the_saved_one(tmp_path):
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(7, state(3), {"tokens": 11, "data": "é"})
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        restored = checkpoints.restore(7, abstract(SINGLE))
        jax.tree.map(np.testing.assert_array_equal, restored, state(3))
        assert checkpoints.info(7) == {"tokens": 11, "data": "é", "step": 7, "metrics": {}}


def test_restores_on_another_mesh(tmp_path):
    eight = make_mesh(MeshConfig(2, 4))
    sharded = jax.device_put(jnp.arange(32.0).reshape(8, 4), NamedSharding(eight, P("fsdp")))
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(1, {"kernel": sharded}, {})
        for mesh in (make_mesh(MeshConfig(1, 2), jax.devices()[:2]), make_mesh(MeshConfig(1, 1), jax.devices()[:1])):
            target = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
            restored = checkpoints.restore(1, {"kernel": target})["kernel"]
            np.testing.assert_array_equal(restored, sharded)
            assert restored.sharding == target.sharding


def test_a_save_copies_the_state_before_it_returns(tmp_path):
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        array = jnp.arange(1000.0)
        checkpoints.save(1, {"x": array}, {})
        jax.jit(lambda x: x + 1, donate_argnums=0)(array)  # as the training step does right after a save
        target = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=SINGLE)}
        np.testing.assert_array_equal(checkpoints.restore(1, target)["x"], np.arange(1000.0))


def test_incomplete_checkpoints_are_ignored_and_removed(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(1, state(1), {})
    half = tmp_path / "c" / "2"
    half.mkdir()
    (half / "state").write_text("half")
    assert [path.name for path in complete_checkpoints(tmp_path / "c")] == ["1"]
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, state(2), {})  # the step of the incomplete one
    assert (half / "state").is_dir()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]


def test_no_directory_is_renamed(tmp_path, monkeypatch):
    """Object stores rename a directory file by file, so a kill would leave a part."""
    renamed = []
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def record(source, *args, original=original, **keywords):
            renamed.append(os.path.isdir(source))
            return original(source, *args, **keywords)

        monkeypatch.setattr(os, name, record)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(1, state(1), {}, {"val_loss": 1.0})
        checkpoints.save(2, state(2), {}, {"val_loss": 0.5})
    assert [path.name for path in complete_checkpoints(tmp_path / "c")] == ["2"]
    assert not any(renamed)


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(1, state(1), {"tokens": 1})
    for item in ("info", "state"):
        for file in (tmp_path / "c" / "1" / item).rglob("*"):
            if file.is_file():
                file.unlink()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        with pytest.raises(DamagedError, match=r"c/1 is damaged \(.*\)"):
            checkpoints.info(1)
        with pytest.raises(DamagedError, match=r"c/1 is damaged \(.*\)"):
            checkpoints.restore(1, abstract(SINGLE))
