"""Run directories and their checkpoints."""

import dataclasses
import shutil

import jax
import pytest
from model_files import CONFIG, assert_loads, assert_same_params, save_run
from torch_gpt2 import as_params

from gpt2_jax import load
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import ModelConfig
from gpt2_jax.config.toml import to_toml
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model


def test_a_run_directory_loads_its_newest_checkpoint(theirs, tmp_path):
    params = as_params(theirs.state_dict(), CONFIG)
    run = save_run(tmp_path / "run", CONFIG, params)
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(12, {"params": jax.tree.map(lambda leaf: 2 * leaf, params)}, {})
    assert_loads(run / "checkpoints" / "3", theirs)
    assert_same_params(load(str(run)).params, jax.tree.map(lambda leaf: 2 * leaf, params))
    assert open_model(str(run)).step == 12


def test_a_missing_or_incomplete_checkpoint_is_one_clear_line(theirs, tmp_path):
    run = save_run(tmp_path / "run", CONFIG, as_params(theirs.state_dict(), CONFIG))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(str(tmp_path / "empty"))
    (run / "config.toml").write_text(to_toml(ModelConfig(dataclasses.replace(CONFIG, n_layer=4))))
    with pytest.raises(UserError, match="has no h_3"):
        load(str(run))
    (run / "checkpoints" / "3" / "state" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"the checkpoint .* is damaged"):
        load(str(run))
    shutil.rmtree(run / "checkpoints" / "3" / "state")
    with pytest.raises(UserError, match=r"the checkpoint .* is damaged"):
        load(str(run))
    with pytest.raises(UserError, match="does not exist; expected a run directory or a checkpoint in it"):
        load(str(tmp_path / "nothing"))
