"""Where the time went: every moment belongs to one phase, and restarts are counted."""

import json
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


def test_phases_sum_to_the_time_since_the_start(tmp_path):
    started = time.time() - 5.0
    with Clock(started, tmp_path / "time.jsonl") as clock:
        clock.enter(goodput.TRAINING)
        with clock.phase(goodput.EVALUATING):
            time.sleep(0.2)
            with clock.phase(goodput.SAVING):
                time.sleep(0.1)
        clock.record(3)
        elapsed = time.time() - started
    seconds = read(tmp_path)
    assert sum(seconds.values()) == pytest.approx(elapsed, abs=0.02)
    assert seconds[goodput.STARTING] == pytest.approx(5.0, abs=0.02)
    assert seconds[goodput.EVALUATING] == pytest.approx(0.2, abs=0.05)
    assert seconds[goodput.SAVING] == pytest.approx(0.1, abs=0.05)


def test_compiling_is_counted_once_where_it_nests(tmp_path):
    with Clock(time.time(), tmp_path / "time.jsonl") as clock:
        clock.enter(goodput.TRAINING)
        time.sleep(0.3)
        monitoring.record_event_duration_secs(COMPILE, 0.1)
        monitoring.record_event_duration_secs(COMPILE, 0.25)  # holds the one before
        monitoring.record_event_duration_secs("/jax/other", 0.25)
        other = threading.Thread(target=monitoring.record_event_duration_secs, args=(COMPILE, 0.3))
        other.start()
        other.join()
        clock.record(1)
    seconds = read(tmp_path)
    assert seconds[goodput.COMPILING] == pytest.approx(0.25, abs=0.005)
    assert seconds[goodput.TRAINING] == pytest.approx(0.05, abs=0.03)
    monitoring.record_event_duration_secs(COMPILE, 1.0)  # after the end: nobody listens


def test_waiting_for_data_counts_only_while_the_device_has_nothing_to_do(tmp_path):
    class Result:
        """Stands for an array that is there after some time."""

        def __init__(self, seconds):
            self.seconds = seconds

        def block_until_ready(self):
            time.sleep(self.seconds)

    with Clock(time.time(), tmp_path / "time.jsonl") as clock:
        clock.enter(goodput.TRAINING)
        since = time.perf_counter()
        time.sleep(0.1)
        clock.waited_for_data(since)  # for the first batch
        clock.dispatched(Result(0.2))
        since = time.perf_counter()
        time.sleep(0.05)
        clock.waited_for_data(since)  # the device works all the time
        since = time.perf_counter()
        time.sleep(0.4)
        clock.waited_for_data(since)  # after 0.15 s it does not
        clock.record(1)
    assert read(tmp_path)[goodput.DATA] == pytest.approx(0.1 + 0.25, abs=0.04)


def test_a_restart_counts_what_was_lost_and_the_time_between(tmp_path):
    write(
        tmp_path,
        (1000.0, 0, [(0, {"starting": 5.0}), (10, {"starting": 5.0, "training": 10.0}),
                     (10, {"starting": 5.0, "training": 10.0, "saving": 1.0}),
                     (14, {"starting": 5.0, "training": 14.0, "saving": 1.0})]),
        (1030.0, 10, [(10, {"starting": 3.0}), (20, {"starting": 3.0, "training": 10.0})]),
    )  # fmt: skip
    assert read(tmp_path) == {"training": 20.0, "saving": 1.0, "starting": 8.0, "lost": 4.0, "stopped": 10.0}
    assert describe_goodput(read(tmp_path)).startswith("0:43: 46.5% training, 23.3% stopped, 18.6% starting, 9.3% lost")
    steps, hours = hours_by_step(read_processes(tmp_path))
    assert steps == [0, 10, 20]
    assert [3600 * hour for hour in hours] == pytest.approx([5.0, 19.0, 29.0])


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
        file.write('[1]\n{"started": 0.0, "resumed_after": 0, "step": 2, "seconds": {"training": "x"}}\n{"started": 0.')
    assert read(tmp_path) == {"training": 1.0}


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
    assert sum(seconds.values()) == pytest.approx(elapsed, rel=0.05)
    assert 0.2 < seconds[goodput.DATA] < 1.0  # Grain reads some while the step compiles
    assert seconds[goodput.COMPILING] > 0.1
    assert seconds[goodput.RESTORING] > 0
    assert f"time      {describe_goodput(seconds)}\n" in capsys.readouterr().out
