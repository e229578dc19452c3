"""Run directories and their checkpoints."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from model_files import CONFIG, assert_loads, assert_same_params, save_run
from torch_gpt2 import as_params

from gpt2_jax import load
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.checkpoint_info import read_info
from gpt2_jax.config import ModelConfig
from gpt2_jax.config.toml import to_toml
from gpt2_jax.convert import convert
from gpt2_jax.errors import DamagedError, UserError
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


def test_the_parameters_are_compared_with_a_fingerprint(theirs, tmp_path, capsys):
    params = as_params(theirs.state_dict(), CONFIG)
    run = save_run(tmp_path / "run", CONFIG, params)
    exported = convert(str(run), "orbax", tmp_path / "exported")
    (fingerprint,) = re.findall(r"fingerprint (\w+), of", capsys.readouterr().out)
    assert read_info(exported / "checkpoints" / "3")["fingerprint"] == {"params": fingerprint}
    load(str(run), fingerprint=fingerprint)
    with pytest.raises(DamagedError, match=f"have the fingerprint {fingerprint}, but 00c0ffee was expected"):
        load(str(exported), fingerprint="00c0ffee")
    # A bit of an array flips on the disk. (Of the rows that pad the vocabulary, none would be read.)
    row = np.asarray(params["wte"]["embedding"])[7].tobytes()
    (file,) = (path for path in (exported / "checkpoints" / "3" / "state").rglob("d/*") if row in path.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(row) + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=f"have the fingerprint [0-9a-f]+, but {fingerprint} was expected"):
        load(str(exported))
    with pytest.raises(DamagedError, match=f"but {fingerprint} was expected"):
        convert(str(exported), "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()
