"""Several processes: found in the environment, trained in, killed, stopped, and what ends them all.

The processes are real ones, two with four simulated devices each, with gloo between them.
"""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax._src import clusters
from token_files import write_llmc

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import MeshConfig
from gpt2_jax.config.flags import parse_flags, take_flags
from gpt2_jax.config.toml import read_config
from gpt2_jax.distributed.cluster import ClusterFlags, detect_cluster
from gpt2_jax.errors import UserError
from gpt2_jax.files import exclusive
from gpt2_jax.metrics import read_rows
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import make_mesh
from gpt2_jax.step import abstract_state

TINY = """
out = "run"
steps = 12
batch_size = 16
micro_batch_size = 1

[model]
vocab_size = 0
block_size = 8
n_layer = 1
n_head = 2
n_embd = 16
dropout = 0.1

[data]
text = "text.txt"
tokenizer = "bytes"

[optimizer]
learning_rate = 1e-2
warmup_steps = 2
decay_steps = 200

[checkpoint]
every = 4

[eval]
every = 4
tokens = 64

[log]
every = 1
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process with four devices, which compiles what another one has compiled only once."""
    cache = tmp_path_factory.mktemp("compiled")
    without = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    return without | {
        "JAX_PLATFORMS": "cpu",
        # Programs of this size are compiled longer than they run.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture
def start(environment):
    """Starts both processes of a run; what is left of them is killed in the end."""
    running = []

    def start(
        directory,
        *args,
        process_args=((), ()),
        directories=None,
        module=("-m", "gpt2_jax.train", "--config", "tiny.toml"),
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        both = []
        for process in (0, 1):
            flags = ["--coordinator", coordinator, "--processes", "2", "--process", process]
            flags += ["--coordinator-timeout", "60", "--heartbeat-timeout", "20"]
            both.append(
                subprocess.Popen(
                    [sys.executable, *map(str, (*module, *args, *process_args[process], *flags))],
                    cwd=(directories or [directory] * 2)[process],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment | {"JAX_NUM_CPU_DEVICES": "4"},
                )
            )
        running.extend(both)
        return both

    yield start
    for process in running:
        process.kill()
        process.communicate()


# What its threads print piece by piece, so that lines may run into one another.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|[\d ]+")


def finish(both, seconds=120):
    """Exit codes, outputs and errors of both, without what gloo prints."""
    codes, outputs, errors = [], [], []
    for process in both:
        output, error = process.communicate(timeout=seconds)
        codes.append(process.returncode)
        outputs.append("\n".join(line for line in output.splitlines() if GLOO.sub("", line)))
        errors.append([line for line in error.splitlines() if line.startswith("error")])
    return codes, outputs, errors


def wait_for_update(out, step, both):
    deadline = time.monotonic() + 120
    while step not in rows(out, "loss"):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)


def rows(out, key):
    return {row["step"]: row[key] for row in read_rows(out / "metrics.jsonl") if key in row}


def state_after(step, out):
    """Every array of a checkpoint."""
    config = read_config(str(out / "config.toml"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = GPT2(dataclasses.replace(config.model, attention="xla", scan_layers=False))
    with Checkpoints(out / "checkpoints", 9) as checkpoints:
        return checkpoints.restore(step, abstract_state(model, config.optimizer, mesh))


def alone(environment, directory, *args):
    """Output of a run as one process with eight devices."""
    command = [sys.executable, "-m", "gpt2_jax.train", "--config", "tiny.toml", *map(str, args)]
    eight = environment | {"JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.run(command, cwd=directory, env=eight, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.fixture
def directory(tmp_path):
    return make_directory(tmp_path)


def make_directory(path):
    (path / "tiny.toml").write_text(TINY)
    (path / "text.txt").write_text("".join(f"{number} squared is {number * number}\n" for number in range(60)))
    return path


# --- a run -----------------------------------------------------------------------------------------------


def test_a_run_of_two_processes_is_that_of_one_and_survives_what_it_meets(start, environment, directory):
    """Replicas across processes and parameters split across them, layers stacked."""
    parts, whole, one = (directory / name for name in ("parts", "whole", "one"))
    mesh = ["--mesh.data", 2, "--mesh.fsdp", 4, "--model.n_layer", 2, "--model.scan_layers", "true"]

    # One is asked to stop, and both do; the notice takes up to a second, so there have to be updates enough.
    both = start(directory, "--out", "parts", "--steps", 100_000, *mesh)
    wait_for_update(parts, 1, both)
    both[1].send_signal(signal.SIGTERM)
    codes, outputs, errors = finish(both)
    assert (codes, errors) == ([128 + signal.SIGTERM] * 2, [[], []])
    assert "8 × cpu · mesh data 2 × fsdp 4" in outputs[0]
    assert outputs[1] == ""
    stopped = max(rows(parts, "loss"))
    assert f"stopped after update {stopped} of 100000" in outputs[0]
    assert (parts / "checkpoints" / str(stopped)).exists()

    # Then one is killed, and the other says so in time.
    steps = 4 * (stopped // 4 + 3)  # a checkpoint
    both = start(directory, "--out", "parts", "--steps", steps, *mesh)
    wait_for_update(parts, stopped + 1, both)
    both[1].kill()
    began = time.monotonic()
    codes, _, errors = finish(both)
    assert time.monotonic() - began < 60  # JAX waits 20 s for a heartbeat, and machines that test are slow
    assert codes[0] not in (0, 2)
    assert codes[1] == -signal.SIGKILL
    assert len(errors[0]) == 1
    assert "start all processes again with the same command" in errors[0][0]

    # What goes on to the end is, bit for bit, the run that met nothing.
    for out, until in (("parts", steps), ("whole", steps + 2)):
        both = start(directory, "--out", out, "--steps", until, *mesh, "--eval.sample_tokens", 3)
        codes, outputs, errors = finish(both)
        assert (codes, errors, outputs[1]) == ([0, 0], [[], []], "")
        assert "3 tokens that the model writes" in outputs[0]
    assert {path.name for path in whole.iterdir()} == {"config.toml", "metrics.jsonl", "loss.png", "checkpoints"}
    logged = [row["step"] for row in read_rows(parts / "metrics.jsonl") if "loss" in row]
    assert logged == list(range(1, steps + 1))  # by one process only
    for key in ("loss", "grad_norm", "learning_rate", "val_loss", "tokens"):
        expected = rows(whole, key)
        assert rows(parts, key) == {step: expected[step] for step in expected if step <= steps}, key
    jax.tree.map(np.testing.assert_array_equal, state_after(steps, parts), state_after(steps, whole))

    # With one process every sequence is on the same device, with the same dropout mask. But gloo adds in another
    # order, which costs some units of 2**-24 (6e-8) in each of the first updates, and later what training makes of it.
    alone(environment, directory, "--out", "one", "--steps", 8, *mesh)
    assert "continued" in alone(environment, directory, "--out", "parts", "--steps", steps + 2, *mesh)
    for out, compared in ((one, range(1, 9)), (parts, range(steps + 1, steps + 3))):
        for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
            found, expected = ([rows(run, key)[step] for step in compared] for run in (out, whole))
            np.testing.assert_allclose(found, expected, rtol=tolerance)
    np.testing.assert_allclose(rows(one, "val_loss")[8], rows(whole, "val_loss")[8], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_either_process_killed(start, directory, victim):
    codes, _, errors = finish(start(directory, "--out", "whole"))
    assert (codes, errors) == ([0, 0], [[], []])
    both = start(directory, "--out", "parts")
    wait_for_update(directory / "parts", 6, both)
    both[victim].kill()
    codes, _, errors = finish(both)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, 2)
    assert len(errors[1 - victim]) == 1
    codes, _, errors = finish(start(directory, "--out", "parts"))
    assert (codes, errors) == ([0, 0], [[], []])
    for key in ("loss", "grad_norm", "val_loss"):
        assert rows(directory / "parts", key) == rows(directory / "whole", key), key
    jax.tree.map(np.testing.assert_array_equal, *(state_after(12, directory / out) for out in ("parts", "whole")))


# --- where sequences go ----------------------------------------------------------------------------------

PLACING = """
import os, sys
import jax, numpy as np
from jax.sharding import Mesh
from gpt2_jax.distributed import cluster, processes
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.sharding import batch_sharding, local_rows, put_batch

flags = parse_flags(cluster.ClusterFlags, sys.argv[1:], prog="", description="")
with processes.distributed_session(cluster.detect_cluster(flags, os.environ), flags, {}):
    whole = np.arange(2 * 16 * 3).reshape(2, 16, 3)
    for order in ("01234567", "04152637", "70615243", "45012367"):
        for shape in ((8, 1), (4, 2), (2, 4), (1, 8)):
            mesh = Mesh(np.array(jax.devices())[list(map(int, order))].reshape(shape), ("data", "fsdp"))
            rows = local_rows(mesh, 16)
            assert len(rows) == 8
            for data in (whole, whole[0]):
                sharding = batch_sharding(mesh, leading_axis=data.ndim == 3)
                with jax.transfer_guard("disallow"):
                    batch = put_batch(data[..., rows, :], sharding)
                assert batch.shape == data.shape
                for shard in batch.addressable_shards:
                    np.testing.assert_array_equal(shard.data, data[shard.index])
    print("placed", sorted(local_rows(mesh, 16)))
"""


def test_sequences_are_where_they_belong_on_every_mesh_and_order_of_devices(start, directory):
    codes, outputs, _ = finish(start(directory, module=("-c", PLACING)))
    assert codes == [0, 0]
    assert all("placed" in output for output in outputs)


# --- what is refused, by all, and said once --------------------------------------------------------------


def refused(both):
    """Exit codes, the one line, and the process that says it."""
    codes, _, errors = finish(both)
    (line,) = errors[0] + errors[1]
    return codes, line


def test_what_process_0_finds_ends_both(start, directory):
    (directory / "run").mkdir()
    with exclusive(directory / "run", "training"):
        codes, line = refused(start(directory))
    assert codes == [2, 2]
    assert line == "error: another process is training in run; wait for it, stop it, or give another --out"
    (directory / "run" / "metrics.jsonl").mkdir()  # a mistake that nobody foresaw
    both = start(directory)
    codes, _, errors = finish(both)
    assert (codes, errors) == ([1, 1], [[], []])


def test_what_process_1_finds_ends_both(start, directory, tmp_path_factory):
    codes, line = refused(start(directory, process_args=((), ("--seed", 7))))
    assert codes == [2, 2]
    assert "error: process 1 on" in line
    assert "the config is not that of process 0 (seed = 7 here, seed = 1337 there)" in line
    elsewhere = make_directory(tmp_path_factory.mktemp("elsewhere"))
    codes, line = refused(start(directory, directories=(directory, elsewhere)))
    assert codes == [2, 2]
    assert "is not the directory in which process 0 writes; give an --out on a file system that all hosts share" in line


def test_what_both_find_is_said_once(start, directory):
    codes, line = refused(start(directory, "--stepz", 3))
    assert codes == [2, 2]
    assert line == "error: unknown flag --stepz; did you mean --steps?"


def test_data_that_one_process_finds_damaged_late(start, directory, tmp_path_factory):
    elsewhere = make_directory(tmp_path_factory.mktemp("elsewhere"))
    tokens = np.random.default_rng(0).integers(0, 257, 300_000).astype(np.uint16)
    for place in (directory, elsewhere):
        write_llmc(place / "tokens.bin", tokens)
        tokens[1 << 16 : -5000] = 60_000  # what is not looked at before training
    flags = ["--data.text", "", "--data.train", "tokens.bin", "--data.val", "tokens.bin"]
    codes, line = refused(start(directory, *flags, "--out", directory / "run", directories=(directory, elsewhere)))
    assert codes == [2, 2]
    assert "error: process 1 on" in line
    assert "tokens.bin has the token 60000, beyond" in line


@pytest.mark.slow
def test_divergence_ends_both(start, directory):
    codes, line = refused(start(directory, "--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", 0))
    assert codes == [1, 1]
    assert "has loss nan" in line


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_come_together_say_so_in_time(environment, directory, process):
    command = [sys.executable, "-m", "gpt2_jax.train", "--config", "quickstart", "--coordinator-timeout", "3"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        command += [
            "--coordinator",
            f"localhost:{free.getsockname()[1]}",
            "--processes",
            "2",
            "--process",
            str(process),
        ]
    began = time.monotonic()
    done = subprocess.run(command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: 2 processes did not come together at localhost:\d+ in 3 s; start the same .*\n", done.stderr
    )
    assert time.monotonic() - began < 30


def test_a_port_in_use_says_so(environment, directory):
    with socket.create_server(("localhost", 0)) as server:
        coordinator = f"localhost:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "gpt2_jax.train", "--config", "quickstart", "--coordinator", coordinator]
        command += ["--processes", "2", "--process", "0"]
        done = subprocess.run(command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(r"error: process 0 cannot listen at port \d+: Address already in use; give .*\n", done.stderr)


# --- the environment -------------------------------------------------------------------------------------

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
NOTHING: dict = {}


def launch(environ, *args, metadata=NOTHING):
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
        (JAX | SLURM | MPI, ("host:1", 4, 2, None)),  # who says it says it
        # 61440 + 5000 % 4096, as JAX has it; where several share a host, each has a GPU
        (SLURM, ("gpu003:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "login1"}, ("login1:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "a-7,b[1-3]"}, ("a-7:62344", 4, 3, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "r[12,15]n,b"}, ("r12n:62344", 4, 3, [1])),
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
        (MPI | SLURM, ("10.96.0.1:62624", 4, 2, [0])),  # mpirun within SLURM: srun starts only its helpers
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("10.96.0.1:62624", 4, 2, None)),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a.svc,b.svc", "TPU_WORKER_ID": "1"}, ("a.svc", 2, None, None)),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1"}, ("a:1", 3, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, ("a", 2, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_what_the_environment_says(environ, expected):
    assert launch(environ) == expected
    assert launch(environ, "--processes", 1) is None


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"worker-network-endpoints": "t-0,t-1"}, ("t-0", 2, None, None)),
        ({"worker-network-endpoints": "n:0:10.0.0.1,n:1:10.0.0.2"}, ("10.0.0.1", 2, None, None)),
        ({"worker-network-endpoints": "t-0"}, None),
        ({"worker-network-endpoints": "t-0", "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '4'\n"}, ("t-0", 4, None, None)),
    ],
)
def test_what_the_metadata_of_a_tpu_vm_says(metadata, expected):
    assert launch({}, metadata=metadata) == expected


@pytest.mark.parametrize(
    ("cluster", "environ"),
    [
        (clusters.SlurmCluster, SLURM),
        (clusters.SlurmCluster, SLURM | {"SLURM_STEP_NODELIST": "n[07,09-12],m", "SLURM_JOB_ID": "123456789"}),
        (clusters.OmpiCluster, MPI),
        (clusters.OmpiCluster, MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620::2]:43370"}),
    ],
)
def test_jax_finds_the_same(cluster, environ, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cluster.is_env_present()
    address = cluster.get_coordinator_address(timeout_secs=None, override_coordinator_port=None)
    found = launch(environ)
    found = (found[0].translate({ord("["): "", ord("]"): ""}), *found[1:3])  # which IPv6 addresses need before a port
    assert found == (address, cluster.get_process_count(), cluster.get_process_id())


def test_flags_come_before_the_environment():
    args = ["--coordinator", "here:7", "--processes", 3, "--process", 1]
    assert launch({}, *args) == ("here:7", 3, 1, None)
    assert launch(JAX | SLURM, *args) == ("here:7", 3, 1, None)
    assert launch(JAX, "--process", 3) == ("host:1", 4, 3, None)


@pytest.mark.parametrize(
    ("environ", "args", "message"),
    [
        ({}, ["--coordinator", "a:1"], r"needs --processes N \(JAX_NUM_PROCESSES\) and --process I"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, [], r"needs --processes N \(JAX_NUM_PROCESSES\) and --process I"),
        ({}, ["--process", 0], r"needs --coordinator HOST:PORT .* and --processes N"),
        (JAX, ["--process", 4], "--process 4 of --processes 4; they count from 0 to 3"),
        (JAX | {"JAX_NUM_PROCESSES": "two"}, [], "JAX_NUM_PROCESSES = 'two'; expected a whole number"),
        (JAX, ["--coordinator", "host"], "'host'; expected HOST:PORT"),
        (JAX, ["--coordinator", "host:99999"], "'host:99999'; expected HOST:PORT"),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": ""}, [], "does not say where process 0 runs; give --coordinator"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, [], "SLURM does not name the hosts"),
    ],
)
def test_what_is_said_by_halves(environ, args, message):
    with pytest.raises(UserError, match=message):
        launch(environ, *args)


def test_the_flags_are_taken_out_of_the_command_line():
    words, rest = take_flags(
        ClusterFlags, ["--config", "x", "--processes=2", "--steps", "3", "--coordinator-timeout", "5"]
    )
    assert words == ["--processes=2", "--coordinator-timeout", "5"]
    assert rest == ["--config", "x", "--steps", "3"]
