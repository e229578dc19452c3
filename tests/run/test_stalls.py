"""Stalls: when one is reported, what it says the run waits for, and which process is named."""

import json
import os
import re
import subprocess
import sys
import threading
import time

import jax
import pytest
from xla_flags import FAST_COMPILE

from gpt2_jax import train as training
from gpt2_jax.activity import DEVICE, Activity
from gpt2_jax.config import LogConfig, differences
from gpt2_jax.config.flags import parse_args
from gpt2_jax.config.validation import validate
from gpt2_jax.errors import UserError
from gpt2_jax.run import stalls
from gpt2_jax.run.stalls import Peers, Watch, compare, watched

TINY = ["--config", "quickstart", "--batch_size", "2", "--model.n_layer", "1", "--model.n_embd", "8",
        "--model.n_head", "1", "--model.block_size", "8", "--optimizer.warmup_steps", "1", "--eval.tokens", "8",
        "--eval.sample_tokens", "0"]  # fmt: skip


def stall_lines(error):
    return [line for line in error.splitlines() if line.startswith("stall: ")]


# --- when ------------------------------------------------------------------------------------------------


class Script:
    """Stands in for the event that ends a watch, and lets the run act each time that the watch would have waited."""

    def __init__(self, watch, doing, acts):
        self.watch, self.doing, self.acts = watch, doing, iter(acts)

    def wait(self, seconds):
        assert seconds == self.watch._seconds / 4
        act = next(self.acts, None)
        if act is None:
            return True
        step, self.doing[0] = act
        self.watch.step = step
        return False

    def is_set(self):
        return False


@pytest.fixture
def lines_of(monkeypatch, capfd):
    """The lines of a watch over 1 s that looks at these updates and phases, every quarter of a second."""
    doing = ["waiting"]
    monkeypatch.setattr(stalls, "activity_of", lambda thread: Activity(*doing[0].split(":")))

    def lines_of(*acts, **keywords):
        watch = Watch(1.0, **keywords)
        watch._stop = Script(watch, doing, acts)
        watch._run()
        return stall_lines(capfd.readouterr().err)

    return lines_of


def test_slow_updates_are_no_stall(lines_of):
    assert lines_of(*((step, "waiting") for step in range(1, 9) for _ in range(4))) == []


def test_another_phase_is_progress(lines_of):
    assert lines_of(*((3, phase) for phase in ("waiting", "evaluating", "saving", "waiting") for _ in range(4))) == []


def test_more_that_is_done_is_progress(lines_of):
    assert lines_of(*((3, f"evaluating:{count}") for count in range(4) for _ in range(4))) == []


def test_a_stall_is_reported_once_and_again_after_progress(lines_of):
    assert lines_of(*[(7, "waiting")] * 20, *[(8, "saving")] * 9) == [
        "stall: no progress for 1 s after update 7, waiting; the stacks of all threads:",
        "stall: resumes after 0 s, saving after update 8",
        "stall: no progress for 1 s after update 8, saving; the stacks of all threads:",
    ]
    assert lines_of(*[(0, "compiling")] * 9) == [
        "stall: no progress for 1 s before the first update, compiling; the stacks of all threads:"
    ]


def test_a_stall_ends_the_run_if_asked_to(lines_of, monkeypatch):
    codes = []
    monkeypatch.setattr(stalls, "end_all", codes.append)
    assert len(lines_of(*[(7, "waiting")] * 20)) == 1
    assert codes == []
    lines = lines_of(*[(7, "waiting")] * 20, ends_run=True)
    assert codes == [1]
    assert lines[1].startswith("stall: ending the run with exit code 1; the same command resumes")


def test_a_thread_watches_and_prints_the_stacks(capfd):
    watch = Watch(0.2)
    watch.start()
    try:
        error, deadline = "", time.monotonic() + 20
        while "test_a_thread_watches" not in error.partition("Current thread")[2]:
            assert time.monotonic() < deadline
            time.sleep(0.3)
            error += capfd.readouterr().err
    finally:
        watch.stop()
    assert not watch._thread.is_alive()
    assert re.match("stall: no progress for 0.2 s before the first update, in .*; the stacks of all threads:", error)
    assert f'File "{__file__}", line' in error  # the stack of this thread


def test_off_by_default_without_a_thread():
    before = threading.active_count()
    with watched(LogConfig()) as watch:
        watch.step = 3
        assert threading.active_count() == before
    assert not watch._thread.is_alive()


def test_keys_are_checked_and_change_no_mathematics():
    plain, on = (parse_args("train", "", [*TINY, *flags]) for flags in ([], ["--log.stall_seconds", "600"]))
    assert differences(plain, on) == {}
    with pytest.raises(UserError, match=r"log.stall_seconds = -1.0; expected a finite number, 0 or more"):
        validate(parse_args("train", "", [*TINY, "--log.stall_seconds", "-1"]))
    with pytest.raises(UserError, match=r"needs log.stall_seconds above 0; type --log.stall_seconds 600"):
        validate(parse_args("train", "", [*TINY, "--log.stall_exit", "true"]))


# --- several processes -----------------------------------------------------------------------------------


class Store:
    """A key-value store of several processes, as JAX's client has one."""

    def __init__(self):
        self.values = {}
        self.answers = threading.Event()
        self.answers.set()

    def key_value_set(self, key, value, allow_overwrite=False):
        assert self.answers.wait(20)
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, directory):
        return [(key, value) for key, value in self.values.items() if key.startswith(directory)]

    def key_value_delete(self, key):
        self.values.pop(key, None)


def test_process_0_names_the_process_that_waits_for_something_else():
    store, stop = Store(), threading.Event()
    first, second = Peers(store, 0, 2), Peers(store, 1, 2)
    answer = threading.Thread(target=second.ask, args=(5, "reading a batch of training data", 0.0, stop))
    answer.start()
    line = first.ask(5, DEVICE, 5.0, stop)
    stop.set()
    answer.join()
    here = first.name().removeprefix("process 0 on ")
    assert line == (
        f"process 1 on {here}: reading a batch of training data after update 5; "
        f"process 0 on {here}: waiting for the device after update 5"
    )
    second.withdraw()
    assert [json.loads(value) for key, value in store.key_value_dir_get("gpt2_jax/stalls/at/")] == [[5, DEVICE]]


def test_process_0_names_the_process_that_is_silent():
    store = Store()
    first, _ = Peers(store, 0, 2), Peers(store, 1, 2)
    line = first.ask(0, DEVICE, 0.1, threading.Event())
    assert re.match(r"process 1 on \S+: no report: stopped, .*; process 0 on \S+: waiting .* before the first", line)


def test_others_name_process_0_if_it_does_not_answer():
    store = Store()
    second = Peers(store, 1, 2)
    store.answers.clear()
    assert "process 0 does not answer" in second.ask(3, DEVICE, 0.1, threading.Event())
    store.answers.set()


def test_many_processes_are_one_short_line():
    hosts = {process: f"host{process}" for process in range(8)}
    found = dict.fromkeys(range(8), (7, DEVICE)) | {5: (7, "evaluating"), 2: (6, DEVICE)}
    del found[6]
    assert compare(found, hosts) == (
        "process 6 on host6: no report: stopped, hanging as a whole, or still moving; "
        "process 5 on host5: evaluating after update 7; process 2 on host2: waiting for the device after update 6; "
        "process 0-1, 3-4, 7: waiting for the device after update 7"
    )


# --- a run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_stalls_says_so_and_goes_on(tmp_path, capfd, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(60)))
    read = training.BatchSource.__getitem__

    def slow(self, update):
        if update == 5:
            time.sleep(0.8)
        return read(self, update)

    monkeypatch.setattr(training.BatchSource, "__getitem__", slow)
    args = [*TINY, "--data.text", str(text), "--out", str(tmp_path / "run"), "--steps", "8"]
    config = parse_args("train", "", [*args, "--log.stall_seconds", "0.2"])
    assert training.train(config, jax.devices()[:1]) == 0
    # Update 5 has been dispatched. Its metrics are fetched after the next one, so update 4 was the last to complete.
    expected = (
        "stall: no progress for 0.2 s after update 4, reading a batch of training data; the stacks of all threads:"
    )
    assert stall_lines(capfd.readouterr().err).count(expected) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "stalls"]


@pytest.mark.slow
def test_a_stall_ends_the_run_with_code_1(tmp_path):
    script = """
import sys, time
from gpt2_jax.data.pipeline import BatchSource
from gpt2_jax.train import command
read = BatchSource.__getitem__
def block(self, update):
    if update == 5:
        time.sleep(1000)
    return read(self, update)
BatchSource.__getitem__ = block
command()
"""
    args = [*TINY, "--data.text", stalls.__file__, "--out", str(tmp_path / "run"), "--steps", "8"]
    flags = ["--checkpoint.every", "2", "--log.stall_seconds", "15", "--log.stall_exit", "true"]
    command = [sys.executable, "-c", script, *args, *flags]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE}  # one device
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 1
    assert "stall: no progress for 15 s after update 4, reading a batch of training data; the stacks" in ended.stderr
    assert "in block" in ended.stderr  # the thread that reads
    assert "stall: ending the run with exit code 1; the same command resumes from the last checkpoint" in ended.stderr
    assert training.train(parse_args("train", "", args), jax.devices()[:1]) == 0  # from checkpoint 4
