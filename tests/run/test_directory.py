"""What a new run finds in a directory that another one has used."""

import dataclasses

import pytest

from gpt2_jax.config import TrainConfig
from gpt2_jax.run.directory import forget_other_run, write_config

NAMES = ("time.jsonl", "trackers.json")


@pytest.mark.parametrize(
    ("change", "forgotten"),
    [({}, False), ({"compilation_cache": "/tmp/programs"}, False), ({"seed": 7}, True)],
)
def test_another_config_in_the_directory_is_another_experiment(tmp_path, change, forgotten):
    config = TrainConfig(out=str(tmp_path), steps=9, batch_size=4)
    write_config(tmp_path, config)
    for name in NAMES:
        (tmp_path / name).write_text("{}")
    forget_other_run(tmp_path, dataclasses.replace(config, **change), NAMES)
    assert [(tmp_path / name).exists() for name in NAMES] == [not forgotten] * 2


def test_a_new_directory_has_nothing_to_forget(tmp_path):
    forget_other_run(tmp_path, TrainConfig(out=str(tmp_path), steps=9, batch_size=4), NAMES)
