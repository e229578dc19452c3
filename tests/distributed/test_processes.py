"""Runs of two processes: killed, stopped and resumed; refused; and ended together by an error.

The processes are real ones, with four simulated devices each and gloo between them.
"""

import dataclasses
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from token_files import write_llmc
from xla_flags import FAST_COMPILE

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import MeshConfig
from gpt2_jax.config.toml import read_config
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


TRAIN = ("-m", "gpt2_jax.train", "--config", "tiny.toml")
# Replicas on two processes, parameters sharded over the devices of each, layers stacked.
MESH = ["--mesh.data", 2, "--mesh.fsdp", 4, "--model.n_layer", 2, "--model.scan_layers", "true"]


@pytest.fixture(scope="module")
def spawn():
    """Starts one process; kills it after the last test if it still runs."""
    running = []
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE, "PYTHONUNBUFFERED": "1"}

    def spawn(command, directory, n_devices):
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"JAX_NUM_CPU_DEVICES": str(n_devices)},
        )
        running.append(process)
        return process

    yield spawn
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def start(spawn):
    """Starts both processes of a run, with four devices each."""

    def start(directory, *args, process_args=((), ()), directories=None, command=TRAIN):
        common = [*command, *args, "--coordinator", f"localhost:{free_port()}", "--processes", 2]
        common += ["--coordinator-timeout", 100, "--heartbeat-timeout", 20]
        directories = directories or (directory, directory)
        return [spawn([*common, *process_args[i], "--process", i], directories[i], 4) for i in (0, 1)]

    return start


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# gloo's threads print piece by piece, so lines can run into one another.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|[\d ]+")


def finish(processes, seconds=200):
    """Exit codes, outputs without gloo's lines, and the error lines of all processes."""
    codes, outputs, errors = [], [], []
    for process in processes:
        output, error = process.communicate(timeout=seconds)
        codes.append(process.returncode)
        outputs.append("\n".join(line for line in output.splitlines() if GLOO.sub("", line)))
        errors.append([line for line in error.splitlines() if line.startswith("error")])
    return codes, outputs, errors


def wait_for(condition, processes):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
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


def alone(spawn, directory, *args):
    """Output of a run of one process with eight devices."""
    codes, (output,), errors = finish([spawn([*TRAIN, *args], directory, 8)])
    assert (codes, errors) == ([0], [[]])
    return output


@pytest.fixture(scope="module")
def make_directory(tmp_path_factory):
    """Creates directories with the config and the text of a tiny run."""

    def make_directory():
        path = tmp_path_factory.mktemp("directory")
        (path / "tiny.toml").write_text(TINY)
        (path / "text.txt").write_text("".join(f"{number} squared is {number * number}\n" for number in range(60)))
        return path

    return make_directory


@pytest.fixture
def directory(make_directory):
    return make_directory()


# --- a run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(start, spawn, directory):
    parts, whole = directory / "parts", directory / "whole"

    # Kill one process. The other one reports it, soon.
    both = start(directory, "--out", "parts", "--steps", 100_000, *MESH)
    wait_for(lambda: 6 in rows(parts, "loss") and (parts / "checkpoints" / "4").exists(), both)
    both[1].kill()
    began = time.monotonic()
    codes, _, errors = finish(both)
    assert time.monotonic() - began < 60  # JAX waits 20 s for a heartbeat, and test machines are slow
    assert codes[0] not in (0, 2)
    assert codes[1] == -signal.SIGKILL
    assert len(errors[0]) == 1
    assert "start all processes again with the same command" in errors[0][0]

    # Resume, and ask one process to stop. Both stop after the same update, up to a second later.
    both = start(directory, "--out", "parts", "--steps", 100_000, *MESH, "--checkpoint.every", 1000)
    killed_after = max(rows(parts, "loss"))
    wait_for(lambda: killed_after + 2 in rows(parts, "loss"), both)
    both[1].send_signal(signal.SIGTERM)
    codes, outputs, errors = finish(both)
    assert (codes, errors) == ([128 + signal.SIGTERM] * 2, [[], []])
    assert "8 × cpu · mesh data 2 × fsdp 4" in outputs[0]
    assert re.search(r"resumed after update \d", outputs[0])
    assert outputs[1] == ""
    stopped = max(rows(parts, "loss"))
    assert f"stopped after update {stopped} of 100000" in outputs[0]

    # Without an interruption, two updates longer.
    longer = ["--steps", stopped + 2, *MESH, "--checkpoint.every", stopped]
    both = start(directory, "--out", "whole", *longer)
    codes, outputs, errors = finish(both)
    assert (codes, errors, outputs[1]) == ([0, 0], [[], []], "")
    files = {"config.toml", "metrics.jsonl", "time.jsonl", "loss.png", "checkpoints"}
    assert {path.name for path in whole.iterdir()} == files
    logged = [row["step"] for row in read_rows(parts / "metrics.jsonl") if "loss" in row]
    assert logged == list(range(1, stopped + 1))  # by one process only
    jax.tree.map(np.testing.assert_array_equal, state_after(stopped, parts), state_after(stopped, whole))

    # Resume to the end.
    shutil.copytree(parts, directory / "copy")
    codes, outputs, errors = finish(start(directory, "--out", "parts", *longer))
    assert (codes, errors) == ([0, 0], [[], []])
    assert f"resumed after update {stopped}" in outputs[0]
    assert rows(parts, "val_loss")
    for key in ("loss", "grad_norm", "learning_rate", "val_loss", "tokens"):
        assert rows(parts, key) == rows(whole, key), key
    jax.tree.map(np.testing.assert_array_equal, state_after(stopped + 2, parts), state_after(stopped + 2, whole))

    # One process resumes the run of two as well. The tolerances are those of the next test.
    assert f"resumed after update {stopped}" in alone(spawn, directory, "--out", "copy", *longer)
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
        found, expected = ([rows(run, key)[stopped + i] for i in (1, 2)] for run in (directory / "copy", whole))
        np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.slow
def test_two_processes_train_as_one(start, spawn, directory):
    """With one process every sequence is on the same device, with the same dropout mask. But gloo adds in another
    order: some units of 2**-24 (6e-8) in each of the first updates, which training later amplifies.
    """
    both = start(directory, "--out", "two", "--steps", 8, *MESH, "--eval.sample_tokens", 3)
    codes, outputs, errors = finish(both)
    assert (codes, errors, outputs[1]) == ([0, 0], [[], []], "")
    assert "3 tokens written by the model" in outputs[0]
    alone(spawn, directory, "--out", "one", "--steps", 8, *MESH)
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5), ("val_loss", 1e-6)):
        found, expected = rows(directory / "one", key), rows(directory / "two", key)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=tolerance)


@pytest.mark.slow
def test_either_process_killed(start, directory):
    codes, _, errors = finish(start(directory, "--out", "whole"))
    assert (codes, errors) == ([0, 0], [[], []])
    for victim, parts in enumerate(("first", "second")):
        both = start(directory, "--out", parts)
        wait_for(lambda parts=parts: 6 in rows(directory / parts, "loss"), both)
        both[victim].kill()
        codes, _, errors = finish(both)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] not in (0, 2)
        assert len(errors[1 - victim]) == 1
        codes, _, errors = finish(start(directory, "--out", parts))
        assert (codes, errors) == ([0, 0], [[], []])
        for key in ("loss", "grad_norm", "val_loss"):
            assert rows(directory / parts, key) == rows(directory / "whole", key), key
        jax.tree.map(np.testing.assert_array_equal, *(state_after(12, directory / out) for out in (parts, "whole")))


# --- where sequences go, and errors ----------------------------------------------------------------------

PLACING = """
import os, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from gpt2_jax.distributed import cluster
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.distributed.session import distributed_session
from gpt2_jax.errors import UserError
from gpt2_jax.sharding import batch_sharding, local_rows, put_batch

flags = parse_flags(cluster.ClusterFlags, sys.argv[1:], prog="", description="")
with distributed_session(cluster.detect_cluster(flags, os.environ), flags, {UserError: 2}):
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
    if jax.process_index() == 1:
        raise UserError("found late")
    # Waits in a collective for process 1, which never takes part.
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
    total(put_batch(whole[0][rows], sharding)).block_until_ready()
"""


@pytest.fixture(scope="module")
def failed(start, make_directory):
    """Exit codes, outputs and error lines of pairs of processes that fail, by name.

    All pairs start at the same time, because they mostly wait.
    """
    held, here = (make_directory() for _ in range(2))
    (held / "run").mkdir()
    with exclusive(held / "run", "training"):
        running = {
            "held directory": start(held),
            "another seed": start(here, process_args=((), ("--seed", 7))),
            "found late": start(here, command=("-c", PLACING)),
        }
        results = {name: finish(processes) for name, processes in running.items()}
    left = [path for place in (here, held) for path in place.rglob("*")]
    return results | {"left behind": sorted(path.name for path in left if path.name not in ("tiny.toml", "text.txt"))}


def error_line(codes, outputs, errors):
    """The only error line of all processes, which exit with code 2."""
    assert codes == [2] * len(codes)
    (line,) = itertools.chain(*errors)
    return line


def test_sequences_are_placed_right_on_every_mesh_and_order_of_devices(failed):
    _, outputs, _ = failed["found late"]
    assert all("placed" in output for output in outputs)


def test_an_error_of_process_0_ends_both(failed):
    line = error_line(*failed["held directory"])
    assert line == "error: another process is training in run; wait for it, stop it, or give another --out"


def test_an_error_of_process_1_ends_both(failed):
    line = error_line(*failed["another seed"])
    assert line.startswith("error: process 1 on")
    assert "the config differs from process 0: seed = 7 here, seed = 1337 on process 0;" in line


@pytest.mark.slow
def test_processes_that_do_not_share_a_directory_do_not_train(start, directory, make_directory):
    line = error_line(*finish(start(directory, directories=(directory, make_directory()))))
    assert "is not the directory that process 0 writes; give an --out on a file system that all hosts share" in line


def test_a_refused_start_leaves_nothing_behind(failed):
    assert failed["left behind"] == ["run"]  # the one that was there


def test_an_error_ends_a_process_that_waits_in_a_collective(failed):
    assert re.fullmatch("error: process 1 on .*: found late", error_line(*failed["found late"]))


@pytest.mark.slow
def test_an_error_of_both_is_printed_once(start, directory):
    line = error_line(*finish(start(directory, "--stepz", 3)))
    assert line == "error: unknown flag --stepz; did you mean --steps?"


@pytest.mark.slow
def test_an_unforeseen_error_ends_both_with_code_1(start, directory):
    crash = PLACING.replace('UserError("found late")', "ZeroDivisionError")
    codes, _, errors = finish(start(directory, command=("-c", crash)))
    assert (codes, errors) == ([1, 1], [[], []])


def test_processes_that_cannot_connect_exit_in_time(spawn, directory):
    with socket.create_server(("localhost", 0)) as server:
        in_use = f"localhost:{server.getsockname()[1]}"
        flags = ["--coordinator-timeout", 3, "--processes", 2, "--coordinator"]
        each = [(f"localhost:{free_port()}", 0), (f"localhost:{free_port()}", 1), (in_use, 0)]
        began = time.monotonic()
        processes = [spawn([*TRAIN, *flags, address, "--process", i], directory, 4) for address, i in each]
        lines = [error_line(*finish([process])) for process in processes]
        assert time.monotonic() - began < 30
    for line in lines[:2]:
        assert re.fullmatch(r"error: 2 processes did not connect to localhost:\d+ in 3 s; start the same .*", line)
    assert re.fullmatch(r"error: process 0 cannot listen on port \d+: Address already in use; give .*", lines[2])


OTHER_OPTAX = """
import importlib.metadata, sys
version = importlib.metadata.version
if sys.argv[-1] == "1":
    importlib.metadata.version = lambda name: "0.0" if name == "optax" else version(name)
from gpt2_jax.train import command
command()
"""


@pytest.mark.slow
def test_hosts_with_different_versions_do_not_train(start, directory):
    line = error_line(*finish(start(directory, "--config", "tiny.toml", command=("-c", OTHER_OPTAX))))
    assert re.fullmatch(
        r"error: process 1 on .*: the software differs from process 0: optax 0\.0 here, optax [\d.]+ on process 0; "
        "install the same code and the same versions on every host",
        line,
    )
    assert not (directory / "run").exists()


@pytest.mark.slow
def test_hosts_whose_data_differs_in_the_middle_do_not_train(start, directory, make_directory):
    elsewhere = make_directory()
    tokens = np.random.default_rng(0).integers(0, 257, 300_000).astype(np.uint16)
    for place in (directory, elsewhere):
        write_llmc(place / "tokens.bin", tokens)
        tokens[1 << 16 : -5000] = 5  # neither the sizes nor the ends differ
    flags = ["--data.text", "", "--data.train", "tokens.bin", "--data.val", "tokens.bin"]
    both = start(directory, *flags, "--out", directory / "run", directories=(directory, elsewhere))
    line = error_line(*finish(both))
    assert "error: process 1 on" in line
    assert re.search(
        "the data differs from process 0: tokens.bin has the SHA-256 .* copy the same files to every", line
    )
    assert not list((directory / "run" / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_divergence_ends_both(start, directory):
    both = start(directory, "--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", 0)
    codes, _, errors = finish(both)
    assert codes == [2, 2]
    (line,) = errors[0] + errors[1]
    assert "parameters of norm inf" in line


# --- stalls ----------------------------------------------------------------------------------------------

STALL = ["--steps", 100_000, "--log.stall_seconds", 20, "--log.stall_exit", "true"]

BLOCKED_READ = """
import sys, time
from gpt2_jax.data.pipeline import BatchSource
read = BatchSource.__getitem__
def block(self, update):
    if update == 20 and sys.argv[-1] == "1":
        time.sleep(1000)
    return read(self, update)
BatchSource.__getitem__ = block
from gpt2_jax.train import command
command()
"""


def finish_stalled(processes, stopped=None):
    """Exit codes, and the lines about stalls of both processes."""
    errors = {}
    for number in (0, 1):
        if number != stopped:
            errors[number] = processes[number].communicate(timeout=200)[1]
    if stopped is not None:
        processes[stopped].kill()
        processes[stopped].communicate()
    lines = {i: [line for line in error.splitlines() if line.startswith("stall: ")] for i, error in errors.items()}
    return [process.returncode for process in processes], lines


@pytest.mark.slow
def test_a_read_that_blocks_ends_both_and_is_named(start, directory):
    args = ["--config", "tiny.toml", *STALL]
    codes, lines = finish_stalled(start(directory, *args, command=("-c", BLOCKED_READ)))
    assert codes == [1, 1]
    reported, compared, ending = lines[0]
    assert re.match("stall: process 0 on .*: no progress for 20 s after update .*, waiting for the device;", reported)
    assert re.match(
        r"stall: process 1 on \S+: reading a batch of training data after update \d+; "
        r"process 0 on \S+: waiting for the device after update \d+$",
        compared,
    )
    assert "ending the run with exit code 1; start all processes again with the same command" in ending
    assert re.match("stall: process 1 on .*: no progress for 20 s after .*, reading a batch", lines[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_stopped_is_named_by_the_other(start, directory, victim):
    patient = ("--heartbeat-timeout", 100)  # as by default: JAX ends a process that misses another one for so long
    both = start(directory, *STALL, process_args=(patient, patient))
    wait_for(lambda: 6 in rows(directory / "run", "loss"), both)
    both[victim].send_signal(signal.SIGSTOP)
    codes, lines = finish_stalled(both, stopped=victim)
    assert codes[1 - victim] == 1
    named = lines[1 - victim][1]
    assert re.match(r"stall: process 1 on \S+: no report: st" if victim else "stall: process 0 does not answer", named)
