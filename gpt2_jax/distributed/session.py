"""The lifetime of a run with several processes: they connect at the start and end together.

An error in any process ends all processes with the same exit code, and is printed once. The exit code travels through
the key-value store of JAX's coordination service.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NoReturn

import jax
from jax._src import distributed

from gpt2_jax.distributed.agreement import FOREVER, barrier, coordination_client
from gpt2_jax.distributed.cluster import Cluster, ClusterFlags
from gpt2_jax.errors import UserError, fixable, one_line, strip_controls

EXIT_KEY = "gpt2_jax/exit"  # The key that ends all processes. Its value is an exit code, or DONE.
DONE = "done"
EXIT_BARRIER_SECONDS = 5.0  # For the other processes to read the exit code before the store ends with process 0.
CONNECTION_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|socket closed|heartbeat", re.IGNORECASE)
RESTART = "start all processes again with the same command to resume from the last checkpoint"


@contextmanager
def distributed_session(
    cluster: Cluster | None, flags: ClusterFlags, exit_codes: Mapping[type[Exception], int]
) -> Iterator[None]:
    """Connects this process to the others of `cluster` for the `with` block. Does nothing if `cluster` is None.

    An exception that leaves the block in any process ends all processes with the same exit code, and one of them
    prints it. Otherwise all processes leave the block together. Processes that cannot connect exit with code 2.

    Args:
        exit_codes: the exit codes of errors that print one line. Any other error prints a traceback and exits with 1.

    Raises:
        UserError: there is a cluster, on Windows.
    """
    if cluster is None:
        yield
        return
    if sys.platform == "win32":
        raise UserError("several processes of one run need Linux or macOS; start the command without a cluster")
    _initialize(cluster, flags)
    reporter = _start_crash_reporter()
    exiting = threading.Lock()  # Acquired once, by the thread that ends this process.
    watcher = threading.Thread(target=_watch_for_exit, args=(exiting, reporter), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        exiting.acquire()  # blocks forever if the watcher is already ending this process
        _exit(_publish_exit_code(error, exit_codes), reporter)
    barrier("done")
    if _process_id() == 0:
        coordination_client().key_value_set(EXIT_KEY, DONE)
    watcher.join()
    _stop_crash_reporter(reporter)
    jax.distributed.shutdown()


def _process_id() -> int:
    """The process id that this process connected with. Process 0 hosts the key-value store."""
    return distributed.global_state.process_id


# --- connecting -----------------------------------------------------------------------------------------


def _initialize(cluster: Cluster, flags: ClusterFlags) -> None:
    """`jax.distributed.initialize`, then the devices of all processes. Exits with code 2 on failure or timeout."""
    _check_port(cluster)
    problem = (
        f"{cluster.processes} processes did not connect to {cluster.coordinator} in {flags.coordinator_timeout} s; "
        "start the same command on every host, and check that every host reaches that address (or give --coordinator "
        "HOST:PORT)"
    )

    def give_up(reason: str = "") -> None:
        print(f"error: {problem}{reason}", file=sys.stderr, flush=True)
        os._exit(2)  # a normal exit would hang in JAX's half-started threads

    # JAX aborts after its own timeout, and waits forever for the other hosts of a TPU slice. So JAX gets a longer
    # timeout, and a thread enforces ours: JAX releases the GIL while it waits.
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
        give_up(f": {one_line(error)}")
    timer.cancel()


def _check_port(cluster: Cluster) -> None:
    """Checks that process 0 can listen on the coordinator's port. JAX 0.10 would die of a signal instead.

    Raises:
        UserError: it cannot.
    """
    if cluster.arguments.get("process_id") != 0 or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    port = int(cluster.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"process 0 cannot listen on port {port}: {reason}; give another --coordinator HOST:PORT"
        ) from None


# --- ending ---------------------------------------------------------------------------------------------


def _watch_for_exit(exiting: threading.Lock, reporter: subprocess.Popen[bytes]) -> None:
    """Waits for an exit code from any process, then ends this one, whatever it is doing."""
    try:
        code = coordination_client().blocking_key_value_get(EXIT_KEY, FOREVER)
    except jax.errors.JaxRuntimeError:  # process 0 died; JAX ends this process
        return
    if code != DONE and exiting.acquire(blocking=False):
        _exit(int(code), reporter)


def end_all(code: int) -> NoReturn:
    """Ends this process and all others of its run with an exit code, from any thread, whatever they are doing.

    If process 0 does not answer, only this process ends. JAX ends the others when they miss it.
    """
    if jax.process_count() > 1:
        # Not here: the call would wait for a process 0 that hangs.
        threading.Thread(target=_set_exit_code, args=(code,), daemon=True).start()
        time.sleep(3 * EXIT_BARRIER_SECONDS)  # the watcher ends this process earlier
    os._exit(code)


def _set_exit_code(code: int) -> None:
    with suppress(jax.errors.JaxRuntimeError):  # another process was faster
        coordination_client().key_value_set(EXIT_KEY, str(code))


def _publish_exit_code(error: BaseException, exit_codes: Mapping[type[Exception], int]) -> int:
    """Sets the exit code of all processes and prints the error.

    If another process was faster, returns its exit code and prints nothing: that process has printed its own error.
    """
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        code = next((code for kind, code in exit_codes.items() if isinstance(error, kind)), 2 if fixable(error) else 1)
    if _process_id():
        time.sleep(1)  # process 0 goes first: if all processes found the same error, it prints it
    try:
        coordination_client().key_value_set(EXIT_KEY, str(code))
    except jax.errors.JaxRuntimeError:
        with suppress(jax.errors.JaxRuntimeError):
            return int(coordination_client().blocking_key_value_get(EXIT_KEY, 1000))
    where = f"process {_process_id()} on {socket.gethostname()}: " if _process_id() else ""
    text = strip_controls(one_line(error, None))
    if isinstance(error, tuple(exit_codes)) or fixable(error):
        print(f"error: {where}{fixable(error) or text}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, jax.errors.JaxRuntimeError) and CONNECTION_LOST.search(str(error)):
        print(f"error: {where}lost the connection to another process ({text[:200]}); {RESTART}", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    return code


def _exit(code: int, reporter: subprocess.Popen[bytes]) -> None:
    """Ends this process once the others have read the exit code, or after `EXIT_BARRIER_SECONDS`.

    Skips the interpreter's shutdown, which would wait for the other processes.
    """
    _stop_crash_reporter(reporter)
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(jax.errors.JaxRuntimeError):
        coordination_client().wait_at_barrier("gpt2_jax/exit_barrier", int(1000 * EXIT_BARRIER_SECONDS))
    if _process_id() == 0:
        time.sleep(1)  # JAX aborts every process that still runs when the store disappears
    os._exit(code)


def _start_crash_reporter() -> subprocess.Popen[bytes]:
    """Starts a child that prints an error line if this process dies before `_stop_crash_reporter`.

    No handler in this process could: it may be killed, and JAX aborts it when another process dies.
    """
    line = (
        f"error: process {_process_id()} of {jax.process_count()} died: it was killed, or JAX ended it because another "
        f"process died (see above); {RESTART}"
    )
    script = "trap '' HUP INT TERM; read -r dismissed || echo \"$0\" >&2"
    return subprocess.Popen(["/bin/sh", "-c", script, line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def _stop_crash_reporter(reporter: subprocess.Popen[bytes]) -> None:
    with suppress(BrokenPipeError):  # the child itself was killed
        reporter.communicate(b"dismissed\n")
