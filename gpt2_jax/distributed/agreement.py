"""Agreement between the processes of a run: on a value, on a shared directory, and on the update to stop after.

All processes call these functions in the same order.
"""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from gpt2_jax.errors import UserError

FOREVER = 1 << 40  # Milliseconds: 35 years. JAX's heartbeat ends a process that waits for a dead one.

_calls = itertools.count()  # Numbers the calls, so that each has its own key or barrier.


def coordination_client() -> Any:
    """The client of JAX's coordination service: a key-value store and barriers, hosted by process 0.

    JAX does not export it. Orbax reads it from the same place.
    """
    return distributed.global_state.client


def is_primary() -> bool:
    """True in process 0, the only process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have called it."""
    if jax.process_count() > 1:
        coordination_client().wait_at_barrier(f"gpt2_jax/{next(_calls)}/{name}", FOREVER)


def broadcast_from_primary(name: str, value: str) -> str:
    """Returns the value of process 0 in all processes."""
    if jax.process_count() == 1:
        return value
    key = f"gpt2_jax/{next(_calls)}/{name}"
    if is_primary():
        coordination_client().key_value_set(key, value)
        return value
    return coordination_client().blocking_key_value_get(key, FOREVER)


def assert_equal(
    name: str, value: str, advice: str = "start the same command with the same files on every host"
) -> None:
    """Checks that a text of one or more lines is the same in all processes.

    Args:
        name: what the text is, for the error.
        value: the text.
        advice: what to do if it differs, for the error.

    Raises:
        UserError: it differs from that of process 0.
    """
    expected = broadcast_from_primary(name, value)
    if expected != value:
        pairs = itertools.zip_longest(expected.splitlines(), value.splitlines(), fillvalue="nothing")
        theirs, ours = next(pair for pair in pairs if pair[0] != pair[1])
        raise UserError(f"the {name} differs from process 0: {ours} here, {theirs} on process 0; {advice}")


def least(name: str, value: int | None) -> int | None:
    """The least value of all processes; None if one of them has none."""
    if jax.process_count() == 1:
        return value
    client, directory = coordination_client(), f"gpt2_jax/{next(_calls)}/{name}/"
    client.key_value_set(f"{directory}{jax.process_index()}", "" if value is None else str(value))
    barrier(name)
    values = [text for _, text in client.key_value_dir_get(directory)]
    return min(map(int, values)) if all(values) else None


def first_problem(problem: str) -> str:
    """Returns the problem of the first process that has one, in all processes; "" if none has one."""
    if jax.process_count() == 1:
        return problem
    client, directory = coordination_client(), f"gpt2_jax/{next(_calls)}/problems/"
    if problem:
        client.key_value_set(f"{directory}{jax.process_index():06}", problem)
    barrier("problems")
    problems = sorted(client.key_value_dir_get(directory))
    return problems[0][1] if problems else ""


def check_shared(directory: Path) -> None:
    """Checks that all processes see the files that process 0 writes into a directory.

    Raises:
        UserError: a process does not see them, or process 0 cannot write them; in all processes, so that process 0
            can remove what it has written.
    """
    if jax.process_count() == 1:
        return
    seen = directory / f".seen-{broadcast_from_primary('token', secrets.token_hex(8))}"
    problem = ""
    if is_primary():
        try:
            seen.touch()
        except OSError as error:
            problem = f"{directory} cannot be written: {error.strerror}"
    barrier("written")
    deadline = time.monotonic() + 10  # network file systems can lag
    while not (found := seen.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not found:
        where = f"{directory.absolute()} in process {jax.process_index()} on {socket.gethostname()}"
        problem = problem or f"{where} is not the directory that process 0 writes"
    problem = first_problem(problem)
    if is_primary():
        seen.unlink(missing_ok=True)
    if problem:
        raise UserError(f"{problem}; give an --out on a file system that all hosts share")


@contextmanager
def stop_signals() -> Iterator[Callable[[int], int]]:
    """Turns SIGTERM, the first Ctrl-C and the end of the terminal into a request to stop.

    All processes stop after the same update.

    Yields:
        A function to call after each update with its number. It returns the signal to stop for, or 0.
    """
    several = jax.process_count() > 1
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it, and tells the other processes
        with suppress(OSError):  # not print: the signal may have come in the middle of one, and stderr may be closed
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this update, with a checkpoint\n".encode())
        signal.signal(signal.SIGINT, previous[signal.SIGINT])  # the second Ctrl-C interrupts at once

    def stop_requested(step: int) -> int:
        if several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return received[0] if received else 0

    # With several processes, `jax.distributed.initialize` has installed JAX's own handler of SIGTERM.
    numbers = [signal.SIGINT] if several else [signal.SIGTERM, signal.SIGINT]
    if sys.platform == "win32":
        hangup = signal.SIGBREAK
    else:
        hangup = signal.SIGHUP
    if signal.getsignal(hangup) is signal.SIG_DFL:  # nohup ignores it
        numbers.append(hangup)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop_requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
