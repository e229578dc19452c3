"""The time of the same updates in two trainings, which run in turns. SIGSTOP and SIGCONT switch between them.

So both see the same machine. Each turn ends when an update has ended. Two processes of the same program differ by a
few percent, so each round starts both anew, and the interval is that of the mean over rounds.
"""

from __future__ import annotations

import math
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fault_runs import wait_for
from record import Figures, mean_and_interval

TURN_SECONDS = 0.5  # at least
POLL_SECONDS = 0.004
WARMUP = 5  # updates


class _Training:
    """A training that stands still except in its turns.

    Args:
        start: starts it, with a row for each update in a run directory.
        out: the run directory.
    """

    def __init__(self, start: Callable[[Path], subprocess.Popen[str]], out: Path) -> None:
        self._process = start(out)
        wait_for(self._process, out, WARMUP, 0.0)
        self._rows, self._offset = out / "metrics.jsonl", 0
        self.updates, self.seconds = 0, 0.0
        self._run_to_next_row()  # so that the first turn starts where an update has ended
        self.updates, self.seconds = 0, 0.0

    def _new_rows(self) -> int:
        with self._rows.open("rb") as file:
            file.seek(self._offset)
            lines, _, _ = file.read().rpartition(b"\n")  # without a row that is being written
        self._offset += len(lines) + bool(lines)
        return lines.count(b'"tokens_per_second"')

    def _run_to_next_row(self, least: float = 0.0) -> None:
        self._process.send_signal(signal.SIGCONT)
        start, new = time.perf_counter(), 0
        while not new or time.perf_counter() - start < least:
            time.sleep(POLL_SECONDS)
            if self._process.poll() is not None:
                raise SystemExit(f"a training ended with exit code {self._process.returncode}")
            new = self._new_rows()
            self.updates += new
        self._process.send_signal(signal.SIGSTOP)
        self.seconds += time.perf_counter() - start

    def turn(self) -> None:
        """Runs it for some updates."""
        self._run_to_next_row(TURN_SECONDS)

    def kill(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def speeds_in_turns(start: Mapping[str, Callable[[Path], subprocess.Popen[str]]], updates: int, rounds: int) -> Figures:
    """The speed of "now" over that of "before", as the mean over rounds with its 95% interval (Student's t, of logs).

    Args:
        start: "before" and "now": each starts an endless training with a row for each update in a run directory.
        updates: of each training in a round, at least.
        rounds: each starts both.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in start}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            names = tuple(start) if number % 2 else tuple(start)[::-1]
            trainings = {name: _Training(start[name], Path(directory) / name) for name in names}
            while any(training.updates < updates for training in trainings.values()):
                for training in trainings.values():
                    training.turn()
            for name, training in trainings.items():
                training.kill()
                milliseconds[name].append(1000 * training.seconds / training.updates)
        print({name: round(times[-1], 3) for name, times in milliseconds.items()}, flush=True)
    logs = [math.log(before / now) for before, now in zip(milliseconds["before"], milliseconds["now"], strict=True)]
    mean, interval = mean_and_interval(logs)
    return {
        "milliseconds_per_update": milliseconds,
        "updates_per_round": updates,
        "now_over_before": math.exp(mean),
        "interval_95": [*map(math.exp, interval)],
    }


def describe(case: Figures) -> str:
    """The details of a row about such a measurement."""
    low, high = case["interval_95"]
    medians = ", ".join(f"{key} {statistics.median(ms):,.2f}" for key, ms in case["milliseconds_per_update"].items())
    rounds = len(case["milliseconds_per_update"]["now"])
    return (
        f"mean of {rounds} pairs of processes, 95% interval {low:.4f} to {high:.4f}; "
        f"median milliseconds per update: {medians}"
    )
