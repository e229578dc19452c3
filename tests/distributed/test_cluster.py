"""Detecting the cluster: from flags, from each launcher's environment, from a TPU's metadata, and against JAX."""

import pytest
from jax._src import clusters

from gpt2_jax.config.flags import parse_flags, take_flags
from gpt2_jax.distributed.cluster import ClusterFlags, detect_cluster
from gpt2_jax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
NO_METADATA: dict = {}


def detect(environ, *args, metadata=NO_METADATA):
    environ = {"TPU_SKIP_MDS_QUERY": "1"} | environ if not metadata else environ
    flags = parse_flags(ClusterFlags, list(map(str, args)), prog="", description="")
    found = detect_cluster(flags, environ, lambda key: metadata.get(key, ""))
    if found is None:
        return None
    arguments = found.arguments
    return found.coordinator, found.processes, arguments.get("process_id"), arguments.get("local_device_ids")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (JAX, ("host:1", 4, 2, None)),
        (JAX | {"JAX_NUM_PROCESSES": "1"}, None),
        ({**JAX, "JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "1"}, ("host:1", 4, 1, None)),
        (JAX | SLURM | MPI, ("host:1", 4, 2, None)),  # explicit variables win
        # 61440 + 5000 % 4096, JAX's rule; with several processes per host each has one GPU
        (SLURM, ("gpu003:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "login1"}, ("login1:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "a-7,b[1-3]"}, ("a-7:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "r[12,15]n,b"}, ("r12n:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "rack[0-1]n[01-04]"}, ("rack0n01:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "rack[1,3-5]n[04-07,12]s[2],login1"}, ("rack1n04s2:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NUM_NODES": "4"}, ("gpu003:62344", 4, 3, None)),
        (SLURM | {"SLURM_GPUS_PER_TASK": "1"}, ("gpu003:62344", 4, 3, None)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, ("gpu003:62344", 4, 3, None)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, ("gpu003:62344", 4, 3, [1])),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, ("gpu003:62344", 4, 3, None)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "other:5"}, ("other:5", 4, 3, [1])),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, ("gpu003:99", 4, 3, [1])),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),  # sbatch
        (MPI, ("10.96.0.1:62624", 4, 2, [0])),  # 61440 + 1531576320 / 4096 % 4096
        (MPI | SLURM, ("10.96.0.1:62624", 4, 2, [0])),  # mpirun inside SLURM: srun starts only its daemons
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("10.96.0.1:62624", 4, 2, None)),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a.svc,b.svc", "TPU_WORKER_ID": "1"}, ("a.svc", 2, None, None)),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1"}, ("a:1", 3, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, ("a", 2, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_each_launcher_is_detected(environ, expected):
    assert detect(environ) == expected
    assert detect(environ, "--processes", 1) is None


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"worker-network-endpoints": "t-0,t-1"}, ("t-0", 2, None, None)),
        ({"worker-network-endpoints": "n:0:10.0.0.1,n:1:10.0.0.2"}, ("10.0.0.1", 2, None, None)),
        ({"worker-network-endpoints": "t-0"}, None),
        ({"worker-network-endpoints": "t-0", "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '4'\n"}, ("t-0", 4, None, None)),
    ],
)
def test_tpu_vm_metadata_is_detected(metadata, expected):
    assert detect({}, metadata=metadata) == expected


@pytest.mark.parametrize(
    ("cluster", "environ"),
    [
        (clusters.SlurmCluster, SLURM),
        (clusters.SlurmCluster, SLURM | {"SLURM_STEP_NODELIST": "n[07,09-12],m", "SLURM_JOB_ID": "123456789"}),
        (clusters.OmpiCluster, MPI),
        (clusters.OmpiCluster, MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620::2]:43370"}),
    ],
)
def test_jax_detects_the_same(cluster, environ, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cluster.is_env_present()
    address = cluster.get_coordinator_address(timeout_secs=None, override_coordinator_port=None)
    found = detect(environ)
    found = (
        found[0].translate({ord("["): "", ord("]"): ""}),
        *found[1:3],
    )  # brackets that an IPv6 address needs before a port
    assert found == (address, cluster.get_process_count(), cluster.get_process_id())


def test_flags_override_the_environment():
    args = ["--coordinator", "here:7", "--processes", 3, "--process", 1]
    assert detect({}, *args) == ("here:7", 3, 1, None)
    assert detect(JAX | SLURM, *args) == ("here:7", 3, 1, None)
    assert detect(JAX, "--process", 3) == ("host:1", 4, 3, None)


@pytest.mark.parametrize(
    ("environ", "args", "message"),
    [
        ({}, ["--coordinator", "a:1"], r"needs --processes N \(JAX_NUM_PROCESSES\) and --process I"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, [], r"needs --processes N \(JAX_NUM_PROCESSES\) and --process I"),
        ({}, ["--process", 0], r"needs --coordinator HOST:PORT .* and --processes N"),
        (JAX, ["--process", 4], "found --process 4 of --processes 4; expected 0 to 3"),
        (JAX, ["--processes", 10**400], "found --processes 1000+; expected at most 1,000,000"),
        (JAX | {"JAX_NUM_PROCESSES": "two"}, [], "JAX_NUM_PROCESSES = 'two'; expected a whole number"),
        (JAX, ["--coordinator", "host"], "'host'; expected HOST:PORT"),
        (JAX, ["--coordinator", "host:99999"], "'host:99999'; expected HOST:PORT"),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": ""}, [], "does not report where process 0 runs; give --coordinator"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, [], "SLURM does not name the hosts"),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[1-3"}, [], r"SLURM_STEP_NODELIST = 'n\[1-3'\); give --coordinator"),
        (SLURM | {"JAX_COORDINATOR_PORT": "abc"}, [], "JAX_COORDINATOR_PORT = 'abc'; expected a whole number"),
        (MPI | {"JAX_COORDINATOR_PORT": "-1"}, [], "JAX_COORDINATOR_PORT = '-1'; expected a whole number"),
        (SLURM | {"JAX_COORDINATOR_PORT": "99999"}, [], "'gpu003:99999'; expected HOST:PORT"),
        (SLURM | {"SLURM_LOCALID": ""}, [], "SLURM_LOCALID is not set, but other variables of its launcher are"),
        (SLURM | {"SLURM_PROCID": "x"}, [], "SLURM_PROCID = 'x'; expected a whole number"),
        (SLURM | {"SLURM_PROCID": "4"}, [], "found --process 4 of --processes 4"),
        (SLURM | {"SLURM_JOB_ID": ""}, [], "SLURM_JOB_ID is not set"),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "a,b"}, [], "JAX_LOCAL_DEVICE_IDS = 'a,b'; expected numbers with commas"),
        ({**MPI, "OMPI_COMM_WORLD_RANK": ""}, [], "OMPI_COMM_WORLD_RANK is not set"),
        ({"JAX_PROCESS_ID": "1"}, [], "needs --coordinator .* and --processes N"),
        ({"JAX_NUM_PROCESSES": "9" * 5000}, [], "expected a whole number"),
        (JAX, ["--coordinator-timeout", -5], "--coordinator-timeout -5; expected 1 to 1000000 seconds"),
        (JAX, ["--heartbeat-timeout", 2**40], "--heartbeat-timeout 1099511627776; expected 1 to"),
    ],
)
def test_incomplete_descriptions_are_errors(environ, args, message):
    with pytest.raises(UserError, match=message):
        detect(environ, *args)


def test_cluster_flags_are_split_from_the_command_line():
    words, rest = take_flags(
        ClusterFlags, ["--config", "x", "--processes=2", "--steps", "3", "--coordinator-timeout", "5"]
    )
    assert words == ["--processes=2", "--coordinator-timeout", "5"]
    assert rest == ["--config", "x", "--steps", "3"]
