"""Sends the rows of a run to trackers, from a thread that reads the run's files. Nothing of it can stop the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import one_line
from gpt2_jax.metrics import Row, parse_row
from gpt2_jax.reports.trackers import TRACKERS, Tracker, Values

POLL_SECONDS = 2.0
CLOSE_SECONDS = 60.0  # at most, for a tracker to store the end of a run


class _Lines:
    """The complete lines that were appended to a file since the last look, as rows."""

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
        names: of the trackers, from `TRACKERS`.
        config: of the run.
        warn: prints a line about a tracker that fails. It gets no further rows.
    """

    def __init__(self, run: Path, names: Sequence[str], config: TrainConfig, warn: Callable[[str], object]) -> None:
        self._run, self._names, self._config, self._warn = run, names, config, warn
        self._rows, self._samples = _Lines(run / "metrics.jsonl"), _Lines(run / "samples.jsonl")
        self._open: dict[str, Tracker] = {}
        self._step, self._values = 0, dict[str, float | str]()  # the update that may get more rows
        self._texts: dict[int, list[tuple[str, str]]] = {}

    def start(self) -> None:
        """Opens the trackers."""
        for name in self._names:
            with self._guarded(name):
                self._open[name] = TRACKERS[name][0](self._run, self._config)

    def send(self, end: bool = False) -> None:
        """Sends what was appended since the last call; at the end also the last update."""
        for row in self._rows.read():
            if row["step"] != self._step:
                self._send_update()
                self._step, self._values = row["step"], {}
            self._values |= _values(row)
        if end:
            self._send_update()

    def _send_update(self) -> None:
        if not self._values:
            return
        for row in self._samples.read():
            self._texts.setdefault(row["step"], []).append((str(row.get("prompt", "")), str(row.get("text", ""))))
        texts = self._texts.pop(self._step, [])
        for name, tracker in list(self._open.items()):
            if self._step > tracker.after:
                with self._guarded(name):
                    tracker.log(self._step, self._values, texts)

    def close(self) -> None:
        """Closes the trackers."""
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.close()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self._warn(f"log.to: {name} failed, and gets no further rows ({one_line(error)})")


def _values(row: Row) -> Values:
    """What trackers get of a row: its numbers and its fingerprint."""
    values = {key: value for key, value in row.items() if key != "step" and type(value) in (int, float)}
    return values | {key: row[key] for key in ("fingerprint", "skipped") if isinstance(row.get(key), str)}


@contextmanager
def following(run: Path, names: Sequence[str], config: TrainConfig, warn: Callable[[str], object]) -> Iterator[None]:
    """Follows a run in a thread for the `with` block. At its end, trackers have a minute to store what is left."""
    if not names:
        yield
        return
    follower, ended = Follower(run, names, config, warn), threading.Event()

    def work() -> None:
        try:
            follower.start()
            while not ended.wait(POLL_SECONDS):
                follower.send()
            follower.send(end=True)
            follower.close()
        except Exception as error:  # the rows cannot be read
            warn(f"log.to: {one_line(error)}; trackers get no further rows")

    thread = threading.Thread(target=work, name="trackers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            warn(f"log.to: {', '.join(names)} did not store the last rows within {CLOSE_SECONDS:.0f} s")


def replay(run: Path, names: Sequence[str], config: TrainConfig, warn: Callable[[str], object]) -> None:
    """Sends all rows of a run that is over."""
    follower = Follower(run, names, config, warn)
    follower.start()
    follower.send(end=True)
    follower.close()
