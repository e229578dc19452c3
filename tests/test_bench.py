"""The parts of the benchmarks that write, read and start something. The figures are not tested."""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import check_command
from token_files import write_llmc
from torch_gpt2 import torch_gpt2

from gpt2_jax import runtime
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS, Chip

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
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


@pytest.mark.slow
def test_the_process_whose_start_is_timed(tmp_path):
    write_llmc(tmp_path / "tokens.bin", np.arange(5000, dtype=np.uint16))
    command = [sys.executable, BENCH / "first_batch.py", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert float(printed[0]) < float(printed[1])
    assert len(printed) == 3


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*-*.json")), ids=lambda path: path.stem)
def test_the_rows_of_a_file_follow_from_its_figures(bench, path):
    figures = json.loads(path.read_text(encoding="utf-8"))
    rows = bench(path.stem.split("-")[0]).rows(figures)
    assert figures["rows"] == {name: {"value": value, "details": details} for name, (value, details) in rows.items()}


def test_the_documents_are_those_of_the_files(bench):
    report, scaling = bench("report"), bench("scaling")
    page, plans = scaling.DOCUMENT.read_text(encoding="utf-8"), json.loads(scaling.RECORD.read_text())["results"]
    assert page == scaling.document(page, plans)
    assert all(f"`{row.sharding}`" in page for row in scaling.ROWS if row.sharding)
    options = bench("options")
    known = json.loads(options.RECORD.read_text(encoding="utf-8"))["results"]
    assert page == options.document(page, known)
    assert known.keys() <= {case.key for case in options.CASES}
    cards = bench("cards")
    page = cards.DOCUMENT.read_text(encoding="utf-8")
    assert page == cards.document(page, json.loads(cards.RECORD.read_text()))
    page = report.DOCUMENT.read_text(encoding="utf-8")
    assert page == report.document(page, report.RESULTS)
    page = report.RELIABILITY.read_text(encoding="utf-8")
    assert page == report.reliability(page, report.RESULTS)
    page = report.DOCUMENT.read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!http)([^)]+)\)|`python (bench/\w+\.py)", page)
    assert len(linked) > 20
    for link, script in linked:
        assert (ROOT / script if script else ROOT / "docs" / link).exists()


def test_the_settings_that_fit_a_card_and_take_the_least_time(bench):
    cards = bench("cards")
    results = json.loads(cards.RECORD.read_text())["programs"]
    for card in cards.CARDS:
        memory = cards.USABLE * cards.CHIPS[cards.GPUS[card.name].kind].memory
        for size in cards.SIZES:
            chosen = cards.choose(card, size, results)
            assert chosen.required <= memory
            for other in cards.settings(card, size, results):
                assert other.estimate.memory > 0
                if other.required <= memory:
                    assert other.program.devices >= chosen.program.devices
                    one_slower = other.estimate.upper_bound >= chosen.estimate.upper_bound
                    assert one_slower or other.program.devices > chosen.program.devices


def test_the_lines_of_memory_and_traffic_hold_for_the_cards_themselves(bench):
    """Against programs that were compiled for a card. XLA fuses more for Hopper, so a third of the traffic can go."""
    checks = json.loads(bench("cards").RECORD.read_text())["checks"]
    assert checks
    for check in checks.values():
        assert check["required"] == pytest.approx(check["required_expected"], rel=0.1)
        assert 0.6 < check["hbm_bytes"] / check["hbm_bytes_expected"] < 1.1


def test_the_report_says_whether_a_fault_was_recovered_from(bench, tmp_path):
    report = bench("report")
    values = {"storage: read-only": 1.0, "storage: prepare": 0.0, "SIGKILLs survived": 1}
    rows = {name: {"value": value, "details": "why"} for name, value in values.items()}
    (tmp_path / "faults-cpu.json").write_text(json.dumps({"rows": rows}))
    page = report.reliability(report.RELIABILITY.read_text(encoding="utf-8"), tmp_path)
    results = ["read-only | recovered", "prepare | **not recovered**"]
    lines = [*(f"| storage: {result} | why |" for result in results), "| SIGKILLs survived | 1 | why |"]
    assert page.splitlines()[-3:] == lines


def test_the_report_says_whether_a_goal_is_reached(bench, tmp_path):
    report = bench("report")
    file = {"date": "2026-01-02", "commit": "0123456789", "uncommitted": False, "device": "cpu", "cpu": "A CPU",
            "cores": 2, "command": ["x.py", "--nanogpt", "/home/someone", "--results", "/home/someone"]}  # fmt: skip
    for name, row, value in (
        ("peers-char-cpu", "time over nanogpt or nanogpt compiled", 0.6),
        ("peers-char-gpu-cpu", "time over nanogpt compiled", 0.6),  # alone it may not be the faster one
        ("peers-sweep-124m-nvidia-h200", "best MFU", 0.49),
        ("data-cpu", "seconds to the first batch", 0.1),
    ):
        rows = {row: {"value": value, "details": "why"}}
        (tmp_path / f"{name}.json").write_text(json.dumps({**file, "rows": rows}))
    page = report.document(report.DOCUMENT.read_text(encoding="utf-8"), tmp_path)
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    results = {row[0]: [cell.strip(" |") for cell in row[2:]] for row in cells[: len(report.GOALS) + 2]}
    assert results["character model (4 × 128), CPU: time of an update"] == ["≤ 0.8", "0.6", "A CPU", "yes"]
    assert results["6 layers × 384, 256 tokens, 16 sequences, CPU: time of an update"][1] == "not measured"
    assert results["124M, one H200, the best micro-batch: MFU"] == ["≥ 50%", "49%", "A CPU", "**no**"]
    assert results["10 B tokens, CPU: start of the process to the first batch"] == ["–", "0.1 s", "A CPU", "–"]
    assert "why | 2026-01-02, A CPU, 2 cores, commit 0123456 (" in page
    assert "`python bench/peers.py --nanogpt DIR` |" in page


@pytest.mark.slow
def test_a_trainer_trains_or_says_why_not(bench):
    trainers = bench("trainers")
    args = Namespace(seconds=0.0, updates=8, repeat=2, devices=1)
    figures = trainers.measure(["ours"], TINY, args)["ours"]
    wide = 48
    block = 2 * 2 * wide + (wide + 1) * 3 * wide + (wide + 1) * wide + (wide + 1) * 4 * wide + (4 * wide + 1) * wide
    assert figures["parameters"] == 257 * wide + 32 * wide + block + 2 * wide
    assert figures["flops_per_token"] == 6 * (figures["parameters"] - 32 * wide) + 12 * 1 * wide * 32
    assert figures["peak_flops"] is None
    assert abs(figures["loss"] - math.log(257)) < 0.2  # random tokens, hardly trained
    assert len(figures["seconds_per_update"]) == 2
    assert 0 < figures["median_s"] < figures["first_update_s"]
    assert figures["tokens_per_second"] == pytest.approx(4 * 32 / figures["median_s"])
    assert figures["peak_bytes"] > 50 << 20
    with pytest.raises(trainers.TrainerError, match=r"ours: UserError: .*no-such-preset"):
        trainers.measure(["ours"], ["--config", "no-such-preset"], args)


@pytest.mark.parametrize(("dtype", "peak"), [("float32", None), ("float16", 1e12), ("bfloat16", 1e12)])
def test_the_peak_is_that_of_16_bits(bench, monkeypatch, dtype, peak):
    trainers = bench("trainers")
    monkeypatch.setitem(CHIPS, "cpu", Chip(flops=1e12, memory=1e12, bandwidth=1e11, link=1e10))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # what `Ours` sets for its whole process
    for name in ("use_single_malloc_arena", "enable_compilation_cache"):
        monkeypatch.setattr(runtime, name, lambda *_: None)
    config = trainers.training_config([*TINY, "--dtype", dtype])
    assert trainers.Ours(config, 1).about["peak_flops"] == peak


def test_updates_of_llm_c_are_timed_by_its_own_clock(bench, monkeypatch, tmp_path):
    trainers = bench("trainers")
    monkeypatch.setattr(trainers, "write_llmc_model", lambda config, directory: None)
    program = tmp_path / "train_gpt2"
    program.write_text("""#!/usr/bin/env bash
wc -c dev/data/tinyshakespeare/tiny_shakespeare_train.bin > "$(dirname "$0")/size"
for step in {0..4}; do
  echo "val loss 9.5"
  echo "step $step: train loss $step.250000 (took $((1000 - 100 * step)).5 ms)"
done
""")
    program.chmod(0o755)
    config = trainers.training_config([*TINY, "--model.block_size", "64", "--micro_batch_size", "0"])
    llmc = trainers.LlmC(config, str(program))
    assert llmc.updates(1) == 0.25
    assert (tmp_path / "size").read_text().split()[0] == str(4 * 256 + 2 * (4 * 64 + 1))
    assert llmc.updates(3) == 2.25
    assert llmc.seconds == pytest.approx(0.9005 + 0.8005 + 0.7005)  # without the first
    with pytest.raises(UserError, match="ended after 5 updates; expected 6"):
        llmc.updates(5)
    llmc.directory.cleanup()
    with pytest.raises(UserError, match="takes 4 sequences of 64 tokens"):
        trainers.LlmC(trainers.training_config(TINY), str(program))


def test_every_peer_of_generation_has_a_row(bench):
    runs = {
        "ours float32": [{"tokens_per_second": value} for value in (60.0, 80.0, 70.0)],
        "llama.cpp q8_0": [{"tokens_per_second": value} for value in (140.0, 150.0, 100.0)],
    }
    rows = bench("decode").rows({"peers": ["llama.cpp q8_0"], "cases": [{"batch": 1, "runs": runs}]})
    details = "tokens/s: ours float32 70.0 (60.0 to 80.0), llama.cpp q8_0 140.0 (100.0 to 150.0)"
    assert rows == {"tokens/s over llama.cpp q8_0": (0.5, details)}


@pytest.mark.slow
def test_decoders_write_the_same_text_in_turns(bench, tmp_path):
    decoders = bench("decoders")
    config = GPT2Config(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32)
    torch_gpt2(config).save_pretrained(tmp_path / "model")
    prompts = np.random.default_rng(0).integers(0, 300, (2, 20)).tolist()
    with decoders.start_all(["ours float32", "transformers float32"], str(tmp_path / "model")) as both:
        results = [decode(prompts, 30) for decode in both.values()]
    for first, total, tokens in results:
        assert 0 < first < total
        assert tokens.shape == (2, 30)
    np.testing.assert_array_equal(results[0][2], results[1][2])


def test_sweeps_change_one_key_or_all(bench):
    peers = bench("peers")
    sweeps = {"a": ["1", "2"], "b": ["3"]}
    assert peers.variants(sweeps, False) == [{}, {"a": "1"}, {"a": "2"}, {"b": "3"}]
    assert peers.variants(sweeps, True) == [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]


@pytest.fixture
def measure(tmp_path):
    """Runs a script of bench/ with a Python that writes down what it is to run, and fails where `fails` names it."""
    python = tmp_path / "python"
    python.write_text("""#!/usr/bin/env bash
name=$(basename "$([[ $1 = -m ]] && echo "$2" || echo "$1")" .py)
echo "$name" >> "$STAND_IN/called"
printf '%q ' "$@" >> "$STAND_IN/commands"
echo >> "$STAND_IN/commands"
[[ $(cat "$STAND_IN/fails" 2> /dev/null) != "$name" ]]
""")
    python.chmod(0o755)

    def run(script, *pieces):
        (tmp_path / "called").write_text("")
        (tmp_path / "commands").write_text("")
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "STAND_IN": str(tmp_path)}
        words = ["bash", BENCH / script, tmp_path / "out", *pieces]
        code = subprocess.run(words, capture_output=True, text=True, env=environment).returncode
        return code, (tmp_path / "called").read_text().split()

    return run


def test_the_scripts_pass_shellcheck():
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    words = [command, "-x", *sorted(BENCH.glob("*.sh"))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in BENCH.glob("*.sh") if path.name != "pieces.sh"))
def test_the_scripts_type_flags_that_exist(measure, tmp_path, script):
    assert measure(script)[0] == 0
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    assert commands
    for option, module, *words in commands:
        if option == "-m" and module.startswith("gpt2_jax."):
            check_command(module.removeprefix("gpt2_jax."), words)


def test_a_gpu_is_measured_piece_by_piece(measure, tmp_path):
    assert measure("gpu.sh", "headline") == (0, ["peers", "peers"])
    (tmp_path / "fails").write_text("kernels")
    code, called = measure("gpu.sh")  # skips what is done, and the measurements after a failure run
    assert code == 1
    assert called[:2] == ["pytest", "gpt2_jax.train"]
    assert called[2:] == [*["peers"] * 11, *["gpt2_jax.plan"] * 4, "kernels", "decode", "startup", "checkpoint"]
    (tmp_path / "fails").unlink()
    assert measure("gpu.sh") == (0, ["kernels"])
    assert measure("gpu.sh", "headlines") == (2, [])


def test_a_tpu_is_measured_piece_by_piece(measure):
    assert measure("tpu.sh", "right") == (0, ["pytest"])
    assert measure("tpu.sh") == (0, [*["peers"] * 3, "kernels"])
    assert measure("tpu.sh", "headlines") == (2, [])
