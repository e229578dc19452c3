"""One of several processes: whether this is one, how they find each other, agree, stop, and end together.

A launcher starts the same command once on every host (or once for every GPU), and says so in the environment. The
first of these that is there decides; where there is none, or one process only, nothing here happens:

    --coordinator HOST:PORT --processes N --process I       flags; whatever they leave out comes from the next line
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (or a Kubernetes Job's JOB_COMPLETION_INDEX)
    OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK, …           Open MPI's mpirun
    SLURM_STEP_NUM_TASKS, SLURM_PROCID, …                   srun; the shell of a batch script is no step of several
    TPU_WORKER_HOSTNAMES, or a TPU VM's metadata            a TPU pod slice

What one process finds wrong ends all of them with the same exit code, and is said once. That needs the key-value store
of `jax.distributed`, which JAX does not export; Orbax reads it from the same place.
"""

from __future__ import annotations

import dataclasses
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
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from gpt2_jax.config import UserError

OUTCOME = "gpt2_jax/outcome"  # The key that ends all processes: an exit code, or DONE.
DONE = "done"
FOREVER = 1 << 40  # Milliseconds: 35 years. A process that waits for one that died is ended by other means.
FAREWELL_SECONDS = 5.0  # For the others to read the outcome before this process, and its store, goes.
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|socket closed|heartbeat", re.IGNORECASE)
RESTART = "start all processes again with the same command: the run goes on from its last checkpoint"


# --- whether this is one of several ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flags:
    """One of several processes. SLURM, Open MPI and TPU pod slices need no flags."""

    coordinator: str = ""
    """HOST:PORT where process 0 listens; by default JAX_COORDINATOR_ADDRESS, or what the launcher says."""
    processes: int = 0
    """How many there are; by default JAX_NUM_PROCESSES, or what the launcher says. 1 is this one alone."""
    process: int = -1
    """Which one this is, from 0; by default JAX_PROCESS_ID or JOB_COMPLETION_INDEX, or what the launcher says."""
    coordinator_timeout: int = 300
    """Seconds in which all processes must have come together."""
    heartbeat_timeout: int = 100
    """Seconds without a sign of life after which a process counts as dead, and the others end."""


class Launch(NamedTuple):
    """One of several processes.

    Attributes:
        processes: how many.
        coordinator: where they meet, as messages name it.
        arguments: for `jax.distributed.initialize`; none where JAX finds them itself.
    """

    processes: int
    coordinator: str
    arguments: dict[str, Any]


def metadata(key: str) -> str:
    """An attribute that Google's metadata server has of this machine; "" where there is no such thing."""
    request = urllib.request.Request(
        f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # no such server, or it has no such attribute
        return ""


def detect(flags: Flags, environ: Mapping[str, str], metadata: Callable[[str], str] = metadata) -> Launch | None:
    """What the flags or the launcher say; None for a process of its own.

    Raises:
        UserError: it is said by halves, or makes no sense.
    """
    if flags.processes == 1:
        return None
    coordinator = flags.coordinator or environ.get("JAX_COORDINATOR_ADDRESS", "")
    if flags.processes or "JAX_NUM_PROCESSES" in environ or flags.process >= 0:
        return _explicit(flags, coordinator, environ)
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return _open_mpi(coordinator, environ)
    if _number(environ, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environ:
        return _slurm(coordinator, environ)
    hosts = _tpu_hosts(environ, metadata) if "tpu" in environ.get("JAX_PLATFORMS", "tpu") else []
    if len(hosts) > 1:
        return Launch(len(hosts), coordinator or hosts[0], {"coordinator_address": coordinator or None})
    return _explicit(flags, coordinator, environ) if coordinator else None


def _number(environ: Mapping[str, str], *names: str) -> int:
    """The first of these variables that is set, as a number; -1 for none."""
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        return -1
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name} = {environ[name]!r}; expected a whole number") from None


def _explicit(flags: Flags, coordinator: str, environ: Mapping[str, str]) -> Launch | None:
    processes = flags.processes or _number(environ, "JAX_NUM_PROCESSES")
    if processes == 1:
        return None
    process = flags.process if flags.process >= 0 else _number(environ, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
    missing = {
        "--coordinator HOST:PORT (JAX_COORDINATOR_ADDRESS)": not coordinator,
        "--processes N (JAX_NUM_PROCESSES)": processes < 1,
        "--process I (JAX_PROCESS_ID)": process < 0,
    }
    if any(missing.values()):
        raise UserError(f"one of several processes needs {' and '.join(key for key, is_ in missing.items() if is_)}")
    if process >= processes:
        raise UserError(f"--process {process} of --processes {processes}; they count from 0 to {processes - 1}")
    return _launch(coordinator, processes, process)


def _launch(coordinator: str, processes: int, process: int, device: int | None = None) -> Launch:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"the coordinator's address is {coordinator!r}; expected HOST:PORT, of the host of process 0")
    arguments = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "local_device_ids": None if device is None else [device],
        "cluster_detection_method": "deactivate",
    }
    return Launch(processes, coordinator, arguments)


def _port(job: int, environ: Mapping[str, str]) -> int:
    """A port that jobs on the same hosts are not likely to share: JAX's own choice."""
    return int(environ.get("JAX_COORDINATOR_PORT") or 65536 - 4096 + job % 4096)


def _own_device(rank: int, neighbours: int, environ: Mapping[str, str]) -> int | None:
    """Of the GPUs that the processes of this host see, the one that is this process's; None for all of them.

    JAX would take one for each process, and so leave seven of eight idle where a host has one process.
    """
    bound = "SLURM_GPUS_PER_TASK" in environ or environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return None if neighbours == 1 or bound or "JAX_LOCAL_DEVICE_IDS" in environ else rank


def _open_mpi(coordinator: str, environ: Mapping[str, str]) -> Launch:
    processes, neighbours = (_number(environ, f"OMPI_COMM_WORLD_{what}") for what in ("SIZE", "LOCAL_SIZE"))
    # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911": the number of the job times 2**12, and where mpirun runs.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    if not coordinator and (found := re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)):
        coordinator = f"{found[2] or f'[{found[3]}]'}:{_port(int(found[1]) >> 12, environ)}"
    if not coordinator and processes != neighbours:
        raise UserError("this Open MPI does not say where process 0 runs; give --coordinator HOST:PORT")
    if not coordinator:
        coordinator = f"localhost:{_port(os.getppid(), environ)}"
    device = _own_device(_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), neighbours, environ)
    return _launch(coordinator, processes, _number(environ, "OMPI_COMM_WORLD_RANK"), device)


def _slurm(coordinator: str, environ: Mapping[str, str]) -> Launch:
    processes, hosts = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_STEP_NUM_NODES")
    if not coordinator:
        # The first of "gpu[003-005,9],login1": what stands before the brackets, and the first number in them.
        first = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", environ.get("SLURM_STEP_NODELIST", ""))
        if not first:
            raise UserError("SLURM does not name the hosts of this step; give --coordinator HOST:PORT")
        coordinator = (
            f"{''.join(part or '' for part in first.groups())}:{_port(_number(environ, 'SLURM_JOB_ID'), environ)}"
        )
    neighbours = 1 if hosts == processes else processes
    device = _own_device(_number(environ, "SLURM_LOCALID"), neighbours, environ)
    return _launch(coordinator, processes, _number(environ, "SLURM_PROCID"), device)


def _tpu_hosts(environ: Mapping[str, str], metadata: Callable[[str], str]) -> list[str]:
    """The hosts of the TPU slices that this one belongs to, in JAX's order; one "" for each of other slices."""
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = _number(environ, "MEGASCALE_NUM_SLICES")
    # Where there are no TPU chips, JAX sets this variable as it is imported.
    if not names and "TPU_SKIP_MDS_QUERY" not in environ:
        names = metadata("worker-network-endpoints")  # "name:id:address,…", or the names alone
        in_metadata = re.search(r"MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", metadata("tpu-env")) if names else None
        slices = int(in_metadata[1]) if in_metadata else slices
    hosts = [name.split(":")[-1] if name.count(":") == 2 else name for name in (names or "").split(",") if name]
    return hosts + [""] * len(hosts) * (max(slices, 1) - 1)


# --- coming together, and ending together ---------------------------------------------------------------


@contextmanager
def joined(launch: Launch | None, flags: Flags, known: Mapping[type[Exception], int]) -> Iterator[None]:
    """Within, this process is one of those of `launch`, and what ends one ends all.

    Where an exception leaves the body in any process, every process exits with the same code, and only one says why.
    Otherwise the processes leave when all of them have come to the end. Processes that do not come together exit with
    code 2. Does nothing where `launch` is None.

    Args:
        known: errors that are one line for the user, and their exit codes. Others leave a traceback, and code 1.
    """
    if launch is None:
        yield
        return
    _come_together(launch, flags)
    last_words = _last_words()
    leaving = threading.Lock()
    watcher = threading.Thread(target=_watch, args=(leaving, last_words), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        leaving.acquire()  # never given back; if the watcher has it, this process is at its end
        _end(_announce(error, known), last_words)
    barrier("done")
    if distributed.global_state.process_id == 0:
        _client().key_value_set(OUTCOME, DONE)
    watcher.join()
    _say_farewell(last_words)
    jax.distributed.shutdown()


def _come_together(launch: Launch, flags: Flags) -> None:
    """`jax.distributed.initialize` and the first look at the devices; ends this process if they fail or take long."""
    problem = (
        f"{launch.processes} processes did not come together at {launch.coordinator} in {flags.coordinator_timeout} s; "
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
            **launch.arguments,
            initialization_timeout=flags.coordinator_timeout + 60,
            heartbeat_timeout_seconds=flags.heartbeat_timeout,
        )
        jax.devices()
    except (RuntimeError, ValueError, OSError) as error:
        give_up(f": {' '.join(str(error).split())[:200]}")
    timer.cancel()


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


def _announce(error: BaseException, known: Mapping[type[Exception], int]) -> int:
    """Makes this process's exit code the outcome and says why; or returns that of another, which has said so."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        code = next((code for kind, code in known.items() if isinstance(error, kind)), 1)
    if distributed.global_state.process_id:
        time.sleep(1)  # what all have found, process 0 says
    try:
        _client().key_value_set(OUTCOME, str(code))
    except jax.errors.JaxRuntimeError:
        with suppress(jax.errors.JaxRuntimeError):
            return int(_client().blocking_key_value_get(OUTCOME, 1000))
    who = f"process {distributed.global_state.process_id} on {socket.gethostname()}: "
    who = who if distributed.global_state.process_id else ""
    if isinstance(error, tuple(known)):
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
    _say_farewell(last_words)
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier("gpt2_jax/end", int(1000 * FAREWELL_SECONDS))
    if distributed.global_state.process_id == 0:
        time.sleep(1)  # JAX aborts processes that are there when the store, which is here, goes
    os._exit(code)


def _last_words() -> subprocess.Popen[bytes]:
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


def _say_farewell(last_words: subprocess.Popen[bytes]) -> None:
    with suppress(BrokenPipeError):  # it was killed itself
        last_words.communicate(b"farewell\n")


# --- agreeing -------------------------------------------------------------------------------------------

_calls = itertools.count()  # Keys and barriers have names of their own; all processes come to them in one order.


def is_first() -> bool:
    """Whether this is process 0, which alone writes and speaks."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"gpt2_jax/{next(_calls)}/{name}", FOREVER)


def of_first(name: str, value: str) -> str:
    """The value of process 0, in all of them."""
    if jax.process_count() == 1:
        return value
    key = f"gpt2_jax/{next(_calls)}/{name}"
    if is_first():
        _client().key_value_set(key, value)
        return value
    return _client().blocking_key_value_get(key, FOREVER)


def agree(what: str, value: str) -> None:
    """Makes sure that a value, of one line or many, is the same in all processes.

    Raises:
        UserError: this process has another one than process 0.
    """
    theirs = of_first(what, value)
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
    seen = directory / f".seen-{of_first('token', secrets.token_hex(8))}"
    if is_first():
        seen.touch()
    barrier("written")
    patience = time.monotonic() + 10  # Network file systems may be late.
    while not seen.exists():
        if time.monotonic() > patience:
            raise UserError(
                f"{directory.absolute()} on this host is not the directory in which process 0 writes; give an --out on "
                "a file system that all hosts share"
            )
        time.sleep(0.1)
    barrier("seen")
    if is_first():
        seen.unlink()


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
