"""Sends the rows of a run to trackers, from threads that read the run's files. Nothing of it can stop the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import one_line
from gpt2_jax.metrics import Row, parse_row
from gpt2_jax.reports.trackers import TRACKERS, Tracker, Values

POLL_SECONDS = 2.0
# At most, for a tracker to store the last rows: of a run that is over, and of one that stops and will be resumed.
OVER_SECONDS, STOP_SECONDS = 60.0, 5.0


class _NewRows:
    """The rows that were appended to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> Iterator[Row]:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            while (line := file.readline()).endswith(b"\n"):
                self._offset += len(line)
                yield parse_row(line)


class Follower:
    """Reads the rows of a run and sends each update once it is complete: when a later one has a row, or at the end.

    Args:
        run: the run directory.
        name: of the tracker, from `TRACKERS`. It is opened at the first row.
        config: of the run.
    """

    def __init__(self, run: Path, name: str, config: TrainConfig) -> None:
        self._run, self._name, self._config = run, name, config
        self._rows, self._samples = _NewRows(run / "metrics.jsonl"), _NewRows(run / "samples.jsonl")
        self._tracker: Tracker | None = None
        self._step, self._values = 0, dict[str, float | str]()  # the update that may get more rows
        self._texts: dict[int, list[tuple[str, str]]] = {}

    def send(self, end: bool = False) -> None:
        """Sends what was appended since the last call; at the end also the last update, and closes the tracker."""
        for row in self._rows.read():
            if row["step"] != self._step:
                self._send_update()
                self._step, self._values = row["step"], {}
            self._values |= _values(row)
        if end:
            self._send_update()
            self.close()

    def _send_update(self) -> None:
        if not self._values:
            return
        if self._tracker is None:
            self._tracker = TRACKERS[self._name](self._run, self._config)
        for row in self._samples.read():
            self._texts.setdefault(row["step"], []).append((str(row.get("prompt", "")), str(row.get("text", ""))))
        texts = self._texts.pop(self._step, [])
        if self._step > self._tracker.after:
            self._tracker.log(self._step, self._values, texts)

    def close(self) -> None:
        """Waits until the tracker has stored everything."""
        if self._tracker:
            self._tracker.close()


def _values(row: Row) -> Values:
    """What trackers get of a row: its numbers, those of layers by name, and its fingerprint."""
    values = {key: value for key, value in row.items() if key != "step" and type(value) in (int, float)}
    for name, layers in row.get("layers", {}).items():
        values |= {f"{name}/{layer}": value for layer, value in layers.items() if value is not None}
    return values | {key: row[key] for key in ("fingerprint", "skipped") if isinstance(row.get(key), str)}


class Following:
    """A run that is followed."""

    is_over = False
    """The run has done its last update. The training loop sets it."""


@contextmanager
def following(
    run: Path, names: Sequence[str], config: TrainConfig, warn: Callable[[str], object]
) -> Iterator[Following]:
    """Follows a run for the `with` block, in a thread for each tracker. Each then has some time for the last rows.

    Args:
        run: the run directory.
        names: of the trackers.
        config: of the run.
        warn: prints a line about a tracker that fails. It gets no further rows.

    Yields:
        What the training loop tells that the run is over.
    """
    state, ended = Following(), threading.Event()

    def follow(name: str) -> None:
        if problem := _follow(run, name, config, ended):
            warn(problem)

    threads = {name: threading.Thread(target=follow, args=(name,), name=name, daemon=True) for name in names}
    for thread in threads.values():
        thread.start()
    try:
        yield state
    finally:
        ended.set()
        seconds = OVER_SECONDS if state.is_over else STOP_SECONDS
        deadline = time.monotonic() + seconds
        for name, thread in threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                warn(f"log.to: {name} did not store the last rows within {seconds:g} s")


def send_all(run: Path, name: str, config: TrainConfig) -> str:
    """Sends all rows of a run that is over to a tracker. Returns "", or what is wrong."""
    ended = threading.Event()
    ended.set()
    return _follow(run, name, config, ended)


def _follow(run: Path, name: str, config: TrainConfig, ended: threading.Event) -> str:
    """Sends rows to a tracker until `ended` is set, and then the rest. Returns "", or what is wrong."""
    follower = Follower(run, name, config)
    try:
        while not ended.wait(POLL_SECONDS):
            follower.send()
        follower.send(end=True)
    except Exception as error:  # a tracker's library may raise anything; the run continues without it
        return f"log.to: {name} failed, and gets no further rows ({one_line(error)})"
    return ""
