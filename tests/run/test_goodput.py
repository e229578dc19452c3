"""Where the time went: every moment belongs to one phase, and restarts are counted."""

import json
import re
import threading
import time

import jax
import pytest
from jax import monitoring

from gpt2_jax import train as training
from gpt2_jax.config.flags import parse_args
from gpt2_jax.data.pipeline import BatchSource
from gpt2_jax.run import goodput
from gpt2_jax.run.goodput import Clock, describe_goodput, hours_by_step, read_processes

COMPILE = "/jax/core/compile/backend_compile_duration"


def read(directory):
    return goodput.goodput(read_processes(directory))


def write(directory, *processes):
    """A time.jsonl of processes: when each started, the update that it resumed after, and its rows."""
    rows = [
        {"started": started, "resumed_after": after, "step": step, "seconds": seconds}
        for started, after, ended in processes
        for step, seconds in ended
    ]
    (directory / "time.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, in a list: it stands still until a test changes it."""
    seconds = [1000.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(goodput.time, "time", lambda: 5e8 + seconds[0])
    return seconds


def test_every_second_belongs_to_one_phase(tmp_path, now):
    with Clock(5e8 + 995.0, tmp_path / "time.jsonl") as clock:
        clock.record(0)
        assert read(tmp_path) == {}  # it is not known yet whether the run resumes
        clock.resume(0)
        clock.enter(goodput.TRAINING)
        now[0] += 1.0
        with clock.phase(goodput.EVALUATING):
            now[0] += 2.0
            with clock.phase(goodput.SAVING):
                now[0] += 4.0
        clock.record(3)
        now[0] += 8.0
        clock.record(4, now=False)
        assert read(tmp_path) == {"starting": 5.0, "training": 1.0, "evaluating": 2.0, "saving": 4.0}
        now[0] += 8.0
        clock.record(5, now=False)
        assert read(tmp_path)["training"] == 17.0
        now[0] += 32.0
    assert read(tmp_path) == {"training": 49.0, "evaluating": 2.0, "saving": 4.0, "starting": 5.0}
    assert [step for step, _ in read_processes(tmp_path)[0].rows] == [0, 3, 5, 5]


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_compiling_is_counted_once_where_it_nests(tmp_path, now, late):
    with Clock(5e8 + 1000.0, tmp_path / "time.jsonl") as clock:
        clock.resume(0)
        clock.enter(goodput.TRAINING)
        now[0] += 5.0
        monitoring.record_event_duration_secs(COMPILE, 2.0 + late)  # reported late, it seems to begin earlier
        now[0] += 1.0
        monitoring.record_event_duration_secs(COMPILE, 3.0)  # holds the one before
        monitoring.record_event_duration_secs("/jax/other", 3.0)
        other = threading.Thread(target=monitoring.record_event_duration_secs, args=(COMPILE, 3.0))
        other.start()
        other.join()
    assert read(tmp_path) == {"training": 3.0 - late, "compiling": 3.0 + late}
    monitoring.record_event_duration_secs(COMPILE, 1.0)  # after the end: nobody listens


class Result:
    """Stands for an array that is ready when a test says so."""

    def __init__(self):
        self.ready, self.waits = threading.Event(), threading.Event()

    def block_until_ready(self):
        self.waits.set()
        self.ready.wait(60)


def test_waiting_for_data_counts_only_while_the_device_has_nothing_to_do(tmp_path, now):
    def done(result):
        result.ready.set()
        while clock._device.idle_since() is None:
            time.sleep(0.001)

    with Clock(5e8 + 1000.0, tmp_path / "time.jsonl") as clock:
        clock.resume(0)
        clock.enter(goodput.TRAINING)
        now[0] += 1.0
        clock.waited_for_data(1000.0)  # for the first batch
        first, second = Result(), Result()
        clock.dispatched(first)
        now[0] += 2.0
        clock.waited_for_data(1001.0)  # the device works all the time
        clock.dispatched(second)
        first.ready.set()
        second.waits.wait(60)
        now[0] += 4.0
        clock.waited_for_data(1003.0)  # it has its next work already
        done(second)
        now[0] += 8.0
        clock.waited_for_data(1005.0)  # since 1007 it has nothing to do
    assert read(tmp_path) == {"training": 6.0, "waiting for data": 9.0}


def test_a_restart_counts_what_was_lost_and_the_time_between(tmp_path):
    write(
        tmp_path,
        (1000.0, 0, [(0, {"starting": 5.0}), (10, {"starting": 5.0, "training": 10.0}),
                     (10, {"starting": 5.0, "training": 10.0, "saving": 1.0}),
                     (14, {"starting": 5.0, "training": 14.0, "saving": 1.0})]),
        (1030.0, 10, [(10, {"starting": 3.0}), (20, {"starting": 3.0, "training": 10.0})]),
    )  # fmt: skip
    assert read(tmp_path) == {"training": 20.0, "saving": 1.0, "starting": 8.0, "lost": 4.0, "stopped": 10.0}
    assert describe_goodput(read(tmp_path)).startswith("0:43: 47% training, 23% stopped, 19% starting, 9% lost")
    steps, hours = hours_by_step(read_processes(tmp_path))
    assert steps == [0, 10, 20]
    assert [3600 * hour for hour in hours] == pytest.approx([5.0, 15.0, 29.0])


def test_a_resume_from_an_older_checkpoint_loses_the_work_of_all_before(tmp_path):
    write(
        tmp_path,
        (0.0, 0, [(5, {"training": 5.0}), (10, {"training": 10.0})]),
        (10.0, 10, [(10, {"starting": 1.0}), (20, {"starting": 1.0, "training": 10.0})]),
        (21.0, 5, [(5, {"starting": 1.0}), (30, {"starting": 1.0, "training": 25.0})]),
    )
    assert read(tmp_path) == {"training": 30.0, "starting": 1.0, "lost": 16.0}


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    assert read(tmp_path) == {}
    write(tmp_path, (0.0, 0, [(1, {"training": 1.0})]))
    with (tmp_path / "time.jsonl").open("a") as file:
        file.write("[1]\n")
        for damaged in ('"x"', "1e999", "NaN", "-1", "9" * 400):
            file.write(f'{{"started": 0.0, "resumed_after": 0, "step": 2, "seconds": {{"training": {damaged}}}}}\n')
        file.write('{"started": 0.')
    assert read(tmp_path) == {"training": 1.0}
    with Clock(time.time(), tmp_path / "time.jsonl") as clock:
        clock.resume(1)
    assert len(read_processes(tmp_path)) == 2  # the torn line does not hide the next one


TINY = ["--config", "quickstart", "--steps", "12", "--batch_size", "4", "--micro_batch_size", "2", "--log.every", "1",
        "--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "2", "--model.block_size", "16",
        "--optimizer.warmup_steps", "2", "--eval.tokens", "16", "--eval.every", "0", "--eval.sample_tokens", "0",
        "--checkpoint.every", "4"]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_slow_data_that_is_resumed(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(200)))
    args = [*TINY, "--data.text", str(text), "--out", str(tmp_path / "run")]
    config = parse_args("train", "", args)
    batch = BatchSource.__getitem__

    def slow(self, index):
        if index == 9:
            raise KeyboardInterrupt
        time.sleep(0.1)
        return batch(self, index)

    monkeypatch.setattr(BatchSource, "__getitem__", slow)
    started = time.time()
    with pytest.raises(KeyboardInterrupt):
        training.train(config, jax.devices()[:1])
    monkeypatch.setattr(BatchSource, "__getitem__", batch)
    assert training.train(config, jax.devices()[:1]) == 0
    elapsed = time.time() - started
    seconds = read(tmp_path / "run")
    assert sum(seconds.values()) == pytest.approx(elapsed, rel=0.1)
    assert 0.2 < seconds[goodput.DATA] < 1.0  # Grain reads some while the step compiles
    assert seconds[goodput.COMPILING] > 0.1
    assert seconds[goodput.RESTORING] > 0
    assert re.search(r"^time      \d:\d\d: \d+% compiling, ", capsys.readouterr().out, re.MULTILINE)
