"""The parts of the benchmarks that write, read and start something. The figures are not tested."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from token_files import write_llmc

from gpt2_jax.data.shards import open_tokens
from gpt2_jax.errors import UserError

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
CIRCUMSTANCES = {"date": "2026-01-02", "commit": "0123456789", "uncommitted": False, "device": "cpu", "cpu": "A CPU",
                 "cores": 2, "flags": {}}  # fmt: skip
TINY = ["--config", "quickstart", "--model.n_layer", "1", "--model.n_embd", "48", "--model.n_head", "3",
        "--model.block_size", "32", "--batch_size", "4", "--micro_batch_size", "2"]  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, as its programs do."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("*.py")))
def test_every_benchmark_can_be_imported(bench, name):
    assert bench(name).__doc__


def test_the_process_whose_start_is_timed(bench, tmp_path):
    write_llmc(tmp_path / "tokens.bin", np.arange(5000, dtype=np.uint16))
    command = [sys.executable, "-c", bench("data").FIRST_BATCH, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    first, ahead, _, tokens = map(float, printed)
    assert first < ahead
    assert tokens == 5000


def test_the_report_shows_what_the_files_hold(bench, tmp_path):
    def write(name, script, **figures):
        file = {**CIRCUMSTANCES, "command": [f"{script}.py", "--nanogpt", "/home/someone", "--repeat", "3"], **figures}
        (tmp_path / f"{name}.json").write_text(json.dumps(file))

    def rows():
        """(goal, measured, reached) by the work."""
        table = [line.split(" | ") for line in report.document(tmp_path, []).splitlines() if line.startswith("| ")]
        return {row[0].removeprefix("| "): [cell.strip(" |") for cell in row[2:]] for row in table}

    report = bench("report")
    assert all(rows()[goal.work][1:] == ["not measured", ""] for goal in report.GOALS)
    assert not report.plot_peers(tmp_path, tmp_path / "plot.png")

    times = {"ours": 0.03, "nanogpt": 0.06, "nanogpt compiled": 0.05}
    trainers = {name: {"median_s": seconds} for name, seconds in times.items()}
    write("peers-char-cpu", "peers", trainers=trainers)
    write("peers-124m-nvidia-h200", "peers", trainers=trainers, tokens_per_update=1000)
    del trainers["nanogpt"]  # without it the faster one is unknown
    write("peers-char-gpu-cpu", "peers", trainers=trainers)
    cases = [{"change": {"micro_batch_size": micro}, "mfu": mfu, "tokens_per_second": 5.0, "peak_bytes": 2**30}
             for micro, mfu in (("8", 0.48), ("16", 0.49))]  # fmt: skip
    cases.append({"change": {"micro_batch_size": "32"}, "error": "ours: out of memory"})
    write("train_step-gpt2-124m-nvidia-h200", "train_step", cases=cases)
    kernels = {"xla": {"median_ms": 12.34, "error_of_values": 2e-7}, "tokamax triton": {"error": "ValueError: no GPU"}}
    shape = {"batch": 2, "time": 1024, "dtype": "float32"}
    write("kernels-cpu", "kernels", attention=kernels, versions={"jax": "1.0", "torch": "2"}, **shape)

    assert rows()["character model (4 × 128), CPU: time of an update"] == ["≤ 0.8", "0.6", "yes"]
    assert rows()["6 layers × 384, 256 tokens, 16 sequences, CPU: time of an update"][1] == "not measured"
    assert rows()["124M, one H200: tokens/s"] == ["≥ 1.25 ×", "1.67 ×", "yes"]
    assert rows()["124M, one H200, the best micro-batch: MFU"] == ["≥ 50%", "49%", "**no**"]
    text = report.document(tmp_path, [])
    assert "30 ms and 50 ms (nanogpt compiled). 2026-01-02, A CPU, 2 cores, commit 0123456;" in text
    assert "`python bench/peers.py --nanogpt DIR --repeat 3`" in text
    assert "/home/someone" not in text
    assert "| attention | xla | 12.3 ms | 2.0e-07 |\n| attention | tokamax triton | ValueError: no GPU |  |" in text
    assert report.plot_peers(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_is_that_of_the_files(bench):
    report = bench("report")
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    images = re.findall(r"^!\[(.*)\]", text, re.MULTILINE)
    assert text == report.document(report.RESULTS, images)
    linked = re.findall(r"\]\((?!http)([^)]+)\)|`python (bench/\w+\.py)", text)
    assert len(linked) > 20
    for link, script in linked:
        assert (ROOT / script if script else ROOT / "docs" / link).exists()


def test_llmc_gets_tokens_that_it_reads_and_prints_its_times(bench, tmp_path):
    # A stand-in that checks what llm.c's dataloader.h checks first, and prints what its train_gpt2.cu prints.
    (tmp_path / "train_gpt2cu").write_text("""#!/usr/bin/env bash
[[ $1 = -i && $(od -A n -t d4 -N 8 "$2" | xargs) = "20240520 1" ]] || exit 1
cp "$2" tokens.bin
cat << END
| step                  |                                                    |
val loss 11.01
step    1/30 | loss 11.009 (+nanz)| norm 24.10 (+nanz)| lr 3.00e-04 | 900.50 ms | 10.0% bf16 MFU | 18200 tok/s
step    2/30 | loss 10.809 (+nanz)| norm 20.15 (+nanz)| lr 3.00e-04 | 110.25 ms | 44.0% bf16 MFU | 148400 tok/s
step   30/30 | loss 10.809 (+0.12z)| norm 20.15 (-0.5z)| lr 3.00e-04 | 111.75 ms | 43.6% bf16 MFU | 148000 tok/s
total average iteration time: 111.0 ms
END
""")
    (tmp_path / "train_gpt2cu").chmod(0o755)
    config = bench("trainers").training_config(TINY)
    figures = bench("peers").llmc(tmp_path, config)
    assert figures["seconds_per_update"] == [0.11025, 0.11175]
    assert figures["tokens_per_second"] == pytest.approx(4 * 32 / 0.111)
    asked = dict(zip(figures["command"][::2], figures["command"][1::2], strict=True))
    assert [asked[flag] for flag in ("-b", "-t", "-d", "-e")] == ["2", "32", "128", "d1"]
    tokens = open_tokens(tmp_path / "tokens.bin")
    count = len(tokens)
    assert count == (4 * 32 + 1) * 8 == np.fromfile(tmp_path / "tokens.bin", "<i4", 3)[2]
    assert (tmp_path / "tokens.bin").stat().st_size == 1024 + 2 * count
    assert 0.9 * 257 < np.unique(tokens[0:count]).size <= 257
    assert tokens[0:count].max() < 257
    (tmp_path / "train_gpt2cu").write_text("#!/bin/sh\necho no GPU >&2; exit 1\n")
    assert bench("peers").llmc(tmp_path, config)["error"] == "no GPU\n"


@pytest.mark.slow
def test_a_trainer_trains_or_says_why_not(bench):
    trainers = bench("trainers")
    with trainers.Trainer("ours", TINY) as trainer:
        about, results = trainer.about, [trainer.run(3), trainer.run(5)]
    wide = 48
    block = 2 * 2 * wide + (wide + 1) * 3 * wide + (wide + 1) * wide + (wide + 1) * 4 * wide + (4 * wide + 1) * wide
    assert about["parameters"] == 257 * wide + 32 * wide + block + 2 * wide
    assert about["tokens"] == 4 * 32
    assert about["flops_per_token"] == 6 * (about["parameters"] - 32 * wide) + 12 * 1 * wide * 32
    assert about["peak_flops"] is None
    # Update 9 has the batch of the first one, after 8 updates.
    assert results[1]["loss"] < results[0]["loss"]
    assert abs(results[0]["loss"] - math.log(257)) < 0.2  # random tokens, hardly trained
    assert 0 < results[0]["seconds"] < 10 * about["first_update_s"]
    assert results[1]["peak_bytes"] > 50 << 20
    with pytest.raises(trainers.TrainerError, match=r"ours: UserError: .*no-such-preset"):
        trainers.Trainer("ours", ["--config", "no-such-preset"])


def test_the_figures_of_a_variant(bench, monkeypatch):
    class Stub:
        about: ClassVar = {"tokens": 1000, "flops_per_token": 5, "peak_flops": 40_000}

        def __init__(self, side, flags):
            if "--too-large" in flags:
                raise bench("trainers").TrainerError("ours: out of memory")

        __enter__, __exit__ = lambda self: self, lambda self, *error: None

        def run(self, updates):
            return {"seconds": updates / 2, "loss": 3.0, "peak_bytes": 7}

    train_step = bench("train_step")
    monkeypatch.setattr(train_step, "Trainer", Stub)
    figures = train_step.measure([], repeat=3, seconds=2.0, least=1)
    assert figures["seconds_per_update"] == [0.5] * 3
    assert figures["updates_per_block"] == 4
    assert (figures["tokens_per_second"], figures["mfu"], figures["peak_bytes"]) == (2000, 0.25, 7)
    assert train_step.measure(["--too-large"], repeat=3, seconds=2.0, least=1) == {"error": "ours: out of memory"}


def test_sweeps_change_one_key_or_all(bench):
    train_step = bench("train_step")
    assert train_step.parse_sweeps(["attention=xla", "micro_batch_size=8,4"]) == {
        "model.attention": ["xla"],
        "micro_batch_size": ["8", "4"],
    }
    with pytest.raises(UserError, match=r"eval\.every"):
        train_step.parse_sweeps(["every=1"])
    with pytest.raises(UserError, match="expected KEY=VALUE,VALUE"):
        train_step.parse_sweeps(["attention"])
    sweeps = {"a": ["1", "2"], "b": ["3"]}
    assert list(train_step.variants(sweeps, False)) == [{}, {"a": "1"}, {"a": "2"}, {"b": "3"}]
    assert list(train_step.variants(sweeps, True)) == [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]


def test_a_gpu_is_measured_piece_by_piece(tmp_path):
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([command, BENCH / "gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # A Python that writes down what it is to run, and fails where the file `fails` names it.
    python = tmp_path / "python"
    python.write_text("""#!/usr/bin/env bash
name=$(basename "$([[ $1 = -m ]] && echo "$2" || echo "$1")" .py)
echo "$name" >> "$STAND_IN/called"
[[ $(cat "$STAND_IN/fails" 2> /dev/null) != "$name" ]]
""")
    python.chmod(0o755)

    def run(*pieces):
        (tmp_path / "called").write_text("")
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "STAND_IN": str(tmp_path)}
        words = ["bash", BENCH / "gpu.sh", tmp_path / "out", *pieces]
        code = subprocess.run(words, capture_output=True, text=True, env=environment).returncode
        return code, (tmp_path / "called").read_text().split()

    assert run("headline") == (0, ["train_step", "peers"])
    (tmp_path / "fails").write_text("kernels")
    code, called = run()  # skips what is done, and the measurements after a failure run
    assert code == 1
    assert called[:2] == ["pytest", "gpt2_jax.train"]
    assert called[2:] == [*["train_step"] * 11, *["gpt2_jax.plan"] * 4, "kernels", "decode", "startup", "checkpoint"]
    (tmp_path / "fails").unlink()
    assert run() == (0, ["kernels"])
    assert run("headlines") == (2, [])
