"""`launch/slurm.sbatch` in a SLURM cluster of two nodes that runs for these tests only.

It needs Debian's packages slurm-wlm and munge, and no root.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import TINY, final_state, rows, wait_for_update

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("slurmctld"), reason="SLURM is not installed; apt-get install slurm-wlm munge"),
]
SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"

# Two daemons on this machine are two nodes. The alphabetically first of their names has to resolve, because JAX's
# coordinator runs there. A job in the partition `high` makes SLURM requeue those in `low`, which start again after 5 s,
# when their credential has expired.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
SwitchType=switch/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={host}-second NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def slurm():
    """A function that runs a SLURM command and returns what it prints."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True)))
        (root / "state").mkdir()
        (root / "munge.key").write_bytes(os.urandom(1024))
        (root / "munge.key").chmod(0o600)
        config = CONFIG.format(root=root, host=socket.gethostname(), user=getpass.getuser(), ports=free_ports(3))
        (root / "slurm.conf").write_text(config)
        dropped = ("XLA_FLAGS", "SLURM_CONF")
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        environment |= {"SLURM_CONF": str(root / "slurm.conf"), "PYTHONUNBUFFERED": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

        def daemon(*command):
            with (root / "daemons.log").open("a") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        def slurm(*command):
            result = subprocess.run(
                list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60
            )
            assert result.returncode == 0, result.stderr
            return result.stdout

        files = [f"--{name}-file={root}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        daemon("munged", "--foreground", "--force", f"--socket={root}/munge.socket", *files)
        daemon("slurmctld", "-D", "-c")
        daemon("slurmd", "-D", "-N", socket.gethostname())
        daemon("slurmd", "-D", "-N", f"{socket.gethostname()}-second")
        deadline = time.monotonic() + 60
        while (
            "2 idle"
            not in subprocess.run(
                ["sinfo", "-h", "-o", "%D %t", "-p", "low"], env=environment, capture_output=True, text=True
            ).stdout
        ):
            assert time.monotonic() < deadline, (root / "daemons.log").read_text()
            time.sleep(0.5)
        yield slurm
        slurm("scancel", "--full", "--user", getpass.getuser())
        wait_until(lambda: not slurm("squeue", "-h"))


def wait_until(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


class Job:
    """A training, submitted with flags for sbatch from a directory."""

    def __init__(self, slurm, path, flags, args):
        self.slurm, self.log = slurm, path / "job.log"
        flags = [*flags, "--parsable", f"--chdir={path}", f"--output={self.log}"]
        self.id = slurm("sbatch", *flags, SCRIPT, *args).strip()

    def shown(self, key):
        """A field of `scontrol show job`."""
        return re.search(rf"\b{key}=(\S*)", self.slurm("scontrol", "show", "job", self.id)).group(1)

    def wait(self, *states):
        wait_until(lambda: self.shown("JobState") in states)
        return self.log.read_text()


@pytest.fixture
def tiny(tmp_path):
    """The command line of a tiny run without --out, long enough for SLURM's scheduler to interrupt it."""
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "text.txt").write_text("".join(f"{number} squared is {number**2}\n" for number in range(300)))
    return ["--config", tmp_path / "tiny.toml", "--data.text", tmp_path / "text.txt", "--steps", "500"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_preempted_and_requeued_job_equals_the_uninterrupted_one_bit_for_bit(slurm, tiny, tmp_path, nodes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--partition=low", f"--nodes={nodes}", "--ntasks-per-node=1"]
    Job(slurm, tmp_path, flags, [*tiny, "--out", whole]).wait("COMPLETED")

    job = Job(slurm, tmp_path, flags, [*tiny, "--out", parts])
    wait_for_update(parts, 20)
    # SLURM preempts it for a job that needs every processor of both nodes.
    slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
    wait_until(lambda: job.shown("Restarts") == "1")
    wait_until(lambda: job.shown("JobState") == "RUNNING")
    before = max(rows(parts, "loss"))
    wait_for_update(parts, before + 20)
    # The signal that --signal sends before the time limit. It goes to the tasks only, and SLURM does not requeue.
    slurm("scancel", "--signal=TERM", job.id)
    wait_until(lambda: job.shown("Restarts") == "2")
    log = job.wait("COMPLETED")

    assert log.count("the same command resumes it") == 2
    assert log.count("requeued, to resume") == 1  # the first time SLURM itself requeued it
    for key in ("loss", "grad_norm", "val_loss"):
        assert rows(parts, key) == rows(whole, key), key
    assert len(rows(whole, "loss")) == 500
    jax.tree.map(np.testing.assert_array_equal, final_state(parts), final_state(whole))


def test_bad_input_and_cancelled_jobs_are_not_requeued(slurm, tiny, tmp_path):
    job = Job(slurm, tmp_path, [], [*tiny, "--out", tmp_path / "run", "--steps", "many"])
    log = job.wait("FAILED")
    assert (job.shown("Restarts"), job.shown("ExitCode")) == ("0", "2:0")
    assert "not requeued" in log

    job = Job(slurm, tmp_path, [], [*tiny, "--out", tmp_path / "run"])
    wait_for_update(tmp_path / "run", 5)
    slurm("scancel", job.id)
    job.wait("CANCELLED")
    time.sleep(3)
    assert (job.shown("Restarts"), job.shown("JobState")) == ("0", "CANCELLED")


def test_a_crashing_job_is_requeued_up_to_max_restarts(slurm, tiny, tmp_path):
    run = tmp_path / "run"
    job = Job(slurm, tmp_path, ["--export=ALL,MAX_RESTARTS=1"], [*tiny, "--out", run, "--steps", "100000"])
    for restart in range(2):
        wait_until(lambda restart=restart: job.shown("Restarts") == str(restart) and job.shown("JobState") == "RUNNING")
        wait_until(lambda: processes_of(run))
        wait_for_update(run, (max(rows(run, "loss"), default=0)) + 20)
        for process in processes_of(run):
            os.kill(process, signal.SIGKILL)
    log = job.wait("FAILED")
    assert job.shown("ExitCode") == "137:0"
    assert "crashed with exit code 137 after 1 restarts" in log


def processes_of(run):
    """Process ids of the trainings that write a run directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"gpt2_jax.train" in words and str(run).encode() in words and b"python" in words[0]:
                found.append(int(path.parent.name))
    return found
