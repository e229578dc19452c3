"""Rows, throughput, MFU, the plain lines and the plot."""

import errno
import io
import json
import math
import os

import jax
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS
from gpt2_jax.metrics import (
    MetricsFile,
    Throughput,
    ThroughputMeter,
    flops_per_token,
    format_row,
    loss_figure,
    plot,
    read_rows,
)


def test_rows_survive_a_cut_off_line_and_those_beyond_the_checkpoint_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write({"step": step, "tokens": 8, "loss": 1 / 3})
    with path.open("a") as broken:
        broken.write('{"step": 6, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5]
    MetricsFile(path, 3).write({"step": 4, "tokens": 8, "loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"step": step, "tokens": 8, "loss": 1 / 3} for step in (1, 2, 3)),
        {"step": 4, "tokens": 8, "loss": 0.5},
    ]
    MetricsFile(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '{"tokens": 5}',
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1e3}',
        '{"step": -1}',
        f'{{"step": {10**30}}}',
        '{"step": 1, "toke\\u0000s": 256, "loss": 5.5}',
        '{"step": 1, "tokens": 256, "loss": "5.5"}',
        '{"step": 1, "tokens": [], "val_loss": 5.5}',
        "[" * 100_000,
        "é",  # written as Latin-1
        " " * (1 << 21),
    ],
)
def test_lines_that_are_no_rows_are_one_line_errors(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 does not hold the row of a run .*; move the file away"):
        MetricsFile(path, 100)
    with pytest.raises(UserError, match="line 2") as error:
        plot(path, tmp_path / "loss.png")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_model_flops_of_gpt2_small():
    # nanoGPT's transformer_sizing.ipynb and estimate_mfu: 741.9 M for the matmuls with weights, 113.2 M for attention.
    assert flops_per_token(GPT2Config(), 124_439_808) == 855_166_464


class Chip:
    device_kind = "NVIDIA H200"


def test_throughput_counts_training_time_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = ThroughputMeter(int(CHIPS["NVIDIA H200"].flops) // 1000, [Chip(), Chip()], "bfloat16")
    assert meter.read(500) is None  # the clock stood: compiling
    now[0] += 2
    assert meter.read(2500) == Throughput(1000.0, pytest.approx(0.5))  # 1,000 of the 2 × 1,000 tokens/s at peak
    now[0] += 1
    meter.stop()
    now[0] += 1000  # an evaluation
    meter.start(3000)
    now[0] += 4
    meter.start(4000)  # the clock runs: nothing happens
    assert meter.read(5000).tokens_per_second == pytest.approx(500)


@pytest.mark.parametrize(("devices", "dtype"), [([Chip()], "float32"), (jax.devices()[:1], "bfloat16")])
def test_no_mfu_where_the_peak_is_unknown(devices, dtype, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = ThroughputMeter(1, devices, dtype)
    meter.start(0)
    now[0] = 1.0
    assert meter.read(10) == Throughput(10.0, None)


ROW = {"step": 20, "tokens": 4000, "loss": 2.34567, "grad_norm": 0.51234, "learning_rate": 6e-4}
ROW |= {"tokens_per_second": 12345.6, "mfu": 0.512}


def test_what_a_person_sees_of_a_row():
    parts = ["loss 2.3457", "gradient norm 0.512", "learning rate 0.0006", "12.3k tok/s", "MFU 51.2%", "1:02:05 left"]
    assert format_row(ROW, 3725) == parts
    assert format_row(ROW | {"tokens_per_second": None, "mfu": None}, None) == parts[:3]


def test_the_plot_shows_means_of_training_rows_and_every_evaluation(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    image = tmp_path / "loss.png"
    plot(metrics.path, image)  # no rows yet
    for step in range(1, 250):
        metrics.write({"step": step, "tokens": 10 * step, "loss": 3.0 - step / 100})
    for step, loss in ((100, 2.5), (200, 1.5)):
        metrics.write({"step": step, "tokens": 10 * step, "val_loss": loss})
    plot(metrics.path, image)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]

    (axes,) = loss_figure(list(read_rows(metrics.path)), "run").axes
    training, validation = axes.lines
    assert len(training.get_xdata()) == 83  # 249 rows, three a point
    np.testing.assert_allclose([training.get_xdata()[0], training.get_ydata()[0]], [20, 2.98])  # of updates 1 to 3
    np.testing.assert_array_equal(validation.get_xydata(), [[1000, 2.5], [2000, 1.5]])
    assert [text.get_text() for text in axes.get_legend().texts] == [
        "training (means of 3 rows)",
        "validation (1.5000 at the end)",
    ]


def test_rows_wait_while_they_cannot_be_written(tmp_path, monkeypatch):
    """Half of the second row fits on the disk."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})
    whole = io.FileIO.write

    class Full(io.FileIO):
        def write(self, content):
            if len(content) < 8:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole(self, content[:8])

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda file, *args, **keywords: Full(file, "wb"))
        with pytest.raises(OSError, match="No space left"):
            file.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    file.write({"step": 3})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_deleted_file_is_not_made_again(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl was deleted while the run trains; start it again"):
        file.write({"step": 1})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_rows_are_json_or_an_error(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.write({"step": 1, "loss": math.nan})
