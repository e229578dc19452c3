"""The launch scripts: their commands against the documentation, their effects on fake workers, and bad input."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from gpt2_jax.distributed import cluster

ROOT = Path(__file__).parents[2]
TPU_VM = ROOT / "launch" / "tpu_vm.sh"
TPU = ["my-tpu", "--zone", "us-west4-a"]
V5E = ["--type", "v5litepod-16", "--storage", "none"]

# A fake training on a worker: exits with the code in the file `fate` of its home, or runs until SIGTERM.
TRAINING = """#!/usr/bin/env bash
printf '%s\\n' "$@" > ~/arguments
[ ! -e ~/fate ] || exit "$(cat ~/fate)"
trap 'exit 143' TERM
for _ in {1..600}; do sleep 0.05; done
"""
# The worker's Python, which creates a virtual environment that has the training above as its Python.
PYTHON = """#!/usr/bin/env bash
echo "python3 $*" >> ~/installed
if [ "$2 $3" = "uv venv" ]; then
  mkdir -p .venv/bin && cp "$(dirname "$0")/training" .venv/bin/python && touch .venv/bin/activate
fi
"""
# Fakes of sudo (for mount and apt-get) and gcsfuse, which record their calls; mountpoint below reads the record.
RECORDED = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> ~/mounted
"""
MOUNTPOINT = """#!/usr/bin/env bash
[ -e ~/mounted ]
"""


class Cloud:
    """A fake gcloud and two fake workers, in a directory."""

    def __init__(self, path):
        self.path = path
        (path / "bin").mkdir()
        (path / "gcloud-bin").mkdir()
        (path / "gcloud-bin" / "gcloud").symlink_to(ROOT / "tests" / "distributed" / "fake_gcloud.py")
        programs = {"training": TRAINING, "python3": PYTHON, "mountpoint": MOUNTPOINT}
        for name, text in (programs | dict.fromkeys(("sudo", "gcsfuse"), RECORDED)).items():
            (path / "bin" / name).write_text(text)
            (path / "bin" / name).chmod(0o755)
        self.workers = [path / "worker-0", path / "worker-1"]
        for worker in self.workers:
            worker.mkdir()
        self.be("READY")

    def be(self, *states):
        (self.path / "states").write_text("\n".join(states))

    def __call__(self, *args, seconds=60):
        """Runs `launch/tpu_vm.sh ARGS` and returns the finished process."""
        path = f"{self.path / 'gcloud-bin'}:{os.environ['PATH']}"
        environment = os.environ | {"GCLOUD": str(self.path), "PATH": path, "POLL_SECONDS": "0.1"}
        (self.path / "calls.jsonl").write_text("")
        return subprocess.run(
            [TPU_VM, *map(str, args)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )

    def calls(self):
        """The command lines of gcloud since the last call, without the scripts for the workers."""
        calls = [json.loads(line) for line in (self.path / "calls.jsonl").read_text().splitlines()]
        hidden = ("--command=",)
        return [" ".join(arg for arg in call if not arg.startswith(hidden)) for call in calls]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.be("READY")
    cloud("stop", *TPU)


def test_a_tpu_is_created_set_up_and_used_as_documented(cloud):
    cloud.be("ABSENT", "READY")
    result = cloud("up", *TPU, *V5E, "--", "--config", "gpt2-124m")
    assert result.returncode == 0, result.stderr
    archive = next(call for call in cloud.calls() if " scp " in call).split()[4]
    describe = "compute tpus tpu-vm describe my-tpu --format=value(state) --zone=us-west4-a"
    assert cloud.calls() == [
        describe,
        # https://cloud.google.com/tpu/docs/managing-tpus-tpu-vm, and the runtime version of
        # https://cloud.google.com/tpu/docs/runtimes
        "compute tpus tpu-vm create my-tpu --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16 "
        "--zone=us-west4-a",
        describe,
        # https://cloud.google.com/tpu/docs/jax-pods
        "compute tpus tpu-vm ssh my-tpu --worker=all --zone=us-west4-a",
        # https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/scp
        f"compute tpus tpu-vm scp {archive} my-tpu:gpt2_jax.tar.gz --worker=all --zone=us-west4-a",
        "compute tpus tpu-vm ssh my-tpu --worker=all --zone=us-west4-a",
        "compute tpus tpu-vm ssh my-tpu --worker=all --zone=us-west4-a",
    ]
    assert "delete my-tpu --zone us-west4-a" in result.stderr
    cloud("delete", *TPU)
    assert cloud.calls() == ["compute tpus tpu-vm delete my-tpu --quiet --zone=us-west4-a"]


# https://cloud.google.com/tpu/docs/spot and https://cloud.google.com/tpu/docs/queued-resources
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--type", "v4-32", "--spot"],
            "tpu-vm create my-tpu --version=tpu-ubuntu2204-base --accelerator-type=v4-32 --spot",
        ),
        (
            ["--type", "v6e-16", "--queued", "--spot"],
            "queued-resources create my-tpu --node-id=my-tpu --runtime-version=v2-alpha-tpuv6e "
            "--accelerator-type=v6e-16 --spot",
        ),
        (
            ["--type=v5p-8", "--queued", "--create-flag=--reserved"],
            "queued-resources create my-tpu --node-id=my-tpu --runtime-version=v2-alpha-tpuv5 "
            "--accelerator-type=v5p-8 --reserved",
        ),
        (
            ["--type", "v9-8", "--version", "v9-image"],
            "tpu-vm create my-tpu --version=v9-image --accelerator-type=v9-8",
        ),
    ],
)
def test_every_way_to_ask_for_a_tpu(cloud, flags, line):
    assert cloud("create", *TPU, *flags, "--project", "mine").returncode == 0
    assert cloud.calls() == [f"compute tpus {line} --zone=us-west4-a --project=mine"]


def test_a_preempted_tpu_is_replaced_but_an_invisible_one_is_not(cloud):
    cloud.be("PREEMPTED", "READY")
    assert cloud("resume", *TPU, *V5E, "--spot", "--", "--config", "x").returncode == 0
    calls = [call.split()[2:4] for call in cloud.calls()]
    assert calls[:4] == [["tpu-vm", verb] for verb in ("describe", "delete", "create", "describe")]

    cloud.be("SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    assert cloud("up", *TPU, *V5E, "--queued", "--", "--config", "x").returncode == 0
    calls = [" ".join(call.split()[2:]) for call in cloud.calls()]
    assert calls[0] == "queued-resources describe my-tpu --format=value(state.state) --zone=us-west4-a"
    assert calls[1] == "queued-resources delete my-tpu --force --quiet --zone=us-west4-a"
    assert [call.split()[1] for call in calls[2:6]] == ["create", "describe", "describe", "describe"]

    cloud.be("FORBIDDEN")
    result = cloud("up", *TPU, *V5E, "--", "--config", "x")
    assert result.returncode == 1
    assert "PERMISSION_DENIED" in result.stderr
    assert len(cloud.calls()) == 1


def test_setup_run_status_stop_and_logs_on_two_workers(cloud, tmp_path):
    (tmp_path / "init.sh").write_text("echo 'made here' > init_was_here\n")
    assert cloud("status", *TPU).stdout.splitlines()[1:] == ["worker-0: not set up", "worker-1: not set up"]
    flags = ["--storage", "10.0.0.2:/share", "--init", tmp_path / "init.sh"]
    result = cloud("setup", *TPU, *flags)
    assert result.returncode == 0, result.stderr
    for worker in cloud.workers:
        checkout = worker / "gpt2_jax"
        assert (checkout / "gpt2_jax" / "train.py").read_text() == (ROOT / "gpt2_jax" / "train.py").read_text()
        assert not (checkout / ".git").exists()
        assert (checkout / "init_was_here").exists()
        assert (checkout / "runs").resolve() == worker / "storage" / "runs"
        assert (worker / "mounted").read_text().splitlines() == [
            "sudo apt-get install -qq -y nfs-common",
            f"sudo mount -t nfs 10.0.0.2:/share {worker}/storage",
        ]
        assert "pip install --quiet --python .venv/bin/python -e .[tpu]" in (worker / "installed").read_text()
    assert cloud("status", *TPU).stdout.splitlines()[1:] == ["worker-0: not started", "worker-1: not started"]

    args = ["--config", "gpt2-124m", "--data.train", "it's a/*.bin", "--out", "$HOME"]
    assert cloud("run", *TPU, "--", *args).returncode == 0
    assert cloud("status", *TPU).stdout.splitlines()[1:] == ["worker-0: running", "worker-1: running"]
    assert cloud("run", *TPU, "--", "--config", "other").stdout.count("already running") == 2
    assert cloud("up", *TPU, *flags[:2], "--type", "v4-8", "--", "--config", "other").returncode == 0
    for worker in cloud.workers:
        assert (worker / "arguments").read_text().splitlines() == ["-m", "gpt2_jax.train", *args]

    assert cloud("stop", *TPU).stdout.splitlines() == ["worker-0: stopped", "worker-1: stopped"]
    assert cloud("status", *TPU).stdout.count("ended with exit code 143") == 2
    assert cloud("stop", *TPU).stdout.count("not running") == 2
    cloud("exec", *TPU, "--", "echo hello > said; pwd")
    assert (cloud.workers[1] / "gpt2_jax" / "said").read_text() == "hello\n"


@pytest.mark.slow
def test_a_real_training_on_a_worker_is_stopped_and_resumed(cloud, tmp_path):
    (tmp_path / "bin" / "training").write_text(f'#!/bin/sh\nJAX_PLATFORMS=cpu exec {sys.executable} "$@"\n')
    shutil.rmtree(cloud.workers.pop())
    (worker,) = cloud.workers
    assert cloud("setup", *TPU, "--storage", "none").returncode == 0
    run = ["run", *TPU, "--", "--config", "quickstart", "--steps", "300", "--log.every", "1"]
    assert cloud(*run).returncode == 0
    metrics = worker / "storage" / "runs" / "quickstart" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 20:
        assert "running" in cloud("status", *TPU).stdout, (worker / "training" / "log").read_text()
        time.sleep(0.5)
    assert cloud("stop", *TPU).stdout == "worker-0: stopped\n"
    assert "ended with exit code 143" in cloud("status", *TPU).stdout
    result = cloud("watch", *TPU, *V5E, "--", *run[run.index("--config") :], seconds=300)
    assert result.returncode == 0, result.stderr
    log = (worker / "training" / "log").read_text()
    assert re.search(r"resumed after update \d+", log)
    assert [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row] == list(
        range(1, 301)
    )


@pytest.mark.slow
def test_watch_resumes_until_the_training_has_ended(cloud):
    watch = ["watch", *TPU, *V5E, "--spot", "--", "--config", "x"]
    for worker in cloud.workers:
        (worker / "fate").write_text("0")
    # Preempted once. `up` asks for the state until READY, then `watch` asks.
    cloud.be("ABSENT", "READY", "PREEMPTED", "PREEMPTED", "READY", "READY")
    result = cloud(*watch)
    assert result.returncode == 0, result.stderr
    assert "done; my-tpu costs money" in result.stdout
    assert [call.split()[3] for call in cloud.calls()].count("create") == 2

    (cloud.workers[1] / "fate").write_text("2")
    result = cloud(*watch)
    assert result.returncode == 2
    assert "rejects" in result.stderr.splitlines()[-1]

    (cloud.workers[1] / "fate").write_text("134")
    result = cloud(*watch)
    assert result.returncode == 1
    assert "crashed 3 times" in result.stderr

    cloud.be("READY", "ABSENT")
    result = cloud(*watch)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, "error: somebody deleted my-tpu")


def test_dry_run_prints_the_commands_and_runs_none(cloud):
    args = ["up", *TPU, "--type", "v4-8", "--storage", "gs://mine"]
    result = cloud(*args, "--dry-run", "--", "--config", "x")
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == []
    # Run in a shell, the printed commands make the same calls as `up`, except for those that ask and copy.
    cloud.be("ABSENT", "READY")
    assert cloud(*args, "--", "--config", "x").returncode == 0
    recorded = [json.loads(line) for line in (cloud.path / "calls.jsonl").read_text().splitlines()]
    made = [call for call in recorded if "describe" not in call and "scp" not in call]
    made = [call for call in made if not any("not set up" in arg for arg in call)]
    script = result.stdout.replace(
        "gcloud ", f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "
    )
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [call for call in map(json.loads, printed) if "scp" not in call] == made


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage"),
        (["fly"], "unknown command fly"),
        (["up"], "name"),
        (["up", "My_TPU"], "found 'My_TPU'"),
        (["up", "t"], "--zone"),
        (["up", "t", "--zone", "z"], "--type"),
        (["up", "t", "--zone", "z", "--type"], "--type needs a value"),
        (["create", "t", "--zone", "z", "--type", "v9-8"], "--version"),
        (["up", "t", "--zone", "z", "--type", "v4-8"], "--storage"),
        (["setup", "t", "--zone", "z", "--storage", "here"], "--storage is 'here'"),
        (["setup", "t", "--zone", "z", "--storage", "gs://a;reboot"], "--storage is 'gs://a;reboot'"),
        (["setup", "t", "--zone", "z", "--storage", "none", "--init", "nowhere.sh"], "nowhere.sh does not exist"),
        (["run", "t", "--zone", "z"], "-- --config"),
        (["delete", "t", "--zone", "z", "--force", "yes"], "unknown flag --force"),
        (["delete", "t", "--zone", "z", "--", "x"], "takes no arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cloud, args, message):
    result = cloud(*args)
    assert result.returncode == 2
    assert message in result.stderr
    if args:
        assert len(result.stderr.splitlines()) == 1
    assert not any("create" in call or "ssh" in call for call in cloud.calls())


def lint(command, text=None):
    """Checks that a linter finds nothing."""
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed; pip install -e '.[test]'")
    result = subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(name):
    lint(["shellcheck", ROOT / "launch" / name])


def slurm(*args, **variables):
    """`launch/slurm.sbatch` without SLURM."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | variables
    command = ["bash", ROOT / "launch" / "slurm.sbatch", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_slurm_script_starts_a_process_per_gpu_or_as_many_as_sbatch_says():
    args = ("--dry-run", "--config", "gpt2-124m", "--data.train", "it's a/*.bin")
    words = shlex.split(slurm(*args, SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="8").stdout)
    assert words[:3] == ["srun", "--nodes=2", "--ntasks-per-node=8"]
    assert words[-7:] == ["python", "-m", "gpt2_jax.train", *args[1:]]
    variables = {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "48"}
    words = shlex.split(slurm(*args, **variables).stdout)
    assert {"--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=48"} < set(words)
    assert slurm("--help").stdout.startswith("Trains under SLURM")
    outside = slurm(*args[1:])
    assert (outside.returncode, len(outside.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("name", ["jobset-gpu", "jobset-tpu"])
def test_jobsets_are_valid_and_their_numbers_agree(name):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install -e '.[test]'")
    jobset = yaml.safe_load((ROOT / "launch" / "kubernetes" / f"{name}.yaml").read_text())
    # Parsing checks types and drops unknown fields of a JobSet, a Job or a Pod.
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset

    (train,) = jobset["spec"]["replicatedJobs"]
    job = train["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"]
    assert pod["restartPolicy"] == "Never"  # required by a podFailurePolicy
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"] for mount in container["volumeMounts"]]
    rules = job["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {container["name"]}
    # The message is that of https://github.com/kubernetes/kubernetes/blob/master/pkg/controller/job/pod_failure_policy.go
    message = (
        "Container train for pod default/gpt2-train-0-1-abc failed with exit code {} matching FailJob rule at index 0"
    )
    bad_input, preempted = jobset["spec"]["failurePolicy"]["rules"]
    (pattern,) = bad_input["onJobFailureMessagePatterns"]
    assert [bool(re.search(pattern, message.format(code))) for code in (2, 143, 254)] == [True, False, False]
    assert preempted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    if name == "jobset-tpu":
        chips = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        assert math.prod(map(int, chips)) == job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    else:
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        launch = cluster.detect_cluster(cluster.ClusterFlags(), variables | {"JOB_COMPLETION_INDEX": "1"})
        assert launch.processes == job["completions"]
        # https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2: <jobSet>-<replicatedJob>-<job>-<pod>.<subdomain>
        jobset_name = jobset["metadata"]["name"]
        assert launch.coordinator == f"{jobset_name}-{train['name']}-0-0.{jobset_name}:8476"


def test_the_image_installs_the_requirements_of_its_target():
    dockerfile = ROOT / "launch" / "docker" / "Dockerfile"
    lint(["hadolint", dockerfile])
    (snippet,) = re.findall(r'python -c "(.*?)" >', dockerfile.read_text())
    for target in ("cuda12", "cuda13", "tpu"):
        command = f'python -c "{snippet}"'
        printed = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=os.environ | {"TARGET": target}, capture_output=True, text=True
        )
        requirements = printed.stdout.splitlines()
        assert f"jax[{target}]" in requirements
        assert any(requirement.startswith("orbax-checkpoint") for requirement in requirements)


@pytest.fixture
def sky():
    return yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_finds_nothing_in_skypilots_scripts(sky, part):
    # If a command in an export fails, the training reports the empty variable.
    lint(["shellcheck", "--shell=bash", "--exclude=SC2155", "-"], sky[part])


@pytest.mark.parametrize(("fate", "starts"), [("0", 1), ("2", 1), ("143", 1), ("134", 4)])
def test_skypilot_restarts_after_crashes_only(sky, tmp_path, fate, starts):
    python, nvidia = tmp_path / "gpt2_jax" / "bin" / "python", tmp_path / "bin" / "nvidia-smi"
    for path, text in ((python, f'env > ~/environment; echo "$*" >> ~/starts; exit {fate}'), (nvidia, "")):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    environment = {
        "HOME": str(tmp_path),
        "PATH": f"{nvidia.parent}:{os.environ['PATH']}",
        "ARGS": "--config gpt2-355m",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    code = subprocess.run(["bash", "-c", sky["run"]], env=environment, capture_output=True).returncode
    assert code == int(fate)
    assert (tmp_path / "starts").read_text().splitlines() == ["-m gpt2_jax.train --config gpt2-355m"] * starts
    variables = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    launch = cluster.detect_cluster(cluster.ClusterFlags(), variables)
    assert (launch.processes, launch.coordinator, launch.arguments["process_id"]) == (2, "10.0.0.1:8476", 1)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--config mine.toml --data.train 'it s/*.bin'", ["--config", "mine.toml", "--data.train", "it s/*.bin"]),
        (
            "--data.text * --out \"a b\"/$HOME --data.val ''",
            ["--data.text", "*", "--out", "a b/$HOME", "--data.val", ""],
        ),
        ("--config x\n  --steps 3\n", ["--config", "x", "--steps", "3"]),
        ("--out 'open", None),
    ],
)
def test_skypilot_passes_arguments_as_typed(sky, tmp_path, typed, words):
    python = tmp_path / "gpt2_jax" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" > ~/words\n")
    python.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "ARGS": typed}
    done = subprocess.run(["bash", "-c", sky["run"]], env=environment, cwd=ROOT, capture_output=True, text=True)
    if words is None:
        assert (done.returncode, done.stderr) == (2, f"error: ARGS is {typed}; close its quotes\n")
        return
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text() == "\n".join(["-m", "gpt2_jax.train", *words]) + "\n"


@pytest.mark.slow
def test_skypilot_accepts_its_task(sky):
    task = pytest.importorskip("sky", reason="SkyPilot is not installed; pip install skypilot").Task
    task = task.from_yaml_config(sky | {"envs": sky["envs"] | {"BUCKET": "gs://mine"}})
    assert len(task.resources) == len(sky["resources"]["any_of"])
    assert all(resources.use_spot for resources in task.resources)


class TpuApi(BaseHTTPRequestHandler):
    """A fake of Cloud TPU's REST interface that records requests: no TPU exists, and every operation succeeds."""

    requests: list

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.removeprefix("/v2/projects/mine/locations/us-west4-a/").replace("alt=json&", "")
        self.requests.append((self.command, path, json.loads(body or "{}")))
        answer = {"name": "operation", "done": True}
        if self.command == "GET":
            answer = {"error": {"code": 404, "status": "NOT_FOUND", "message": "Resource was not found"}}
        content = json.dumps(answer).encode()
        self.send_response(404 if self.command == "GET" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_the_real_gcloud_sends_the_documented_requests(tmp_path):
    """gcloud talks to a server of this test, with a fake token.

    Requests: https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes and .queuedResources
    """
    api = type("Api", (TpuApi,), {"requests": []})
    (tmp_path / "token").write_text("none")

    def asked(*args):
        """The first request of a command line. Later ones wait for the operation."""
        api.requests.clear()
        environment = os.environ | {
            "CLOUDSDK_CONFIG": str(tmp_path),
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"),
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{server.server_port}/",
        }
        command = [TPU_VM, args[0], *TPU, "--project", "mine", *args[1:]]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert api.requests, result.stderr
        return result, api.requests[0]

    with ThreadingHTTPServer(("127.0.0.1", 0), api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result, request = asked("status")
        assert (result.stdout, result.returncode) == ("my-tpu is ABSENT\n", 0), result.stderr
        assert request == ("GET", "nodes/my-tpu?alt=json", {})

        _, (verb, path, node) = asked("create", "--type", "v5litepod-16", "--spot")
        assert (verb, path) == ("POST", "nodes?nodeId=my-tpu")
        assert node["acceleratorType"] == "v5litepod-16"
        assert node["runtimeVersion"] == "v2-alpha-tpuv5-lite"
        assert node["schedulingConfig"]["spot"]

        _, (verb, path, queued) = asked("create", "--type", "v5litepod-16", "--spot", "--queued")
        assert (verb, path) == ("POST", "queuedResources?queuedResourceId=my-tpu")
        assert "spot" in queued
        (spec,) = queued["tpu"]["nodeSpec"]
        assert (spec["nodeId"], spec["node"]["acceleratorType"]) == ("my-tpu", "v5litepod-16")

        assert asked("delete")[1][:2] == ("DELETE", "nodes/my-tpu?alt=json")
        assert asked("delete", "--queued")[1][:2] == ("DELETE", "queuedResources/my-tpu?force=True")
        server.shutdown()
