"""Where the time of a run went: seconds by phase, across restarts, in time.jsonl.

The rows of metrics.jsonl are the same in each run of a config, so times have a file of their own. Process 0 appends a
row after evaluations and saves, and every few seconds between them. Nothing deletes rows: those of a process that was
killed tell what was lost with it.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jax
from jax import monitoring

from gpt2_jax.display import duration
from gpt2_jax.parsing import is_count, parse_json

FILE = "time.jsonl"
SECONDS_BETWEEN_ROWS = 10.0
MAX_SECONDS = 1e11  # of a row that is not damaged: 3,000 years

STARTING, COMPILING, RESTORING = "starting", "compiling", "restoring"
TRAINING, DATA, EVALUATING, SAVING = "training", "waiting for data", "evaluating", "saving"
LOST, STOPPED = "lost", "stopped"
PHASES = (TRAINING, DATA, EVALUATING, SAVING, COMPILING, RESTORING, STARTING, LOST, STOPPED)

_COMPILE_EVENTS = "/jax/core/compile/"  # tracing, lowering and compiling; they nest


class Clock:
    """Counts the seconds of one process by phase. Every moment since `started` belongs to one phase.

    A thread waits for the device, and records when it becomes idle. The training thread never waits.

    Args:
        started: when the run, or its resumption, began: a `time.time()`.
        path: the file of the rows; None for a process that writes none.
    """

    def __init__(self, started: float, path: Path | None) -> None:
        self._started, self._path = started, path
        self._resumed_after: int | None = None  # until it is known, there are no rows
        self._step = 0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._origin = STARTING, time.perf_counter() - max(0.0, time.time() - started)
        self._since = self._origin
        self._row_due = self._since + SECONDS_BETWEEN_ROWS
        self._compiled: list[tuple[float, float]] = []  # intervals that are counted, none within another
        self._thread = threading.get_ident()
        self._device = _Device() if path else None

    def __enter__(self) -> Clock:
        monitoring.register_event_duration_secs_listener(self._compile_event)
        if self._device:
            self._device.start()
        return self

    def __exit__(self, *exception: object) -> None:
        monitoring.unregister_event_duration_listener(self._compile_event)
        if self._device:
            self._device.stop()
        self.record(self._step)

    def resume(self, step: int) -> None:
        """Takes note of the update that the process resumes after, 0 for a new run. From here on there are rows."""
        self._resumed_after = step
        self.record(step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the `with` block as a phase of `PHASES`, but for what compiles in it."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> str:
        """Begins a phase, and returns the one that ends."""
        now, before = time.perf_counter(), self._phase
        self._seconds[before] += now - self._since
        self._phase, self._since = name, now
        return before

    def dispatched(self, result: jax.Array) -> None:
        """Takes note of work that was given to the device.

        Args:
            result: an array that is ready when the work is done.
        """
        if self._device:
            self._device.dispatched(result)

    def waited_for_data(self, since: float) -> None:
        """Counts a wait for a batch that ends now, as far as the device had nothing to do.

        Args:
            since: when it began, a `time.perf_counter()`.
        """
        idle = self._device.idle_since() if self._device else None
        if idle is not None:
            self._move(time.perf_counter() - max(since, idle), DATA)

    def _compile_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if not event.startswith(_COMPILE_EVENTS) or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        start = max(end - duration_secs, self._origin)
        counted = 0.0
        while self._compiled and self._compiled[-1][1] > start:
            inner = self._compiled.pop()
            start, counted = min(start, inner[0]), counted + inner[1] - inner[0]
        self._compiled.append((start, end))
        self._move(end - start - counted, COMPILING)

    def _move(self, seconds: float, phase: str) -> None:
        """Moves seconds from the current phase to another."""
        self._seconds[phase] += seconds
        self._seconds[self._phase] -= seconds

    def record(self, step: int, now: bool = True) -> None:
        """Appends a row. A file that cannot be written does not stop the run.

        Args:
            step: the updates that are done.
            now: even if the row before is recent.
        """
        self._step = step
        if not self._path or self._resumed_after is None or (not now and time.perf_counter() < self._row_due):
            return
        self.enter(self._phase)
        self._row_due = self._since + SECONDS_BETWEEN_ROWS
        seconds = {phase: round(self._seconds[phase], 3) for phase in PHASES if self._seconds[phase]}
        row = {"started": self._started, "resumed_after": self._resumed_after, "step": step, "seconds": seconds}
        with suppress(OSError):
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            with open(file, "r+b", buffering=0) as lines:
                if lines.seek(0, os.SEEK_END):
                    lines.seek(-1, os.SEEK_END)
                    torn = lines.read(1) != b"\n"  # a process was killed while it wrote, or the disk was full
                else:
                    torn = False
                lines.write(("\n" * torn + json.dumps(row) + "\n").encode())


class _Device:
    """Records when the device becomes idle."""

    def __init__(self) -> None:
        self._results = queue.SimpleQueue[jax.Array | None]()
        self._given, self._done = 0, (0, 0.0)  # a number, and when the work of that number was done
        # A daemon: on a device that hangs it waits forever.
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._results.put(None)
        self._thread.join(timeout=1.0)

    def dispatched(self, result: jax.Array) -> None:
        self._given += 1
        self._results.put(result)

    def idle_since(self) -> float | None:
        """When the last work was done, 0 if there was none; None while the device works."""
        number, since = self._done
        return since if number == self._given else None

    def _run(self) -> None:
        for number, result in enumerate(iter(self._results.get, None), 1):
            with suppress(Exception):  # the training thread meets it too
                jax.block_until_ready(result)
            self._done = number, time.perf_counter()


class Process(NamedTuple):
    """What time.jsonl knows of one process of a run."""

    started: float
    """When it began, a `time.time()`."""
    resumed_after: int
    """The update that it resumed after, 0 for a new run."""
    rows: list[tuple[int, Mapping[str, float]]]
    """Updates that were done, and the seconds by phase until then."""


def read_processes(run: Path) -> list[Process]:
    """The processes of a run, in order; [] for a run without time.jsonl. Lines that are not rows are left out."""
    processes: dict[tuple[float, int], Process] = {}
    with suppress(OSError), open(run / FILE, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError):  # a torn line
                row = parse_json(line)
                started = float(row["started"])
                seconds = {phase: float(row["seconds"].get(phase, 0.0)) for phase in PHASES}
                known = all(0 <= number < MAX_SECONDS for number in (started, *seconds.values()))
                if known and is_count(row["step"]) and is_count(row["resumed_after"]):
                    key = started, row["resumed_after"]
                    processes.setdefault(key, Process(*key, [])).rows.append((row["step"], seconds))
    return list(processes.values())


def goodput(processes: Sequence[Process]) -> dict[str, float]:
    """Seconds by phase over all processes of a run.

    What a process did after the checkpoint that a later one resumed from is `LOST`. `STOPPED` is the time from the last
    row of a process to the start of the next one. The sum is the time from the first start to the last row.
    """
    total = dict.fromkeys(PHASES, 0.0)
    following: float | None = None  # when the next process started
    redone = math.inf  # the update after which work was done again
    for process in reversed(processes):
        last = process.rows[-1][1]
        kept = next((seconds for step, seconds in reversed(process.rows) if step <= redone), {})
        for phase, seconds in kept.items():
            total[phase] += seconds
        total[LOST] += sum(last.values()) - sum(kept.values())
        if following is not None:
            total[STOPPED] += max(0.0, following - process.started - sum(last.values()))
        following, redone = process.started, min(redone, float(process.resumed_after))
    return {phase: total[phase] for phase in PHASES if total[phase] > 0}


def hours_by_step(processes: Sequence[Process]) -> tuple[list[int], list[float]]:
    """Updates, ascending, and the hours until then, without those that were lost or between two processes."""
    steps: list[int] = []
    hours: list[float] = []
    before = 0.0  # hours of earlier processes
    for number, process in enumerate(processes):
        redone = min((later.resumed_after for later in processes[number + 1 :]), default=math.inf)
        kept = [(step, before + sum(seconds.values()) / 3600) for step, seconds in process.rows if step <= redone]
        for step, at in kept:
            if not steps or step > steps[-1]:
                steps.append(step)
                hours.append(at)
        before = kept[-1][1] if kept else before
    return steps, hours


def describe_goodput(seconds: Mapping[str, float]) -> str:
    """A line: the whole time, and the share of each phase, the largest first, but for those below half a percent."""
    total = sum(seconds.values())
    shares = sorted(seconds.items(), key=lambda item: -item[1])
    return f"{duration(total)}: " + ", ".join(f"{n / total:.0%} {phase}" for phase, n in shares if n >= 0.005 * total)
