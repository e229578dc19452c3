"""Runs that skip outliers, stop at them, or rewind: a rewound run equals the one that was told beforehand."""

import shutil

import jax
import numpy as np
import pytest
from token_files import write_llmc

from gpt2_jax import train as training
from gpt2_jax.checkpoint_info import read_info
from gpt2_jax.config.flags import parse_args
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import DivergedError, UserError
from gpt2_jax.metrics import read_rows

TINY = """
out = "unset"
steps = 24
batch_size = 8

[model]
vocab_size = 257
block_size = 16
n_layer = 1
n_head = 2
n_embd = 16

[data]
tokenizer = "bytes"

[optimizer]
learning_rate = 2e-2
warmup_steps = 2
decay_steps = 24
outlier_window = 6
outlier_z_score = 4.0

[checkpoint]
every = 4

[eval]
every = 8
tokens = 64

[log]
every = 1
"""


# Update 18 is wild, and so is the 22nd.
REWIND = ["--steps", "20", "--eval.every", "0", "--optimizer.on_outlier", "rewind"]


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """Token files of one repeated byte, with two windows of noise: their updates stand out."""
    directory = tmp_path_factory.mktemp("wild")
    tokens = np.full(8 * 24 * 16 + 1, 65, np.uint16)
    for window in (127, 61):  # of updates 18 and 22
        tokens[16 * window + 1 : 16 * window + 16] = np.random.default_rng(window).integers(0, 256, 15)
    write_llmc(directory / "train.bin", tokens)
    write_llmc(directory / "val.bin", tokens[:400])
    (directory / "tiny.toml").write_text(TINY)
    files = ["--data.train", str(directory / "train.bin"), "--data.val", str(directory / "val.bin")]
    return ["--config", str(directory / "tiny.toml"), *files]


def run(wild, out, *flags):
    """Trains, and returns the rows without times and the fingerprint of the last state."""
    config = parse_args("train", "", [*wild, "--out", str(out), *map(str, flags)])
    assert training.train(config, jax.devices()[:1]) == 0
    newest = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return rows_of(out), read_info(newest)["fingerprint"]["state"]


def rows_of(out):
    return [{**row, "tokens_per_second": None} for row in read_rows(out / "metrics.jsonl")]


def test_a_rewound_run_equals_one_that_was_told_beforehand(wild, tmp_path, capsys):
    rows, fingerprint = run(wild, tmp_path / "a", *REWIND)
    skipped = [row["step"] for row in rows if "skipped" in row]
    assert skipped == [18]
    assert "is an outlier, with loss" in (output := capsys.readouterr().out)
    assert "continuing from checkpoints/16, passing over 18\n" in output
    assert read_config(str(tmp_path / "a" / "config.toml")).skip_updates == tuple(skipped)
    told = run(wild, tmp_path / "b", *REWIND, "--skip_updates", *skipped)
    assert told == (rows, fingerprint)
    # The same command resumes with what was passed over.
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        if int(path.name) > 16:
            shutil.rmtree(path)
    assert run(wild, tmp_path / "a", *REWIND) == (rows, fingerprint)


@pytest.mark.slow
def test_outliers_are_skipped_or_end_the_run(wild, tmp_path):
    rows, _ = run(wild, tmp_path / "skip", "--optimizer.on_outlier", "skip")
    skipped = [row for row in rows if "skipped" in row]
    assert [row["step"] for row in skipped] == [18, 22]
    assert all(row["skipped"].startswith("outlier: loss ") for row in skipped)
    assert [row["step"] for row in rows if "loss" in row or "skipped" in row] == list(range(1, 25))
    first = skipped[0]["step"]
    with pytest.raises(DivergedError, match=f"update {first} is an outlier, .* --update {first}$"):
        run(wild, tmp_path / "stop", "--optimizer.on_outlier", "stop")
    assert [row["step"] for row in rows_of(tmp_path / "stop") if "loss" in row] == list(range(1, first))


@pytest.mark.slow
def test_an_update_that_was_done_cannot_be_passed_over(wild, tmp_path):
    run(wild, tmp_path / "a", "--steps", 8)
    with pytest.raises(UserError, match=r"names update 3, and the newest checkpoint of .* is from after update 8"):
        run(wild, tmp_path / "a", "--steps", 12, "--skip_updates", 3)
    rows, _ = run(wild, tmp_path / "a", "--steps", 12, "--skip_updates", 10)
    assert [row["step"] for row in rows if row.get("skipped") == "by skip_updates"] == [10]
