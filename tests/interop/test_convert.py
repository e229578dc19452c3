"""Conversions: round trips between all formats, and the command with its errors."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import safetensors
from model_files import CONFIG, EXACT, FORMATS, assert_same_params, random_params, save_run
from torch_gpt2 import as_params, torch_gpt2

from gpt2_jax import load
from gpt2_jax.convert import convert, main
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model

GELUS = {"tanh": dataclasses.replace(CONFIG, vocab_size=257), "exact": dataclasses.replace(EXACT, vocab_size=257)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each GELU, a run directory of a model on bytes and its parameters."""
    directory = tmp_path_factory.mktemp("runs")
    params = {gelu: as_params(torch_gpt2(config).state_dict(), config) for gelu, config in GELUS.items()}
    return {gelu: (save_run(directory / gelu, GELUS[gelu], params[gelu]), params[gelu]) for gelu in GELUS}


def assert_is(path, gelu, params):
    """The model at `path` has these parameters, bit for bit, and the tokenizer of bytes."""
    gpt2 = load(str(path))
    assert dataclasses.replace(gpt2.model.config, attention="auto") == GELUS[gelu]
    assert_same_params(gpt2.params, params)
    assert open_model(str(path)).tokenizer.name == "bytes"


@pytest.fixture(scope="module")
def converted(runs, tmp_path_factory):
    """Converts a run to a format, once for each format and GELU."""

    @functools.cache
    def once(to, gelu):
        run, params = runs[gelu]
        out = convert(str(run), to, tmp_path_factory.mktemp("converted") / "out")
        assert_is(out, gelu, params)
        return out

    return once


# All pairs except nanoGPT with llm.c: one has the exact GELU, the other the tanh GELU, and the conversion is refused.
PAIRS = [(source, to) for source in FORMATS for to in FORMATS if {source, to} != {"nanogpt", "llmc"}]


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_every_conversion_round_trips_bit_for_bit(runs, converted, tmp_path, capsys, source, to):
    gelu = "exact" if "nanogpt" in (source, to) else "tanh"
    first = converted(source, gelu)
    capsys.readouterr()
    there = convert(str(first), to, tmp_path / "there")
    back = convert(str(there), source, tmp_path / "back")
    prints = re.findall(r"^state     fingerprint ([0-9a-f]{8}), of the parameters$", capsys.readouterr().out, re.M)
    assert len(prints) == 2
    assert len(set(prints)) == 1
    for path in (there, back):
        assert_is(path, gelu, runs[gelu][1])
    if "huggingface" not in (source, to):  # which has no place for the number of updates
        assert open_model(str(back)).step == 3


@pytest.mark.parametrize(
    ("to", "gelu", "bias", "message"),
    [
        ("llmc", "exact", True, "uses the exact GELU, but llm.c only has the tanh one"),
        ("llmc", "tanh", False, "has no biases"),
        ("nanogpt", "tanh", True, "uses the tanh GELU, but nanoGPT only has the exact one"),
    ],
)
def test_a_model_that_the_format_cannot_represent_is_refused_and_leaves_no_files(tmp_path, to, gelu, bias, message):
    config = dataclasses.replace(GELUS[gelu], bias=bias)
    run = save_run(tmp_path / "run", config, random_params(config))
    with pytest.raises(UserError, match=message):
        convert(str(run), to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_existing_directory_is_left_alone(saved, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; give another --out"):
        convert(str(saved), "llmc", tmp_path / "out")


def test_an_export_appears_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    full = "No space left on device"
    for error in (OSError(28, full), safetensors.SafetensorError(full)):

        def broken(*_, error=error, **__):
            assert not (tmp_path / "a" / "out").exists()
            raise error

        monkeypatch.setattr("gpt2_jax.interop.huggingface.save_file", broken)
        with pytest.raises(UserError, match=f"out cannot be written: {full}; give another --out"):
            convert(str(saved), "huggingface", tmp_path / "a" / "out")
        assert list(tmp_path.iterdir()) == []


# Runs commands with a limit on the size of files. Prints the exit code and stderr of each as JSON.
COMMANDS = """
import contextlib, io, json, resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 2**10, 100 * 2**10))
for args in json.loads(sys.argv[1]):
    sys.argv, stderr = ["convert", *args], io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module("gpt2_jax.convert", run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        print(json.dumps([exit.code, stderr.getvalue()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_one_line_and_leaves_no_files(tmp_path):
    runs = {gelu: tmp_path / gelu for gelu in GELUS}
    for gelu, run in runs.items():
        config = dataclasses.replace(GELUS[gelu], n_embd=128)
        save_run(run, config, random_params(config))
    formats = [*FORMATS, *["gguf"] * bool(find_spec("gguf"))]
    formats.sort(key=lambda to: to == "orbax")  # last: its threads may report errors later
    commands = [
        ["--from", str(runs["exact" if to == "nanogpt" else "tanh"]), "--to", to, "--out", str(tmp_path / "out")]
        for to in formats
    ]
    args = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    process = subprocess.run(args, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    results = [json.loads(line) for line in process.stdout.splitlines()]
    for to, (code, stderr) in zip(formats, results, strict=True):
        line = f"error: {tmp_path}/out cannot be written: "
        assert code == 2, stderr
        if to == "orbax":  # its threads report the error too, sometimes in the middle of our line
            assert line in stderr
        else:
            assert stderr.startswith(line)
            assert stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(GELUS)


def test_the_command_reports_the_files_and_the_next_command(saved, tmp_path, capsys):
    assert main(["--from", str(saved), "--to", "llmc", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "3 layers, 4 heads, 32 wide" in printed
    assert "model_00000000.bin" in printed
    assert "make train_gpt2cu PRECISION=FP32" in printed
    with pytest.raises(UserError, match="invalid choice"):
        main(["--from", "x", "--to", "onnx", "--out", "y"])
    with pytest.raises(UserError, match="--dtype bfloat16 is for huggingface, llmc and gguf; orbax"):
        main(["--from", str(saved), "--to", "orbax", "--out", str(tmp_path / "o"), "--dtype", "bfloat16"])
