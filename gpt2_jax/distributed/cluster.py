"""Whether this process is one of several, and how they find each other: what flags and launchers say.

A launcher starts the same command once on every host (or once for every GPU), and says so in the environment. The
first of these that is there decides; where there is none, or one process only, nothing of this happens:

    --coordinator HOST:PORT --processes N --process I       flags; whatever they leave out comes from the next line
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (or a Kubernetes Job's JOB_COMPLETION_INDEX)
    OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK, …           Open MPI's mpirun
    SLURM_STEP_NUM_TASKS, SLURM_PROCID, …                   srun; the shell of a batch script is no step of several
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


@dataclasses.dataclass(frozen=True)
class ClusterFlags:
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


class Cluster(NamedTuple):
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


def detect_cluster(
    flags: ClusterFlags, environ: Mapping[str, str], metadata: Callable[[str], str] = metadata
) -> Cluster | None:
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
        return Cluster(len(hosts), coordinator or hosts[0], {"coordinator_address": coordinator or None})
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
        raise UserError(f"one of several processes needs {' and '.join(key for key, is_ in missing.items() if is_)}")
    if process >= processes:
        raise UserError(f"--process {process} of --processes {processes}; they count from 0 to {processes - 1}")
    return _cluster(coordinator, processes, process)


def _cluster(coordinator: str, processes: int, process: int, device: int | None = None) -> Cluster:
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
    return Cluster(processes, coordinator, arguments)


def _port(job: int, environ: Mapping[str, str]) -> int:
    """A port that jobs on the same hosts are not likely to share: JAX's own choice."""
    return int(environ.get("JAX_COORDINATOR_PORT") or 65536 - 4096 + job % 4096)


def _own_device(rank: int, neighbours: int, environ: Mapping[str, str]) -> int | None:
    """Of the GPUs that the processes of this host see, the one that is this process's; None for all of them.

    JAX would take one for each process, and so leave seven of eight idle where a host has one process.
    """
    bound = "SLURM_GPUS_PER_TASK" in environ or environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return None if neighbours == 1 or bound or "JAX_LOCAL_DEVICE_IDS" in environ else rank


def _open_mpi(coordinator: str, environ: Mapping[str, str]) -> Cluster:
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
    return _cluster(coordinator, processes, _number(environ, "OMPI_COMM_WORLD_RANK"), device)


def _slurm(coordinator: str, environ: Mapping[str, str]) -> Cluster:
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
    return _cluster(coordinator, processes, _number(environ, "SLURM_PROCID"), device)


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
