"""Detects the cluster: how many processes train together, and where they connect.

A launcher starts the same command once on every host, or once per GPU, and describes the job in the environment. The
first entry of this list that is present decides. Without any, or with one process, the process trains alone.

    --coordinator HOST:PORT --processes N --process I       flags; the next line supplies those that are missing
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, of a Kubernetes Job)
    OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK, …           Open MPI's mpirun
    SLURM_STEP_NUM_TASKS, SLURM_PROCID, …                   SLURM's srun; the shell of a batch script runs alone
    TPU_WORKER_HOSTNAMES, or a TPU VM's metadata            a TPU pod slice
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gpt2_jax.errors import UserError

MAX_SECONDS = 10**6  # of a timeout
MAX_PROCESSES = 10**6


@dataclasses.dataclass(frozen=True)
class ClusterFlags:
    """Flags of a run with several processes. SLURM, Open MPI and TPU pod slices need none of them."""

    coordinator: str = ""
    """HOST:PORT where process 0 listens. Default: JAX_COORDINATOR_ADDRESS, or the launcher's choice."""
    processes: int = 0
    """Number of processes. Default: JAX_NUM_PROCESSES, or the launcher's number. 1 trains in this process alone."""
    process: int = -1
    """Index of this process, from 0. Default: JAX_PROCESS_ID, JOB_COMPLETION_INDEX, or the launcher's index."""
    coordinator_timeout: int = 300
    """Seconds for all processes to connect."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as dead and the others end."""


class Cluster(NamedTuple):
    """The processes of a run, and how this one connects to them.

    Attributes:
        processes: number of processes.
        coordinator: the address they connect to, for messages.
        arguments: arguments of `jax.distributed.initialize`, without those that JAX detects itself.
    """

    processes: int
    coordinator: str
    arguments: dict[str, Any]


def metadata(key: str) -> str:
    """Reads an attribute of this machine from Google's metadata server; "" if there is none."""
    request = urllib.request.Request(
        f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # no such server, or no such attribute
        return ""


def detect_cluster(
    flags: ClusterFlags, environ: Mapping[str, str], metadata: Callable[[str], str] = metadata
) -> Cluster | None:
    """The cluster that the flags or the launcher describe; None if this process trains alone.

    Raises:
        UserError: the description is incomplete or invalid.
    """
    _check_seconds(flags)
    if flags.processes == 1:
        return None
    coordinator = flags.coordinator or environ.get("JAX_COORDINATOR_ADDRESS", "")
    names = {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & environ.keys()
    if flags.processes or flags.process >= 0 or names:
        return _explicit(flags, coordinator, environ)
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return _open_mpi(coordinator, environ)
    if _number(environ, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environ:
        return _slurm(coordinator, environ)
    hosts = _tpu_hosts(environ, metadata) if "tpu" in environ.get("JAX_PLATFORMS", "tpu") else []
    if len(hosts) > 1:
        return Cluster(len(hosts), coordinator or hosts[0], {"coordinator_address": coordinator or None})
    return _explicit(flags, coordinator, environ) if coordinator else None


def _check_seconds(flags: ClusterFlags) -> None:
    for name in ("coordinator_timeout", "heartbeat_timeout"):
        if not 1 <= (seconds := getattr(flags, name)) <= MAX_SECONDS:
            raise UserError(f"--{name.replace('_', '-')} {seconds}; expected 1 to {MAX_SECONDS} seconds")


def _number(environ: Mapping[str, str], *names: str) -> int:
    """The first of these variables that is set, as a number; -1 if none is."""
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        return -1
    if not re.fullmatch(r"[0-9]{1,18}", environ[name].strip()):
        raise UserError(f"{name} = {environ[name]!r}; expected a whole number, 0 or more")
    return int(environ[name])


def _set_number(environ: Mapping[str, str], name: str) -> int:
    """A variable that its launcher always sets, as a number.

    Raises:
        UserError: it is missing, or something else.
    """
    number = _number(environ, name)
    if number < 0:
        raise UserError(f"{name} is not set, but other variables of its launcher are; set it, or type --processes 1")
    return number


def _explicit(flags: ClusterFlags, coordinator: str, environ: Mapping[str, str]) -> Cluster | None:
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
        raise UserError(f"a run of several processes needs {' and '.join(key for key, is_ in missing.items() if is_)}")
    return _cluster(coordinator, processes, process)


def _cluster(coordinator: str, processes: int, process: int, device: int | None = None) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator is {coordinator!r}; expected HOST:PORT, where HOST runs process 0")
    if processes > MAX_PROCESSES:
        raise UserError(f"found --processes {processes}; expected at most {MAX_PROCESSES:,}")
    if process >= processes:
        raise UserError(f"found --process {process} of --processes {processes}; expected 0 to {processes - 1}")
    arguments = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "local_device_ids": None if device is None else [device],
        "cluster_detection_method": "deactivate",
    }
    return Cluster(processes, coordinator, arguments)


def _port(job: int, environ: Mapping[str, str]) -> int:
    """A port that jobs on the same host are unlikely to share, computed as JAX does."""
    port = _number(environ, "JAX_COORDINATOR_PORT")
    return port if port >= 0 else 65536 - 4096 + job % 4096


def _own_device(rank: int, shares_host: bool, environ: Mapping[str, str]) -> int | None:
    """The index of this process's GPU if several processes of a host see all of its GPUs; None to use all visible GPUs.

    JAX would always take one GPU per process, and leave seven of eight idle with one process per host.
    """
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", ids := environ.get("JAX_LOCAL_DEVICE_IDS", "0")):
        raise UserError(f"JAX_LOCAL_DEVICE_IDS = {ids!r}; expected numbers with commas, such as 0,1")
    bound = "SLURM_GPUS_PER_TASK" in environ or environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return None if not shares_host or bound or "JAX_LOCAL_DEVICE_IDS" in environ else rank


def _open_mpi(coordinator: str, environ: Mapping[str, str]) -> Cluster:
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    processes, rank, local_size, local_rank = (_set_number(environ, f"OMPI_COMM_WORLD_{name}") for name in names)
    # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911": the job number times 2**12, and the addresses of mpirun's host.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    if not coordinator and (found := re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)):
        coordinator = f"{found[2] or f'[{found[3]}]'}:{_port(int(found[1]) >> 12, environ)}"
    if not coordinator and processes != local_size:
        raise UserError("Open MPI does not report where process 0 runs; give --coordinator HOST:PORT")
    if not coordinator:
        coordinator = f"localhost:{_port(os.getppid(), environ)}"
    return _cluster(coordinator, processes, rank, _own_device(local_rank, local_size != 1, environ))


def _slurm(coordinator: str, environ: Mapping[str, str]) -> Cluster:
    names = ("STEP_NUM_TASKS", "PROCID", "LOCALID", "STEP_NUM_NODES")
    processes, rank, local_rank, hosts = (_set_number(environ, f"SLURM_{name}") for name in names)
    if not coordinator:
        host = _first_host(environ.get("SLURM_STEP_NODELIST", ""))
        coordinator = f"{host}:{_port(_set_number(environ, 'SLURM_JOB_ID'), environ)}"
    return _cluster(coordinator, processes, rank, _own_device(local_rank, hosts != processes, environ))


def _first_host(hosts: str) -> str:
    """The first host of a list of SLURM's: "rack0n03" of "rack[0-1,4]n[03-05,9],login1".

    Raises:
        UserError: it is not such a list.
    """
    first = re.match(r"(?:[^,\[\]\s]|\[\w[^\[\]]*\])+(?=,|$)", hosts)
    if not first:
        raise UserError(
            f"SLURM does not name the hosts of this job step (SLURM_STEP_NODELIST = {hosts!r}); give --coordinator "
            "HOST:PORT"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _tpu_hosts(environ: Mapping[str, str], metadata: Callable[[str], str]) -> list[str]:
    """All hosts of a TPU job, in JAX's order: those of this slice by name, those of other slices as ""."""
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = _number(environ, "MEGASCALE_NUM_SLICES")
    # JAX sets this variable on import if the machine has no TPU.
    if not names and "TPU_SKIP_MDS_QUERY" not in environ:
        names = metadata("worker-network-endpoints")  # "name:id:address,…", or the names alone
        in_metadata = re.search(r"MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", metadata("tpu-env")) if names else None
        slices = int(in_metadata[1]) if in_metadata else slices
    hosts = [name.split(":")[-1] if name.count(":") == 2 else name for name in (names or "").split(",") if name]
    return hosts + [""] * len(hosts) * (max(slices, 1) - 1)
