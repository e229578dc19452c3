"""The benchmarks' own parts: what they write, read and start. What they measure is not tested."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.data.shards import open_tokens
from gpt2_jax.errors import UserError

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
GPU = BENCH / "gpu.sh"
CIRCUMSTANCES = {"date": "2026-01-02", "commit": "0123456789", "uncommitted": False, "device": "cpu", "cpu": "A CPU",
                 "cores": 2, "flags": {}}  # fmt: skip
TINY = ["--config", "quickstart", "--model.n_layer", "1", "--model.n_embd", "48", "--model.n_head", "3",
        "--model.block_size", "32", "--batch_size", "4", "--micro_batch_size", "2"]  # fmt: skip

# A Python whose benchmarks measure nothing, and fail where the file `fate` names them.
PYTHON = """#!/usr/bin/env bash
case $1 in -c | -m) exit 0 ;; esac
script=$(basename "$1" .py)
echo "$script" >> "$STAND_IN/called"
[[ "$(cat "$STAND_IN/fate" 2> /dev/null)" != "$script" ]] || exit 3
while (($#)); do
  case $1 in
    --results) results=$2 ;;
    --name | --case) name=$2 ;;
  esac
  shift
done
[[ $script != peers ]] || name=peers-$name
echo '{}' > "$results/${name:-$script}-some-gpu.json"
"""


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, as its programs do."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def table(report, results: Path) -> dict[str, list[str]]:
    """The table of goals: (goal, measured, reached) by what the work starts with."""
    rows = [row.split(" | ") for row in report.document(results, []).splitlines() if row.startswith("| ")][2:]
    goals = len(report.GOALS)
    return {row[0].removeprefix("| "): [cell.strip(" |") for cell in row[2:]] for row in rows[:goals]}


def test_without_files_nothing_is_measured(bench, tmp_path):
    report = bench("report")
    rows = table(report, tmp_path)
    assert len(rows) == 11
    assert all(row[1:] == ["not measured", ""] for row in rows.values())
    assert "Nothing was measured." in report.document(tmp_path, [])


def test_the_report_says_what_the_files_say(bench, tmp_path):
    def write(name, **figures):
        (tmp_path / f"{name}.json").write_text(json.dumps({**CIRCUMSTANCES, **figures}))

    peers = {"command": ["peers.py", "--case", "char", "--nanogpt", "/home/someone"], "tokens_per_update": 1000}
    times = {"ours": 0.03, "nanogpt": 0.06, "nanogpt compiled": 0.05}
    trainers = {name: {"median_s": seconds} for name, seconds in times.items()}
    write("peers-char-cpu", trainers=trainers, **peers)
    write("peers-124m-nvidia-h200", trainers=trainers, **peers)
    del trainers["nanogpt"]  # the faster of the two is not known
    write("peers-char-gpu-cpu", trainers=trainers, **peers)
    step = {"tokens_per_second": 5.0, "peak_bytes": 2**30, "first_update_s": 1.0}
    cases = [{"change": {"micro_batch_size": micro}, "mfu": mfu, **step} for micro, mfu in (("8", 0.48), ("16", 0.49))]
    cases.append({"change": {"micro_batch_size": "32"}, "error": "out of memory"})
    write("train_step-gpt2-124m-nvidia-h200", cases=cases, command=["train_step.py"], flags_of_training=["--config"])
    write("startup-cpu", ratio=0.25, median_s={"filled": 1.0, "empty": 4.0}, command=["startup.py"])

    kernels = {"xla": {"median_ms": 12.34, "error_of_values": 2e-7}, "tokamax triton": {"error": "ValueError: no GPU"}}
    shape = {"batch": 2, "time": 1024, "dtype": "float32"}
    write("kernels-cpu", attention=kernels, versions={"jax": "1.0"}, command=["kernels.py"], **shape)

    report = bench("report")
    rows = table(report, tmp_path)
    assert rows["character model (4 × 128), CPU: time of an update"] == ["≤ 0.8", "0.6", "yes"]
    assert rows["6 layers × 384, 256 tokens, 16 sequences, CPU: time of an update"][1] == "not measured"
    assert rows["124M, one H200: tokens/s"] == ["≥ 1.25 ×", "1.67 ×", "yes"]
    assert rows["124M, one H200, the best micro-batch: MFU"] == ["≥ 50%", "49%", "**no**"]
    assert rows["1558M, one H200: MFU"][1] == "not measured"
    assert next(row for work, row in rows.items() if "first update" in work) == ["≤ 0.4", "0.25", "yes"]
    text = report.document(tmp_path, [])
    assert "30 ms and 50 ms (nanogpt compiled). 2026-01-02, A CPU, 2 cores, commit 0123456;" in text
    assert "`python bench/peers.py --case char --nanogpt DIR`" in text  # and not whose
    assert "| micro_batch_size 32 | out of memory |" in text
    assert "| attention | xla | 12.3 ms | 2.0e-07 |\n| attention | tokamax triton | ValueError: no GPU |  |" in text


def test_the_plots_are_drawn_from_what_there_is(bench, tmp_path):
    report = bench("report")
    assert not report.plot_peers(tmp_path, tmp_path / "plot.png")
    trainers = {"ours": {"median_s": 0.5}, "nanogpt": {"median_s": 1.0}}
    (tmp_path / "peers-char-cpu.json").write_text(json.dumps({"trainers": trainers}))
    assert report.plot_peers(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_is_that_of_the_files(bench):
    report = bench("report")
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    images = re.findall(r"^!\[(.*)\]", text, re.MULTILINE)
    assert text == report.document(report.RESULTS, images)
    assert all((ROOT / "docs" / f"{name}.png").exists() for name in images)


def test_llmc_reads_the_random_tokens(bench, tmp_path):
    path = bench("peers").write_shard(tmp_path / "random.bin", 5000, 50257)
    tokens = open_tokens(path)
    assert len(tokens) == 5000
    assert np.unique(tokens[0:5000]).size > 4000
    assert tokens[0:5000].max() < 50257
    # What llm.c's dataloader.h checks before anything else.
    header = np.fromfile(path, "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, 5000]
    assert path.stat().st_size == 1024 + 2 * 5000


def test_llmc_is_run_and_its_times_are_those_it_prints(bench, tmp_path):
    # A stand-in that prints what its train_gpt2.cu prints.
    (tmp_path / "train_gpt2cu").write_text("""#!/usr/bin/env bash
[[ $1 = -i && -s $2 ]] || exit 1
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
    config = bench("sides").training_config(TINY)
    figures = bench("peers").llmc(tmp_path, config)
    assert figures["seconds_per_update"] == [0.11025, 0.11175]
    assert figures["tokens_per_second"] == pytest.approx(4 * 32 / 0.111)
    asked = dict(zip(figures["command"][::2], figures["command"][1::2], strict=True))
    assert [asked[flag] for flag in ("-b", "-t", "-d", "-e")] == ["2", "32", "128", "d1"]
    (tmp_path / "train_gpt2cu").write_text("#!/bin/sh\necho no GPU >&2; exit 1\n")
    assert bench("peers").llmc(tmp_path, config)["error"] == "no GPU\n"


def test_a_trainer_answers(bench):
    trainers = bench("trainers")
    with trainers.Trainer("ours", TINY) as trainer:
        about, result, digest = trainer.about, trainer.run(3), trainer.digest()
        assert trainer.program()["temporary_bytes"] > 0
        assert trainer.digest() == digest
        trainer.run(1)
        assert trainer.digest() != digest  # it trains
    wide = 48
    block = 2 * 2 * wide + (wide + 1) * 3 * wide + (wide + 1) * wide + (wide + 1) * 4 * wide + (4 * wide + 1) * wide
    assert about["parameters"] == 257 * wide + 32 * wide + block + 2 * wide
    assert about["tokens"] == 4 * 32
    assert about["flops_per_token"] == 6 * (about["parameters"] - 32 * wide) + 12 * 1 * wide * 32
    assert about["peak_flops"] is None
    assert abs(result["loss"] - math.log(257)) < 0.2  # random tokens, hardly trained
    assert 0 < result["seconds"] < 10 * about["first_update_s"]


def test_a_trainer_that_cannot_start_says_why(bench):
    trainers = bench("trainers")
    with pytest.raises(trainers.TrainerError, match="no-such-preset"):
        trainers.Trainer("ours", ["--config", "no-such-preset"])


def test_sweeps_change_one_key_or_all(bench):
    train_step = bench("train_step")
    assert train_step.full_key("attention") == "model.attention"
    assert train_step.full_key("micro_batch_size") == "micro_batch_size"
    with pytest.raises(UserError, match=r"eval\.every"):
        train_step.full_key("every")
    sweeps = {"a": ["1", "2"], "b": ["3"]}
    assert list(train_step.variants(sweeps, False)) == [{}, {"a": "1"}, {"a": "2"}, {"b": "3"}]
    assert list(train_step.variants(sweeps, True)) == [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]


def test_shellcheck_finds_nothing():
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert command
    done = subprocess.run([command, GPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_gpu_is_measured_piece_by_piece(tmp_path):
    for name, text in {"python": PYTHON, "nvidia-smi": "#!/bin/sh\necho Some GPU\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
                   "STAND_IN": str(tmp_path)}  # fmt: skip

    def run(*pieces):
        (tmp_path / "called").write_text("")
        done = subprocess.run(["bash", GPU, tmp_path / "out", *pieces], capture_output=True, text=True, env=environment)
        return done, (tmp_path / "called").read_text().split()

    done, called = run("headline")
    assert (done.returncode, called) == (0, ["train_step", "peers"])
    (tmp_path / "fate").write_text("why")
    done, called = run()  # what is there already is not done again, and a failure stops nothing
    assert done.returncode == 1
    assert "why: FAILED with exit code 3" in done.stdout
    assert called == ["right", "why", *["train_step"] * 8, "kernels", "decode", "determinism", "startup", "checkpoint"]
    (tmp_path / "fate").unlink()
    done, called = run()
    assert (done.returncode, called) == (0, ["why"])
    assert run("headlines")[0].returncode == 2
    environment["BUDGET"] = "0"
    shutil.rmtree(tmp_path / "out")
    done, called = run()
    assert (done.returncode, called) == (1, [])
