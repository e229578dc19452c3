"""Reports a run that hangs: what it waits for, the stacks of its threads, and which of several processes is behind.

A thread looks a few times per `log.stall_seconds` at what the training thread is doing, by its stack. So the loop only
has to store the number of each completed update.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax

from gpt2_jax.activity import DEVICE, Activity, activity_of
from gpt2_jax.config import LogConfig
from gpt2_jax.distributed.agreement import coordination_client
from gpt2_jax.distributed.session import RESTART, end_all

EXIT_CODE = 1  # launchers restart on it
POLL_SECONDS = 1.0  # at most, between two looks at the training thread
ANSWER_SECONDS = 10.0  # at most, for the other processes to report the same stall

_HOSTS, _STALLS = "gpt2_jax/stalls/host/", "gpt2_jax/stalls/at/"  # directories of the key-value store


class Watch:
    """Watches the thread that creates it.

    The time counts only while the watching thread runs too: a process that was stopped as a whole did not stall.

    Args:
        seconds: without progress, until a stall is reported. Progress is a completed update, or a change of what the
            thread is doing or of how much of it is done.
        ends_run: a stall also ends all processes, with exit code 1.
        peers: the other processes; None if there are none.
    """

    def __init__(self, seconds: float, ends_run: bool = False, peers: Peers | None = None) -> None:
        self.step = 0
        """The last completed update. The training loop sets it."""
        self._seconds, self._ends_run, self._peers = seconds, ends_run, peers
        self._poll = min(seconds / 4, POLL_SECONDS)
        self._watched, self._stop = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)

    def start(self) -> None:
        """Starts to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends watching."""
        self._stop.set()
        self._thread.join(timeout=1.0)  # not forever: it may wait for a process 0 that hangs

    def _look(self) -> tuple[int, Activity]:
        return self.step, activity_of(self._watched)

    def _run(self) -> None:
        seen, since, polls, reported = self._look(), time.monotonic(), 0, False
        while not self._stop.wait(self._poll):
            now = self._look()
            if now != seen:
                if reported:
                    moves = f"resumes after {time.monotonic() - since:.0f} s, {now[1].doing}{_after(now[0])}"
                    _print(f"{self._name()}{moves}")
                    if self._peers:
                        self._peers.withdraw()
                seen, since, polls, reported = now, time.monotonic(), 0, False
                continue
            polls += 1
            if not reported and polls * self._poll >= self._seconds:
                reported = True
                self._report(*now)

    def _name(self) -> str:
        return f"{self._peers.name()}: " if self._peers else ""

    def _report(self, step: int, activity: Activity) -> None:
        waited = f"no progress for {self._seconds:g} s{_after(step)}"
        _print(f"{self._name()}{waited}, {activity}; the stacks of all threads:")
        with suppress(OSError, ValueError, RuntimeError, AttributeError):  # stderr is closed, or no file
            faulthandler.dump_traceback(all_threads=True)
        answer_seconds = min(self._seconds, ANSWER_SECONDS)
        if self._peers and (line := self._peers.ask(step, activity.doing, answer_seconds, self._stop)):
            _print(line)
        if self._ends_run and not self._stop.is_set() and self._look() == (step, activity):
            restart = RESTART if self._peers else "the same command resumes from the last checkpoint"
            _print(f"{self._name()}ending the run with exit code {EXIT_CODE}; {restart}")
            end_all(EXIT_CODE)


class Peers:
    """What the processes of a run tell each other about a stall, through JAX's coordination service.

    Process 0 hosts the service. If it hangs, most calls of the others hang too, so these make them in threads.

    Args:
        client: of the service.
        process: the number of this process.
        count: the number of all processes.
    """

    def __init__(self, client: Any, process: int, count: int) -> None:
        self._client, self._process, self._count = client, process, count
        self._telling = threading.Thread()
        self._host = socket.gethostname()
        client.key_value_set(f"{_HOSTS}{process}", self._host, allow_overwrite=True)

    def name(self) -> str:
        """The number and the host of this process."""
        return f"process {self._process} on {self._host}"

    def ask(self, step: int, doing: str, seconds: float, stop: threading.Event) -> str:
        """Tells the others of a stall, and waits for them to do the same.

        Args:
            step: the last completed update of this process.
            doing: what it does, in words.
            seconds: to wait at most, or until `stop` is set.

        Returns:
            In process 0, a line about all processes. In others a line if process 0 does not answer, otherwise "".
        """
        key, value = f"{_STALLS}{self._process}", json.dumps([step, doing])
        self._telling = threading.Thread(target=self._tell, args=(key, value), daemon=True)
        self._telling.start()
        self._telling.join(seconds)
        if self._process:
            if self._telling.is_alive():
                return "process 0 does not answer: it was stopped, it hangs as a whole, or its host is unreachable"
            stop.wait(seconds + 1)  # process 0 speaks first
            return ""
        deadline = time.monotonic() + seconds
        with suppress(jax.errors.JaxRuntimeError):
            while len(stalls := self._read(_STALLS)) < self._count and time.monotonic() < deadline:
                if stop.wait(0.05):
                    break
            return compare({process: tuple(json.loads(at)) for process, at in stalls.items()}, self._read(_HOSTS))
        return ""

    def withdraw(self) -> None:
        """Tells the others that the stall of this process is over."""
        self._telling.join()
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_delete(f"{_STALLS}{self._process}")

    def _tell(self, key: str, value: str) -> None:
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(key, value, allow_overwrite=True)

    def _read(self, directory: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(directory)}


def compare(stalls: Mapping[int, tuple[Any, ...]], hosts: Mapping[int, str]) -> str:
    """A line about what each process does. Those that keep the others waiting come first.

    Args:
        stalls: the last completed update of each process that has stalled, and what it does.
        hosts: the host of each process.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for process in sorted(hosts):
        groups.setdefault(stalls.get(process, ()), []).append(process)

    def rank(stall: tuple[Any, ...]) -> tuple[bool, bool, int]:
        return bool(stall), bool(stall) and stall[1] == DEVICE, stall[0] if stall else 0

    parts = []
    for stall in sorted(groups, key=rank):
        processes = groups[stall]
        where = f" on {hosts[processes[0]]}" if len(processes) == 1 else ""
        state = f"{stall[1]}{_after(stall[0])}" if stall else "no report: stopped, hanging as a whole, or still moving"
        parts.append(f"process {_ranges(processes)}{where}: {state}")
    return "; ".join(parts)


def _ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: "0, 2-7"."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(parts)


def _after(step: int) -> str:
    return f" after update {step}" if step else " before the first update"


def _print(line: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed
            print(f"stall: {line}", file=sys.stderr, flush=True)


@contextmanager
def watched(log: LogConfig) -> Iterator[Watch]:
    """Watches the calling thread for the `with` block, if `log.stall_seconds` asks for it.

    All processes call it together, within `distributed_session`.

    Yields:
        The watch, which the caller tells of each update.
    """
    if not log.stall_seconds:
        yield Watch(0)
        return
    several = jax.process_count() > 1
    peers = Peers(coordination_client(), jax.process_index(), jax.process_count()) if several else None
    watch = Watch(log.stall_seconds, log.stall_exit, peers)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
