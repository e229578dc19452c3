"""The training command as a user runs it: the quickstart, kills and restarts, and what it refuses."""

import contextlib
import dataclasses
import os
import random
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from token_files import write_llmc
from torch_gpt2 import as_params, torch_gpt2
from transformers import AutoTokenizer
from xla_flags import FAST_COMPILE

from gpt2_jax import train as training
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.compiler_options import EXPERIMENTAL
from gpt2_jax.config import IGNORE, DataConfig, GPT2Config, ModelConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.config.toml import read_config, to_toml
from gpt2_jax.convert import convert
from gpt2_jax.data import open_data
from gpt2_jax.data.pipeline import eval_batches
from gpt2_jax.display import duration
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model
from gpt2_jax.metrics import flops_per_token, read_rows
from gpt2_jax.model import GPT2
from gpt2_jax.run import goodput, reporting, summary
from gpt2_jax.run.directory import open_directory
from gpt2_jax.run.initial import keep_initial_tokenizer
from gpt2_jax.run.reporting import Reporter
from gpt2_jax.sharding import make_mesh
from gpt2_jax.step import abstract_state

TINY = """
out = "unset"
steps = 40
batch_size = 4
micro_batch_size = 2

[model]
vocab_size = 0
block_size = 16
n_layer = 1
n_head = 2
n_embd = 16
dropout = 0.1

[data]
text = "unset"
tokenizer = "bytes"

[optimizer]
learning_rate = 1e-2
warmup_steps = 5
decay_steps = 40

[checkpoint]
every = 10

[eval]
every = 10

[log]
every = 1
"""


FULL = ["--batch_ramp", "320", "2", "--eval.every", "20"]  # a batch that grows


@pytest.fixture
def tiny_run(tmp_path):
    """The command line of a tiny run on a text of its own."""
    config, text = tmp_path / "tiny.toml", tmp_path / "text.txt"
    config.write_text(TINY)
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(300)))
    return ["--config", str(config), "--data.text", str(text)]


def command(args, environment=(), **keywords):
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE, "PYTHONUNBUFFERED": "1"} | dict(environment)
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2_jax.train", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **keywords,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def run_here(args, devices=1):
    """The command without a process of its own."""
    config = parse_args("train", "", list(map(str, args)))
    return training.train(config, jax.devices()[:devices])


def rows(out, key):
    return {row["step"]: row[key] for row in read_rows(out / "metrics.jsonl") if key in row}


def final_state(out):
    """Every array of the last checkpoint."""
    config = read_config(str(out / "config.toml"))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    model = GPT2(dataclasses.replace(config.model, attention="xla"))
    with Checkpoints(out / "checkpoints", 9) as checkpoints:
        assert checkpoints.latest() == config.steps
        return checkpoints.restore(config.steps, abstract_state(model, config.optimizer, mesh))


def wait_for_update(out, step):
    """Until the run has logged the update."""
    deadline = time.monotonic() + 300
    while step not in rows(out, "loss"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_that_was_stopped_and_killed_is_bit_for_bit_the_run_that_was_not(tiny_run, tmp_path, capsys):
    assert run_here([*tiny_run, *FULL, "--out", tmp_path / "whole"]) == 0

    # One that is asked to stop, one that is killed, one to the end.
    args = [*tiny_run, *FULL, "--out", tmp_path / "parts"]
    before = time.time()
    asked = command(args)
    wait_for_update(tmp_path / "parts", 13)
    asked.send_signal(signal.SIGTERM)
    code, output = finish(asked)
    assert code == 128 + signal.SIGTERM
    assert "the same command resumes it" in output
    killed = command(args)
    wait_for_update(tmp_path / "parts", 33)
    killed.kill()
    killed.communicate()
    capsys.readouterr()
    assert run_here(args) == 0
    elapsed = time.time() - before
    assert re.search("resumed after update [23]", capsys.readouterr().out)

    for key in ("loss", "grad_norm", "learning_rate", "val_loss", "tokens"):
        assert rows(tmp_path / "parts", key) == rows(tmp_path / "whole", key), key
    assert list(rows(tmp_path / "whole", "loss")) == list(range(1, 41))
    val_losses = rows(tmp_path / "whole", "val_loss")
    kept = {int(path.name) for path in (tmp_path / "whole" / "checkpoints").glob("[0-9]*")}
    assert kept == {30, 40} | {min(val_losses, key=val_losses.get)}
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))

    # Every second from the first start to the last row belongs to one phase, also over the kill. Rows are rounded to
    # milliseconds and times of files to about ten; the rest of the tolerance is for a busy machine.
    processes = goodput.read_processes(tmp_path / "parts")
    seconds = goodput.goodput(processes)
    assert len(processes) == 3
    assert seconds[goodput.STOPPED] > 0
    last_row = (tmp_path / "parts" / goodput.FILE).stat().st_mtime
    assert sum(seconds.values()) == pytest.approx(last_row - processes[0].started, abs=0.1)
    # From outside there is also the first interpreter's start, and what follows the last row: 0.1 s of 11 s or more.
    assert sum(seconds.values()) == pytest.approx(elapsed, rel=0.05)


@pytest.mark.slow
def test_killed_at_random_moments(tiny_run, tmp_path):
    """Saves are frequent here, so that some kills fall into the middle of one."""
    args = [*tiny_run, *FULL, "--model.n_layer", "2", "--steps", "300", "--checkpoint.every", "3", "--eval.every", "50"]
    code, output = finish(command([*args, "--out", tmp_path / "whole"]))
    assert code == 0, output
    seconds = random.Random(0)
    for _ in range(5):  # bench/faults.py kills 50 times
        process = command([*args, "--out", tmp_path / "parts"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=seconds.uniform(3, 10))
        process.kill()
        process.communicate()
    code, output = finish(command([*args, "--out", tmp_path / "parts"]))
    assert code == 0, output
    for key in ("loss", "grad_norm", "val_loss"):
        assert rows(tmp_path / "parts", key) == rows(tmp_path / "whole", key), key
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def test_the_quickstart_learns_and_says_what_it_reached(tmp_path):
    out = tmp_path / "run"
    args = ["--config", "quickstart", "--out", out, "--steps", "24", "--optimizer.warmup_steps", "5"]
    args += ["--model.n_layer", "1"]  # one of two, for half of the time
    args += ["--log.every", "1", "--eval.sample_tokens", "60", "--data.val_fraction", "0.01"]
    code, output = finish(command(args, cwd=tmp_path))
    assert code == 0, output
    losses = list(rows(out, "loss").values())
    assert losses[0] == pytest.approx(np.log(257), abs=0.3)  # a uniform guess
    assert np.mean(losses[-5:]) < 3.2  # the order of bytes by frequency alone gives 3.3
    nats, targets = re.search(r"loss      (\d\.\d+) nats per token over ([\d,]+) held-out tokens", output).groups()
    bits, zipped, n_bytes = re.search(
        r"([\d.]+) bits per byte; gzip -9 needs ([\d.]+) for the same ([\d,]+) bytes", output
    ).groups()
    total = float(nats) / np.log(2) * int(targets.replace(",", ""))
    assert float(bits) == pytest.approx(total / int(n_bytes.replace(",", "")), abs=1e-3)
    assert 1.5 < float(zipped) < 3
    for expected in ("not cudnn: needs cuda, found cpu", "60 tokens written by the model", str(out), "--data.text"):
        assert expected in output
    assert re.search(r"^model     \d+,\d+ parameters \(\d+,\d+ decayed\): 1 layers", output, re.MULTILINE)
    assert f"run       {out}, 24 updates, {24 * 4 * 128:,} tokens\n" in output
    assert re.search(r"^memory    0\.\d+ of [\d.]+ GiB for an update$", output, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "time.jsonl",
        "loss.png",
        "checkpoints",
    }
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_rows_are_means_over_the_whole_update_and_all_devices(tiny_run, tmp_path):
    args = [*tiny_run, "--steps", 3, "--model.dropout", 0, "--batch_size", 16]
    assert run_here([*args, "--out", tmp_path / "one", "--micro_batch_size", 0]) == 0
    assert (
        run_here([*args, "--out", tmp_path / "eight", "--micro_batch_size", 1, "--eval.sample_tokens", 3], devices=8)
        == 0
    )
    for key in ("loss", "grad_norm", "val_loss"):
        one, eight = rows(tmp_path / "one", key), rows(tmp_path / "eight", key)
        assert list(one) == list(eight)
        np.testing.assert_allclose(list(one.values()), list(eight.values()), rtol=1e-5)
    assert rows(tmp_path / "one", "tokens") == {1: 256, 2: 512, 3: 768}


def test_a_run_continues_scanned_with_other_options_and_on_more_devices(tiny_run, tmp_path, capsys, monkeypatch):
    args = [*tiny_run, "--steps", 14, "--model.dropout", 0, "--batch_size", 8, "--model.n_layer", 2]
    assert run_here([*args, "--out", tmp_path / "whole"]) == 0
    assert "compiler  " not in capsys.readouterr().out
    whole = rows(tmp_path / "whole", "loss")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "14")
    monkeypatch.setitem(EXPERIMENTAL, "cpu", {"xla_cpu_enable_fast_min_max": False})
    changed = ["--model.scan_layers", "true", "--micro_batch_size", 1, "--compiler_options", "experimental"]
    assert run_here([*args, "--out", tmp_path / "run", *changed], devices=4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("compiler  xla_cpu_enable_fast_min_max=False") == 1
    (changed,) = [line for line in lines if line.startswith("changed")]
    assert changed.split(";")[0].split(maxsplit=1)[1] == "mesh data 1 × fsdp 1 -> data 4 × fsdp 1"  # and nothing else
    after = rows(tmp_path / "run", "loss")
    assert list(after) == list(range(1, 15))
    assert [after[step] for step in range(1, 11)] == [whole[step] for step in range(1, 11)]
    np.testing.assert_allclose(list(after.values()), list(whole.values()), rtol=1e-5)


@pytest.mark.slow
def test_a_finished_run_says_so_again(tiny_run, tmp_path, capsys, monkeypatch):
    plots = []
    monkeypatch.setattr("gpt2_jax.run.reporting.plot", lambda metrics, image, references: plots.append(image))
    args = [*tiny_run, "--out", tmp_path / "run", "--steps", 10, "--eval.every", 4]
    assert run_here(args) == 0
    assert plots == [tmp_path / "run" / "loss.png"] * 3  # after updates 4, 8 and 10
    content = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert run_here(args) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == content
    output = capsys.readouterr().out
    assert "bits per byte" in output
    following = shlex.split(output[output.rindex("next ") :])[4:]  # after: next python -m gpt2_jax.train
    assert run_here([*following, "--out", tmp_path / "next", "--steps", 2, "--optimizer.warmup_steps", 1]) == 0


def test_metrics_are_fetched_after_the_next_update_was_dispatched(tiny_run, tmp_path, monkeypatch):
    events = []
    make_train_step, update = training.make_train_step, Reporter.update

    def make(*args):
        step = make_train_step(*args)

        def dispatch(state, batch):
            events.append("dispatch")
            return step(state, batch)

        dispatch.lower = step.lower
        return dispatch

    def fetch(self, pending):
        if pending and pending[0] > self._reported:
            events.append(f"fetch {pending[0]}")
        update(self, pending)

    monkeypatch.setattr(training, "make_train_step", make)
    monkeypatch.setattr(Reporter, "update", fetch)
    assert run_here([*tiny_run, "--out", tmp_path / "run", "--steps", 4, "--eval.every", 0]) == 0
    assert events == ["dispatch", "dispatch", "fetch 1", "dispatch", "fetch 2", "dispatch", "fetch 3", "fetch 4"]


def test_a_diverged_run_stops_with_the_update_and_keeps_what_was_good(tiny_run, tmp_path, capsys):
    args = [*tiny_run, "--out", tmp_path / "run", "--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", 0]
    assert training.main([*map(str, args), "--batch_size", "8"]) == 2
    assert "parameters of norm inf; nothing was saved" in capsys.readouterr().err
    assert not any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_reader_that_leaves_loses_no_update(tiny_run, tmp_path, monkeypatch):
    """`train | head`: the lines end, the training continues."""
    read, write = os.pipe()
    with open(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        os.close(read)
        assert run_here([*tiny_run, "--out", tmp_path / "run", "--steps", 12]) == 0
    assert list(rows(tmp_path / "run", "loss")) == list(range(1, 13))
    assert (tmp_path / "run" / "checkpoints" / "12").exists()


def test_rows_on_standard_output_for_programs(tiny_run, tmp_path, capsys):
    args = [*tiny_run, "--out", tmp_path / "run", "--steps", 3, "--log.format", "json"]
    assert run_here(args) == 0
    printed = capsys.readouterr()
    content = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert printed.out == content
    assert "model     " in printed.err
    assert "update 3: validation loss " in printed.err
    assert run_here([*args, "--steps", 4], devices=2) == 0
    printed = capsys.readouterr()
    assert content + printed.out == (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "changed   mesh" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| head -n 8", "2>&1 | head -n 1", "> /dev/full"])
def test_the_command_with_a_reader_that_leaves(tiny_run, tmp_path, redirection):
    args = shlex.join([*tiny_run, "--out", str(tmp_path / "run"), "--steps", "40"])
    shell = f"{sys.executable} -m gpt2_jax.train {args} {redirection}; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE}
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    full = "standard output cannot be written (No space left on device); continuing without it\n"
    assert done.stderr == (full if "full" in redirection else "")
    assert list(rows(tmp_path / "run", "loss")) == list(range(1, 41))
    assert (tmp_path / "run" / "checkpoints" / "40").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="terminals that send no signal")
def test_a_terminal_that_closes_stops_with_a_checkpoint(tiny_run, tmp_path):
    process = command([*tiny_run, "--out", tmp_path / "run", "--steps", "100000", "--optimizer.decay_steps", "40"])
    wait_for_update(tmp_path / "run", 3)
    process.send_signal(signal.SIGHUP)
    code, output = finish(process)
    assert code == 128 + signal.SIGHUP
    assert "the same command resumes it" in output


@pytest.mark.slow
def test_a_moved_run_goes_on_where_it_is(tiny_run, tmp_path, capsys):
    assert run_here([*tiny_run, "--out", tmp_path / "old", "--steps", 3]) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    config = ["--config", tmp_path / "new" / "config.toml"]
    capsys.readouterr()
    assert run_here([*config, "--steps", 5]) == 0
    assert re.search(r"new, 5 updates, [\d,]+ tokens, resumed after update 3\n", capsys.readouterr().out)
    assert not (tmp_path / "old").exists()
    assert list(rows(tmp_path / "new", "loss")) == [1, 2, 3, 4, 5]
    assert parse_args("train", "", [*map(str, config), "--out", "other"]).out == "other"


@pytest.mark.slow
def test_a_run_goes_on_whatever_the_directory_of_its_programs(tiny_run, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(training.runtime, "enable_compilation_cache", used.append)
    out = tmp_path / "run"
    assert run_here([*tiny_run, "--out", out, "--compilation_cache", "/mine", "--steps", 2]) == 0
    config = (out / "config.toml").read_text()
    assert 'compilation_cache = "auto"\n' in config
    older = config.replace('compilation_cache = "auto"', 'compilation_cache = "/mine"')
    (out / "config.toml").write_text(older)
    assert run_here(["--config", out / "config.toml", "--steps", 4]) == 0
    assert used == ["/mine", "auto"]
    assert list(rows(out, "loss")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_shortened_run_goes_on_with_its_schedule(tiny_run, tmp_path, capsys):
    toml = TINY.replace("decay_steps = 40\n", "").replace("warmup_steps = 5", "warmup_steps = 20")
    (tmp_path / "tiny.toml").write_text(toml)
    args = list(map(str, [*tiny_run, "--out", tmp_path / "run"]))
    assert training.main([*args, "--steps", "4", "--batch_size", "8"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(
        "--steps 4 is shorter than the warmup of 20 updates: now 2, the same share as of 40 updates"
    )
    longer = [*args, "--steps", "8", "--batch_size", "8"]
    with pytest.raises(UserError, match=r"warmup_steps: 2 -> 4; .*decay_steps: 4 -> 8\); type (.*) to keep") as error:
        training.main(longer)
    (flags,) = re.findall(r"type (.*) to keep its schedule", str(error.value))
    assert training.main([*longer, *flags.split()]) == 0
    assert list(rows(tmp_path / "run", "loss")) == list(range(1, 9))


def test_a_known_accelerator_says_the_least_time_and_once_the_memory_of_an_update(
    tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reporting, "peak_memory", lambda device: (3 << 30, 15 << 30))
    monkeypatch.setattr(summary, "peak_flops", lambda devices, dtype: 1e5)
    assert run_here([*tiny_run, "--out", tmp_path / "run", "--steps", 2]) == 0
    printed = capsys.readouterr().out
    assert printed.count("memory    3 of 15 GiB for an update\n") == 1
    config = read_config(str(tmp_path / "run" / "config.toml"))
    size = int(re.search(r"^model     ([\d,]+) parameters", printed, re.MULTILINE)[1].replace(",", ""))
    tokens = 2 * config.batch_size * config.model.block_size
    least = duration(tokens * flops_per_token(config.model, size) / 1e5)
    assert f"2 updates, {tokens:,} tokens, at least {least} at the chips' peak\n" in printed


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch_size", "6"], "does not divide over 4 devices; set batch_size or batch_ramp to 4 or 8"),
        (["--batch_size", "16", "--micro_batch_size", "3"], "type --micro_batch_size 2"),
        (["--data.text", "/nonexistent/*.txt"], "matches no file"),
        (["--model.block_size", "100000"], "too few for one window"),
        (["--model.attention", "cudnn"], "needs cuda, found cpu"),
        (["--mesh.data", "3"], "does not make the 4 devices"),
        (["--out", "/proc/run"], "cannot write"),
    ],
)
def test_impossible_runs_write_nothing(tiny_run, tmp_path, change, message):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        run_here([*tiny_run, "--out", tmp_path / "run", *change], devices=4)
    assert sorted(tmp_path.iterdir()) == before


def test_the_directory_of_another_run_is_left_alone(tiny_run, tmp_path):
    args = [*tiny_run, "--out", tmp_path / "run", "--steps", 2]
    assert run_here(args) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another config \(seed: 1337 -> 7; model.n_layer: 1 -> 2\)"):
        run_here([*args, "--seed", 7, "--model.n_layer", 2])
    with pytest.raises(UserError, match=r"type --optimizer.decay_steps 40 to keep its schedule"):
        run_here([*args, "--optimizer.decay_steps", 50])
    with pytest.raises(UserError, match=r"is already at update 2, past steps = 1; type --steps 2"):
        run_here([*args, "--steps", 1])
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "one more line")
    with pytest.raises(UserError, match=r"the data of .* has changed"):
        run_here([*args, "--steps", 4])
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_a_checkpoint_of_another_state_layout_is_refused_but_is_still_a_model(tiny_run, tmp_path):
    args = [*tiny_run, "--out", tmp_path / "run", "--optimizer.warmup_steps", 1]
    assert run_here([*args, "--steps", 2]) == 0
    with Checkpoints(tmp_path / "run" / "checkpoints", 2) as checkpoints:  # layout 1 had no number
        checkpoints.save(3, final_state(tmp_path / "run"), {"data": checkpoints.info(2)["data"]})
    with pytest.raises(UserError, match=r"/3 was saved by another version .*layout 1, expected 2.*--init_from"):
        run_here([*args, "--steps", 4])
    checkpoint = tmp_path / "run" / "checkpoints" / "3"
    assert run_here([*args, "--init_from", checkpoint, "--out", tmp_path / "next", "--steps", 1]) == 0


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_directory(tiny_run, tmp_path):
    args = [*tiny_run, "--out", tmp_path / "run"]
    first = command([*args, "--steps", "100000", "--optimizer.decay_steps", "40"])
    wait_for_update(tmp_path / "run", 1)
    content = (tmp_path / "run" / "config.toml").read_bytes()
    code, output = finish(command([*args, "--steps", "50"]))
    first.kill()
    first.communicate()
    assert code == 2
    assert "another process is training in" in output
    assert (tmp_path / "run" / "config.toml").read_bytes() == content


def test_data_found_damaged_on_the_way_loses_nothing(tiny_run, tmp_path):
    tokens = np.zeros(1 << 18, dtype=np.uint16)
    tokens[(1 << 17) :: 4000] = 999
    write_llmc(tmp_path / "train.bin", tokens)
    write_llmc(tmp_path / "val.bin", tokens[:1000])
    args = [
        *tiny_run[:2],
        "--data.train",
        tmp_path / "train.bin",
        "--data.val",
        tmp_path / "val.bin",
        "--data.text",
        "",
    ]
    args += ["--out", tmp_path / "run", "--steps", 2000, "--eval.every", 0, "--checkpoint.every", 0]
    with pytest.raises(UserError, match=r"train.bin has the token 999, beyond model.vocab_size = 257"):
        run_here(args)
    done = list(rows(tmp_path / "run", "loss"))
    assert done == list(range(1, len(done) + 1))
    with Checkpoints(tmp_path / "run" / "checkpoints", 2) as checkpoints:
        assert checkpoints.latest() == len(done) > 0


@pytest.mark.parametrize("late", ["restore_or_init", "_check"])
def test_a_refused_start_leaves_no_directory(tiny_run, tmp_path, monkeypatch, late):
    """The model to start from may turn out to be damaged when the directory exists."""

    def refuse(*_):
        raise UserError("damaged")

    monkeypatch.setattr(
        f"gpt2_jax.train.{'RunCheckpoints.restore_or_init' if late != '_check' else 'BatchSource'}", refuse
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="damaged"):
        run_here([*tiny_run, "--out", tmp_path / "new" / "run"])
    assert sorted(tmp_path.iterdir()) == before


def test_data_that_cannot_be_used_writes_nothing(tiny_run, tmp_path):
    good, bad = tmp_path / "good.bin", tmp_path / "bad.bin"
    write_llmc(good, np.zeros(1000, dtype=np.uint16))
    args = [*tiny_run[:2], "--data.text", "", "--data.train", bad, "--data.val", good, "--out", tmp_path / "run"]
    for content, message in (
        (good.read_bytes()[:-2], "is cut off or damaged"),
        (good.read_bytes()[:-2] + b"\xff\xff", "has the token 65535, beyond"),
    ):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=message):
            run_here(args)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match="is empty; give files with text"):
        run_here([*tiny_run[:2], "--data.text", empty, "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--config", "quickstart", "--stepz", "3"], "error: unknown flag --stepz; did you mean --steps?"),
        (["--config", "mine.toml"], "error: --config mine.toml: No such file or directory; give a .toml file or"),
        (["--config", "quickstart", "--out", "/proc/run"], "error: cannot write the run directory /proc/run:"),
    ],
)
def test_the_command_ends_with_one_line_and_code_2(args, line, tmp_path):
    code, output = finish(command(args, cwd=tmp_path))
    assert code == 2
    assert output.startswith(line)
    assert output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_without_checkpoints_takes_another_config(tiny_run, tmp_path):
    args = [*map(str, tiny_run), "--out", str(tmp_path / "run"), "--steps", "2", "--eval.every", "0"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(parse_args("train", "", args)))
    assert run_here([*args, "--seed", 7]) == 0
    assert read_config(str(tmp_path / "run" / "config.toml")).seed == 7


def test_importing_the_package_starts_no_backend():
    """`--help` and errors must not wait for, or take, an accelerator."""
    check = "import gpt2_jax.train, jax._src.xla_bridge as bridge; assert not bridge._backends"
    subprocess.run([sys.executable, "-c", check], check=True)


# --- starting from another model -----------------------------------------------------------------------


@pytest.fixture
def origin(tmp_path):
    """A model of transformers, and a directory of it as a user has it: bytes as tokens, more positions than the run."""
    config = GPT2Config(vocab_size=257, block_size=24, n_layer=1, n_head=2, n_embd=16)
    theirs = torch_gpt2(config)
    run = tmp_path / "bytes"
    run.mkdir()
    (run / "config.toml").write_text(to_toml(ModelConfig(config, DataConfig(tokenizer="bytes"))))
    with Checkpoints(run / "checkpoints", 1) as checkpoints:
        checkpoints.save(0, {"params": as_params(theirs.state_dict(), config)}, {})
    return theirs, convert(str(run), "huggingface", tmp_path / "origin")


FROZEN = ["--steps", "1", "--optimizer.learning_rate", "1e-12", "--optimizer.final_learning_rate", "0"]


@pytest.mark.parametrize("layers", ["unrolled", pytest.param("scanned", marks=pytest.mark.slow)])
def test_starts_from_another_model(tiny_run, origin, tmp_path, layers):
    theirs, directory = origin
    flags = ["--model.scan_layers", str(layers == "scanned").lower(), "--mesh.fsdp", "2", "--model.dropout", "0"]
    flags += ["--batch_size", "8", "--batch_ramp", "320", "4"]
    args = [*tiny_run, *FROZEN, *flags, "--optimizer.warmup_steps", "1", "--optimizer.decay_steps", "1"]
    assert run_here([*args, "--init_from", directory, "--out", tmp_path / "out"], devices=4) == 0
    data, _ = open_data(read_config(str(tmp_path / "out" / "config.toml")))
    with torch.no_grad():
        nats, targets = 0.0, 0
        for (batch,) in ([batch] for batch in eval_batches(data.val, 1)):
            tokens = torch.from_numpy(batch).long()
            counted = tokens[:, 1:] != IGNORE
            logits = theirs(tokens[:, :-1].clamp(min=0)).logits
            losses = torch.nn.functional.cross_entropy(logits[counted], tokens[:, 1:][counted], reduction="sum")
            nats, targets = nats + losses.item(), targets + int(counted.sum())
    (val_loss,) = rows(tmp_path / "out", "val_loss").values()
    assert val_loss == pytest.approx(nats / targets, rel=1e-6)


def test_a_run_from_another_model_continues_without_it(tiny_run, origin, tmp_path):
    args = [*tiny_run, "--init_from", str(origin[1]), "--out", str(tmp_path / "out")]
    assert run_here([*args, "--steps", "4"]) == 0
    shutil.rmtree(origin[1])
    assert run_here([*args, "--steps", "6"]) == 0
    assert list(rows(tmp_path / "out", "loss")) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match=r"init_from: .* -> ''"):
        run_here([*tiny_run, "--out", str(tmp_path / "out")])


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("files", "files of another tokenizer")]


def test_a_start_that_fails_leaves_no_tokenizer(origin, tmp_path):
    config = parse_args("train", "", ["--config", "quickstart", "--out", str(tmp_path / "new" / "out")])
    with contextlib.suppress(UserError), open_directory(config, None) as out:
        keep_initial_tokenizer(open_model(str(origin[1])), config, out)
        assert {"vocab.json", "generation_config.json"} <= set(os.listdir(out))
        raise UserError("no memory")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["text", *SLOW_KINDS])
def test_a_run_keeps_the_tokenizer_of_the_model_it_starts_from(tiny_run, origin, tmp_path, tokens):
    theirs = AutoTokenizer.from_pretrained(origin[1])
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.add_bos_token = True
    theirs.save_pretrained(origin[1])
    args = [*tiny_run, "--init_from", origin[1], "--steps", "1", "--out", tmp_path / "out"]
    if tokens != "text":
        np.save(tmp_path / "tokens.npy", np.arange(200, dtype=np.uint16))
        args += ["--data.text=", "--data.train", tmp_path / "tokens.npy", "--data.val", tmp_path / "tokens.npy"]
    if "another" in tokens:
        args += ["--data.tokenizer", "chars", "--data.characters", string.printable]
    assert run_here(args) == 0
    kept = open_model(str(tmp_path / "out"))
    if "another" in tokens:
        assert not (tmp_path / "out" / "tokenizer.json").exists()
        return
    assert kept.tokenizer.decode_bytes([257]) == b"[PAD]"
    assert kept.boundaries == open_model(str(origin[1])).boundaries
    copy = AutoTokenizer.from_pretrained(convert(str(tmp_path / "out"), "huggingface", tmp_path / "copy"))
    text = "def x[PAD]<|endoftext|>"
    assert (copy(text)["input_ids"], copy.pad_token_id) == (theirs(text)["input_ids"], 257)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.n_layer", "3"], "has n_layer 1, not 3; type --model.n_layer 1$"),
        (["--model.bias", "false", "--model.gelu", "exact"], "bias True, not False, gelu tanh, not exact; type "),
        (["--model.block_size", "32"], "has block_size 24, not 32; type --model.block_size 24"),
        (["--model.vocab_size", "300"], "has vocab_size 257, not 300; type --model.vocab_size 257"),
        (["--data.tokenizer", "chars"], "was not trained on data.tokenizer = 'chars'; type --data.tokenizer bytes"),
        (["--init_from", "./none"], "./none does not exist"),
    ],
)
def test_a_config_that_does_not_fit_the_model_it_starts_from(tiny_run, origin, tmp_path, flags, message):
    args = [*tiny_run, "--out", str(tmp_path / "out"), "--init_from", str(origin[1]), *flags]
    with pytest.raises(UserError, match=message):
        run_here(args)
    assert not (tmp_path / "out").exists()


def test_a_converted_model_is_not_taken_for_a_run(tiny_run, origin, tmp_path):
    model = convert(str(origin[1]), "orbax", tmp_path / "model")
    with pytest.raises(UserError, match="has checkpoints but not the config of a run"):
        run_here([*tiny_run, "--out", str(model)])


@pytest.mark.slow
def test_the_alphabet_comes_from_the_model(tiny_run, tmp_path):
    args = [*tiny_run, "--data.tokenizer", "chars", "--data.characters", "\n 0123456789abcdeinqrsuxyz", "--steps", "2"]
    assert run_here([*args, "--out", str(tmp_path / "first")]) == 0
    args = [*tiny_run, "--data.tokenizer", "chars", "--init_from", str(tmp_path / "first"), "--steps", "2"]
    for _ in range(2):  # a new run, and one that continues
        assert run_here([*args, "--out", str(tmp_path / "second")]) == 0
    written = read_config(str(tmp_path / "second" / "config.toml"))
    assert written.data.characters == "\n 0123456789abcdeinqrsuxyz"
    with pytest.raises(UserError, match=r"has another alphabet; leave data.characters empty"):
        run_here([*args, "--out", str(tmp_path / "third"), "--data.characters", "\n 0123456789adeiqrsu"])
