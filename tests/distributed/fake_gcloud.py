#!/usr/bin/env python3
"""A fake `gcloud` for tests: records its calls, replays states, and plays the workers of a TPU.

It uses the directory `$GCLOUD`: `calls.jsonl` receives every command line, `states` has a line for each answer to
`describe` (the last one repeats), `worker-N` are the homes of the workers, and `bin` comes first in their PATH.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["GCLOUD"])


def main(args: list[str]) -> int:
    with (ROOT / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(args) + "\n")
    if "describe" in args:
        return describe(args)
    if args[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
        return on_workers(args, lambda home: ssh(home, flag(args, "command")))
    if args[:4] == ["compute", "tpus", "tpu-vm", "scp"]:
        return on_workers(args, lambda home: scp(Path(args[4]), home / args[5].partition(":")[2]))
    return 0 if args[3] in ("create", "delete") else 1


def flag(args: list[str], name: str) -> str:
    return next(arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}="))


def describe(args: list[str]) -> int:
    states = (ROOT / "states").read_text().split()
    (ROOT / "states").write_text("\n".join(states[1:] or states))
    if states[0] == "ABSENT":  # the message of gcloud 528
        print("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource was not found.", file=sys.stderr)
        return 1
    if states[0] == "FORBIDDEN":
        print("ERROR: (gcloud.compute.tpus.tpu-vm.describe) PERMISSION_DENIED: no permission", file=sys.stderr)
        return 1
    print(states[0])
    return 0


def on_workers(args: list[str], action) -> int:
    homes = sorted(ROOT.glob("worker-*"))
    worker = flag(args, "worker")
    return max(action(home) for home in (homes if worker == "all" else homes[int(worker) : int(worker) + 1]))


def ssh(home: Path, script: str) -> int:
    path = f"{ROOT / 'bin'}:{os.environ['PATH']}"
    environment = {"HOME": str(home), "PATH": path, "HOSTNAME": home.name}
    return subprocess.run(["bash", "-c", script], cwd=home, env=environment, stdin=subprocess.DEVNULL).returncode


def scp(source: Path, target: Path) -> int:
    shutil.copyfile(source, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
