"""Trackers get every row once, over kills and resumes, and none can stop a run. Their files are read by themselves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from gpt2_jax import report
from gpt2_jax.config import flatten
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.reports import following as followers
from gpt2_jax.reports import trackers
from gpt2_jax.reports.following import Follower, following, send_all

NAMES = ("tensorboard", "wandb", "trackio")


@pytest.fixture
def service(monkeypatch, tmp_path_factory):
    """No account, no network, and a database beside those of the tests. Trackio looks for it when it is imported."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.getbasetemp() / "trackio"))
    for package in ("tensorboardX", "wandb", "trackio"):
        pytest.importorskip(package)


def sent_to_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    texts = {
        tag.removesuffix("/text_summary"): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }
    return scalars, texts


def sent_to_wandb(run):
    """By wandb's own reader of its files."""
    values: dict[str, list] = {}
    ids, configs = set(), []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", file]
        read = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
        for record in map(json.loads, read.stdout.splitlines()):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
                configs.append(record["run"]["config"]["update"])
            if record["type"] == "history":
                for name, value in record["history"]["item"].items():
                    values.setdefault(name, []).append((record["history"]["step"]["num"], value))
    assert len(ids) == 1
    assert all(config.items() >= as_sent(run).items() for config in configs)  # wandb adds a key of its own
    return values


def sent_to_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    state = json.loads((run / trackers.STATE).read_text())["trackio"]["id"]
    name = f"{run.name}-{state}"
    assert SQLiteStorage.get_run_config(trackers.PROJECT, name).items() >= as_sent(run).items()
    values: dict[str, list] = {}
    for row in SQLiteStorage.get_logs(trackers.PROJECT, name):
        for key, value in row.items():
            values.setdefault(key, []).append((row["step"], value))
    return values


def as_sent(run):
    """The config of a run by dotted keys, as JSON gives it back."""
    return json.loads(json.dumps(flatten(read_config(str(run / "config.toml")))))


def rows_of(run, key):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


def check(run, values):
    for key in ("loss", "val_loss", "hellaswag/acc", "learning_rate"):
        assert values[key] == rows_of(run, key), key


@pytest.mark.slow
def test_a_run_that_is_over_is_sent_once(make_run, service, capsys):
    run = make_run("run")
    for _ in range(2):
        assert report.main([str(run), "--to", *NAMES]) == 0
    assert not (run / "report.html").exists()
    scalars, texts = sent_to_tensorboard(run)
    check(run, scalars)
    assert texts["fingerprint"] == rows_of(run, "fingerprint")
    assert [step for step, _ in texts["samples/0"]] == [10, 40]
    assert "n_layer = 12" in texts["config"][0][1]
    values = sent_to_wandb(run)
    check(run, values)
    assert values["fingerprint"] == rows_of(run, "fingerprint")
    assert [step for step, _ in values["samples/0"]] == [10, 40]
    values = sent_to_trackio(run)
    check(run, values)
    assert values["fingerprint"] == rows_of(run, "fingerprint")


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_continues_the_experiment(make_run, service):
    run = make_run("run")
    metrics = run / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    config = read_config(str(run / "config.toml"))
    metrics.write_text("".join(row for row in rows if json.loads(row)["step"] <= 25) + '{"step": 26, "los')
    for name in NAMES:  # it is killed after update 25, with 20 saved
        killed = Follower(run, name, config)
        killed.send()
        killed.close()
    metrics.write_text("".join(row for row in rows if json.loads(row)["step"] <= 20))
    with following(run, NAMES, config, pytest.fail) as state, metrics.open("a") as file:
        state.is_over = True
        file.write("".join(row for row in rows if json.loads(row)["step"] > 20))
    check(run, sent_to_tensorboard(run)[0])
    check(run, sent_to_wandb(run))
    check(run, sent_to_trackio(run))


@pytest.mark.slow
def test_a_process_that_is_killed_loses_and_repeats_nothing(service, tmp_path):
    run = tmp_path / "run"
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16}
    flags = {"config": "quickstart", "out": run, **{f"model.{key}": size for key, size in sizes.items()},
             "eval.every": 50, "eval.tokens": 64, "eval.sample_tokens": 0, "checkpoint.every": 50,
             "optimizer.decay_steps": 200, "optimizer.warmup_steps": 5}  # fmt: skip
    command = [sys.executable, "-m", "gpt2_jax.train", "--log.to", *NAMES]
    command += [str(word) for key, value in flags.items() for word in (f"--{key}", value)] + ["--steps"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment.pop("WANDB_SERVICE", None)  # that of this process, if another test has started it
    killed = subprocess.Popen([*command, "1000000"], env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / trackers.STATE).exists() or not (run / "checkpoints" / "100").exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)  # with wandb's own process
    killed.wait()
    steps = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()) + 60
    resumed = subprocess.run([*command, str(steps)], env=environment, timeout=300, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "log.to" not in resumed.stdout
    for values in (sent_to_tensorboard(run)[0], sent_to_wandb(run), sent_to_trackio(run)):
        for key in ("loss", "val_loss"):
            assert values[key] == rows_of(run, key), key


class Fails:
    """A tracker that fails at an update."""

    after = 0
    at = 5
    steps: ClassVar[list[int]] = []

    def __init__(self, run, config):
        self.steps.clear()

    def log(self, step, values, texts):
        if step == self.at:
            raise ConnectionError("gone\naway")
        self.steps.append(step)

    def close(self):
        raise AssertionError("it was given up")


class Works(Fails):
    """One that does not."""

    at = None
    steps: ClassVar[list[int]] = []

    def close(self):
        pass


def test_a_tracker_that_fails_is_named_once(make_run, monkeypatch):
    run = make_run("run")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Fails)
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Works)
    warnings: list[str] = []
    with following(run, ["wandb", "trackio"], read_config(str(run / "config.toml")), warnings.append):
        pass
    assert warnings == ["log.to: wandb failed, and gets no further rows (gone away)"]
    assert Fails.steps == [1, 2, 3, 4]
    assert Works.steps == list(range(1, 41))  # the other one got everything


@pytest.mark.parametrize(("is_over", "seconds"), [(False, "0.1"), (True, "0.2")])
def test_a_tracker_that_hangs_does_not_hold_the_run(make_run, monkeypatch, is_over, seconds):
    monkeypatch.setattr(Fails, "log", lambda *args: time.sleep(60))
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Fails)
    monkeypatch.setattr(followers, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(followers, "OVER_SECONDS", 0.2)
    run, warnings = make_run("run"), []
    started = time.monotonic()
    with following(run, ["wandb"], read_config(str(run / "config.toml")), warnings.append) as state:
        state.is_over = is_over
    assert time.monotonic() - started < 5
    assert warnings == [f"log.to: wandb did not store the last rows within {seconds} s"]


def test_damaged_rows_are_named(make_run, monkeypatch):
    run, warnings = make_run("run"), []
    config = read_config(str(run / "config.toml"))
    (run / "metrics.jsonl").write_text("no row\n")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Works)
    with following(run, ["wandb"], config, warnings.append):
        pass
    (line,) = warnings
    assert line.startswith("log.to: wandb failed, and gets no further rows (Expecting value")


def test_a_run_without_rows_opens_nothing(make_run, monkeypatch):
    run = make_run("run")
    (run / "metrics.jsonl").unlink()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", pytest.fail)
    with following(run, ["wandb"], read_config(str(run / "config.toml")), pytest.fail):
        pass


def test_a_package_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    trackers.import_trackers([])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    with pytest.raises(
        UserError, match=r"needs tensorboardX, which is not installed; type pip install 'gpt2_jax\[tensorboard\]'"
    ):
        trackers.import_trackers(["tensorboard"])
    (tmp_path / "tensorboardX.py").write_text("raise TypeError('Descriptors\\ncannot be created')")
    monkeypatch.delitem(sys.modules, "tensorboardX")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="tensorboardX cannot be imported: Descriptors cannot be created; leave"):
        trackers.import_trackers(["tensorboard"])


@pytest.mark.slow
def test_without_an_account_the_line_says_what_to_type(make_run, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    run = make_run("run")
    line = send_all(run, "wandb", read_config(str(run / "config.toml")))
    assert "wandb has no API key; type wandb login, or set WANDB_MODE=offline" in line
