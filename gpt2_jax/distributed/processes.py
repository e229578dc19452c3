"""Several processes of one run (`cluster.py` says whether): they come together, agree, stop and end together.

What one process finds wrong ends all of them with the same exit code, and is said once. That needs the key-value store
of `jax.distributed`, which JAX does not export; Orbax reads it from the same place.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from gpt2_jax.distributed.cluster import Cluster, ClusterFlags
from gpt2_jax.errors import UserError

OUTCOME = "gpt2_jax/outcome"  # The key that ends all processes: an exit code, or DONE.
DONE = "done"
FOREVER = 1 << 40  # Milliseconds: 35 years. A process that waits for one that died is ended by other means.
FAREWELL_SECONDS = 5.0  # For the others to read the outcome before this process, and its store, goes.
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|socket closed|heartbeat", re.IGNORECASE)
RESTART = "start all processes again with the same command: the run goes on from its last checkpoint"


# --- coming together, and ending together ---------------------------------------------------------------


@contextmanager
def distributed_session(
    cluster: Cluster | None, flags: ClusterFlags, exit_codes: Mapping[type[Exception], int]
) -> Iterator[None]:
    """Within, this process is one of those of `cluster`, and what ends one ends all.

    Where an exception leaves the body in any process, every process exits with the same code, and only one says why.
    Otherwise the processes leave when all of them have come to the end. Processes that do not come together exit with
    code 2. Does nothing where `cluster` is None.

    Args:
        exit_codes: errors that are one line for the user, and their exit codes. Others leave a traceback, and code 1.
    """
    if cluster is None:
        yield
        return
    _initialize(cluster, flags)
    last_words = _start_death_watch()
    leaving = threading.Lock()
    watcher = threading.Thread(target=_watch, args=(leaving, last_words), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        leaving.acquire()  # never given back; if the watcher has it, this process is at its end
        _end(_announce(error, exit_codes), last_words)
    barrier("done")
    if distributed.global_state.process_id == 0:
        _client().key_value_set(OUTCOME, DONE)
    watcher.join()
    _stand_down(last_words)
    jax.distributed.shutdown()


def _initialize(cluster: Cluster, flags: ClusterFlags) -> None:
    """`jax.distributed.initialize` and the first look at the devices; ends this process if they fail or take long."""
    _check_port(cluster)
    problem = (
        f"{cluster.processes} processes did not connect to {cluster.coordinator} in {flags.coordinator_timeout} s; "
        "start the same command on every host, and see that all reach that address (or give --coordinator HOST:PORT)"
    )

    def give_up(reason: str = "") -> None:
        print(f"error: {problem}{reason}", file=sys.stderr, flush=True)
        os._exit(2)  # the interpreter's own end would run into what is half started

    # JAX aborts where connecting takes too long, and waits for ever for the other hosts of a TPU slice: so the time
    # that it gets is longer, and a thread keeps ours (JAX does not hold the GIL in either).
    timer = threading.Timer(flags.coordinator_timeout, give_up)
    timer.daemon = True
    timer.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **cluster.arguments,
            initialization_timeout=flags.coordinator_timeout + 60,
            heartbeat_timeout_seconds=flags.heartbeat_timeout,
        )
        jax.devices()
    except (RuntimeError, ValueError, OSError) as error:
        give_up(f": {' '.join(str(error).split())[:200]}")
    timer.cancel()


def _check_port(cluster: Cluster) -> None:
    """Raises UserError where process 0 cannot listen at the coordinator's port: JAX 0.10 dies of a signal there."""
    if cluster.arguments.get("process_id") != 0 or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    port = int(cluster.coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"process 0 cannot listen at port {port}: {reason}; give another --coordinator HOST:PORT"
        ) from None


def _client() -> Any:
    return distributed.global_state.client


def _watch(leaving: threading.Lock, last_words: subprocess.Popen[bytes]) -> None:
    """Waits for the outcome, and ends this process, wherever it is, if that is an exit code."""
    try:
        outcome = _client().blocking_key_value_get(OUTCOME, FOREVER)
    except jax.errors.JaxRuntimeError:  # process 0 is gone; JAX ends this one
        return
    if outcome != DONE and leaving.acquire(blocking=False):
        _end(int(outcome), last_words)


def _announce(error: BaseException, exit_codes: Mapping[type[Exception], int]) -> int:
    """Makes this process's exit code the outcome and says why; or returns that of another, which has said so."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        code = next((code for kind, code in exit_codes.items() if isinstance(error, kind)), 1)
    if distributed.global_state.process_id:
        time.sleep(1)  # what all have found, process 0 says
    try:
        _client().key_value_set(OUTCOME, str(code))
    except jax.errors.JaxRuntimeError:
        with suppress(jax.errors.JaxRuntimeError):
            return int(_client().blocking_key_value_get(OUTCOME, 1000))
    who = f"process {distributed.global_state.process_id} on {socket.gethostname()}: "
    who = who if distributed.global_state.process_id else ""
    if isinstance(error, tuple(exit_codes)):
        print(f"error: {who}{' '.join(str(error).split())}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
        print(
            f"error: {who}another process was lost ({' '.join(str(error).split())[:200]}); {RESTART}", file=sys.stderr
        )
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    return code


def _end(code: int, last_words: subprocess.Popen[bytes]) -> None:
    """Ends this process when the others know the outcome, or will never.

    At once, without the interpreter's own end: that would wait for the others, and for threads that do.
    """
    _stand_down(last_words)
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier("gpt2_jax/end", int(1000 * FAREWELL_SECONDS))
    if distributed.global_state.process_id == 0:
        time.sleep(1)  # JAX aborts processes that are there when the store, which is here, goes
    os._exit(code)


def _start_death_watch() -> subprocess.Popen[bytes]:
    """A child that says what happened if this process ends without a farewell.

    That is when it is killed, and when JAX aborts it because another one is gone: of that no handler is told in time.
    """
    state = distributed.global_state
    line = (
        f"error: process {state.process_id} of {state.num_processes} ended without a word: killed, or by JAX because "
        f"another process is gone (which it says above); {RESTART}"
    )
    script = "trap '' HUP INT TERM; read -r farewell || echo \"$0\" >&2"
    return subprocess.Popen(["/bin/sh", "-c", script, line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def _stand_down(last_words: subprocess.Popen[bytes]) -> None:
    with suppress(BrokenPipeError):  # it was killed itself
        last_words.communicate(b"farewell\n")


# --- agreeing -------------------------------------------------------------------------------------------

_calls = itertools.count()  # Keys and barriers have names of their own; all processes come to them in one order.


def is_primary() -> bool:
    """Whether this is process 0, which alone writes and speaks."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"gpt2_jax/{next(_calls)}/{name}", FOREVER)


def broadcast_from_primary(name: str, value: str) -> str:
    """The value of process 0, in all of them."""
    if jax.process_count() == 1:
        return value
    key = f"gpt2_jax/{next(_calls)}/{name}"
    if is_primary():
        _client().key_value_set(key, value)
        return value
    return _client().blocking_key_value_get(key, FOREVER)


def assert_equal(what: str, value: str) -> None:
    """Makes sure that a value, of one line or many, is the same in all processes.

    Raises:
        UserError: this process has another one than process 0.
    """
    theirs = broadcast_from_primary(what, value)
    if theirs != value:
        pairs = itertools.zip_longest(theirs.splitlines(), value.splitlines(), fillvalue="nothing")
        there, here = next(pair for pair in pairs if pair[0] != pair[1])
        raise UserError(
            f"the {what} is not that of process 0 ({here} here, {there} there); start the same command with the same "
            "files on every host"
        )


def check_shared(directory: Path) -> None:
    """Makes sure that all processes see what process 0 writes into a directory.

    Raises:
        UserError: this one does not.
    """
    if jax.process_count() == 1:
        return
    seen = directory / f".seen-{broadcast_from_primary('token', secrets.token_hex(8))}"
    if is_primary():
        seen.touch()
    barrier("written")
    patience = time.monotonic() + 10  # network file systems may be late
    while not (found := seen.exists()) and time.monotonic() < patience:
        time.sleep(0.1)
    barrier("seen")
    if is_primary():
        seen.unlink()
    if not found:
        raise UserError(
            f"{directory.absolute()} on this host is not the directory in which process 0 writes; give an --out on a "
            "file system that all hosts share"
        )


# --- stopping -------------------------------------------------------------------------------------------


@contextmanager
def stop_signals() -> Iterator[Callable[[int], int]]:
    """Within, SIGTERM and the first Ctrl-C only ask the loop to stop, at an update that is the same in all processes.

    Yields:
        To call after each update with its number: 0, or the number of the signal to stop for.
    """
    several = jax.process_count() > 1
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others
        print(f"\n{signal.Signals(number).name}: stopping after this update, with a checkpoint", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C means it

    def asked(step: int) -> int:
        if several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return received[0] if received else 0

    # With several processes, SIGTERM is JAX's since `jax.distributed.initialize`.
    numbers = [signal.SIGINT] if several else [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
