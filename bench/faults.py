"""Kills, signals, damaged checkpoints, full disks and long runs: what is lost, and what the protection costs.

    python bench/faults.py [--pieces kills signals damages storage commands processes …]

Real processes of `python -m gpt2_jax.train` train a tiny model on real files: accumulation, a batch ramp, evaluations
and saves. Each is compared with an undisturbed run by the fingerprint of the final state and by all rows without their
speeds. A piece that is done is kept in the file, so the command resumes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import fault_overhead
from fault_disks import commands, storage
from fault_runs import TIMEOUT, Runs, ended, outcome, rows_of, undisturbed_run, wait_for
from record import Figures, Rows, arguments, circumstances, write

from gpt2_jax import runtime
from gpt2_jax.checkpoint_info import complete_checkpoints


def kills(runs: Runs, repeat: int) -> Figures:
    """SIGKILL at random moments of one run, until it has been killed `repeat` times; then it runs to its end."""
    rng, out, starting = random.Random(0), runs.directory / "killed", 0
    undisturbed = undisturbed_run(runs)
    for _ in range(repeat):
        process = runs.start(out)
        done = max((row["step"] for row in rows_of(out)), default=0)
        if rng.random() < 0.3:  # imports, restoring, compilation
            starting += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.0, 3.0))
        else:
            wait_for(process, out, done + rng.randint(1, 6), rng.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
    code, output = runs.finish(out)
    equal = (outcome(out)[0] == undisturbed[0], outcome(out)[1] == undisturbed[1])
    return {"kills": repeat, "while_starting": starting, "exit_code": code, "tracebacks": output.count("Traceback"),
            "state_equal": equal[0], "rows_equal": equal[1]}  # fmt: skip


def signals(runs: Runs, repeat: int) -> Figures:
    """SIGTERM and SIGINT at random moments of whole runs, summary included; the same command then ends the run."""
    undisturbed, figures = undisturbed_run(runs), {}
    start = time.monotonic()
    runs.finish(runs.directory / "timed")
    length = time.monotonic() - start
    for name in ("SIGTERM", "SIGINT"):
        rng, codes = random.Random(name), collections.Counter[str]()
        equal = tracebacks = 0
        for number in range(repeat):
            out = runs.directory / f"{name}-{number}"
            process = runs.start(out)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.0, 1.1 * length))
            process.send_signal(getattr(signal, name))
            output, _ = process.communicate(timeout=TIMEOUT)
            codes[str(process.returncode)] += 1
            code, after = runs.finish(out)
            tracebacks += "Traceback" in output + after
            equal += code == 0 and outcome(out) == undisturbed
            shutil.rmtree(out)
        figures[name] = {"sent": repeat, "exit_codes": dict(codes), "tracebacks": tracebacks, "equal": equal}
    return figures


class Worker:
    """A process that runs one training command after another: most of a command's time is its start.

    It is started anew after a crash or a hang.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.process: subprocess.Popen[str] | None = None

    def finish(self, out: Path, *flags: str) -> tuple[int | None, str]:
        """As `Runs.finish`."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin
        assert stdout
        stdin.write(json.dumps([*self.runs.flags(out), *flags]) + "\n")
        stdin.flush()
        timer = threading.Timer(TIMEOUT, self.process.kill)
        timer.start()
        line = stdout.readline()
        timer.cancel()
        if line:
            code, output = json.loads(line)
            return code, output
        return (None, "") if self.process.wait() == -signal.SIGKILL else (1, "Traceback: the process died")


def work() -> None:
    """Runs the commands of standard input, each a JSON list of flags, and prints exit code and output of each."""
    from gpt2_jax import train
    from gpt2_jax.cli import silence_third_parties
    from gpt2_jax.errors import UserError

    silence_third_parties()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output:
            os.dup2(output.fileno(), 1)  # also what libraries print
            os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            try:
                code = train.main(json.loads(line))
            except UserError as error:
                print(f"error: {error}")
                code = 2
            except Exception:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            output.seek(0)
            answers.write(json.dumps([code, output.read()]) + "\n")
            answers.flush()


def damages(runs: Runs, repeat: int) -> Figures:
    """One damage at a time to a random file of a random checkpoint of the last three; then the run resumes."""
    whole, base = runs.directory / "whole", runs.directory / "base"
    flags = ("--steps", "40", "--checkpoint.every", "10", "--optimizer.decay_steps", "40")
    runs.finish(whole, *flags)
    expected = outcome(whole)
    shutil.copytree(whole, base)
    shutil.rmtree(base / "checkpoints" / "40")
    files = sorted(path.relative_to(base) for path in (base / "checkpoints").rglob("*") if path.is_file())
    kinds = {"flipped bit": flip, "truncated": truncate, "zeros": zeros, "deleted": delete, "swapped": swap}
    cases = list(itertools.islice(itertools.cycle(kinds), repeat))

    def one(worker: Worker, number: int) -> tuple[str, str, str]:
        rng, out, kind = random.Random(number), runs.directory / f"damaged-{number}", cases[number]
        shutil.copytree(base, out)
        file = rng.choice(files)
        kinds[kind](out / file, rng)
        code, output = worker.finish(out, *flags)
        problem = [line for line in output.splitlines() if line.startswith("error: ")]
        if code is None:
            result = "hang"
        elif "Traceback" in output or code not in (0, 2):
            result = "traceback"
        elif code == 2:
            result = "refused" if len(problem) == 1 else "traceback"
        elif outcome(out) != expected:
            result = "silently wrong"
        else:
            result = "an older one used" if "is damaged" in output else "harmless"
        shutil.rmtree(out)
        return kind, result, str(file)

    def share(first: int) -> list[tuple[str, str, str]]:
        worker = Worker(runs)
        return [one(worker, number) for number in range(first, repeat, n_workers)]

    n_workers = len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(n_workers) as pool:
        results = [result for results in pool.map(share, range(n_workers)) for result in results]
    bad = [result for result in results if result[1] in ("hang", "traceback", "silently wrong")]
    table = {kind: dict(collections.Counter(result for name, result, _ in results if name == kind)) for kind in kinds}
    return {"damages": repeat, "all": dict(collections.Counter(result for _, result, _ in results)), "by_kind": table,
            "bad": bad}  # fmt: skip


def flip(path: Path, rng: random.Random) -> None:
    """Flips a random bit."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    """Cuts the file at a random place."""
    os.truncate(path, rng.randrange(max(path.stat().st_size, 1)))


def zeros(path: Path, rng: random.Random) -> None:
    """Zeros of the same length."""
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, rng: random.Random) -> None:
    """Deletes the file."""
    path.unlink()


def swap(path: Path, rng: random.Random) -> None:
    """Swaps the file with another one of the checkpoints, of the same name in another one if there is one."""
    root = path.parents[[parent.name for parent in path.parents].index("checkpoints")]
    others = [other for other in sorted(root.rglob("*")) if other.is_file() and other != path]
    other = rng.choice([other for other in others if other.name == path.name] or others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def processes(runs: Runs, repeat: int) -> Figures:
    """Two processes of one run; either is killed, or stopped and then killed, at random moments, `repeat` times.

    The other one has to end by itself. Then both start again, and in the end with the same two, with one process on as
    many devices, and undisturbed.
    """
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--micro_batch_size", "1", "--checkpoint.every", "10",
            "--batch_size", "8", "--batch_ramp", "1280", "4")  # fmt: skip

    def start(out: Path) -> list[subprocess.Popen[str]]:
        several = ("--coordinator", f"localhost:{free_port()}", "--processes", "2", "--heartbeat-timeout", "10")
        return [runs.start(out, *mesh, *several, "--process", str(number), devices=2) for number in (0, 1)]

    def finish(out: Path) -> list[tuple[int | None, str]]:
        both = start(out)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # both pipes have to be read
            return list(pool.map(ended, both))

    rng, out, alone, events = random.Random(0), runs.directory / "two", runs.directory / "one", []
    for code, output in finish(runs.directory / "whole"):
        if code:
            raise SystemExit(f"a process that nobody disturbed failed:\n{output[-2000:]}")
    expected = outcome(runs.directory / "whole")
    for number in range(repeat):
        both, victim, stopped = start(out), number % 2, number // 2 % 2
        done = max((row["step"] for row in rows_of(out)), default=0)
        wait_for(both[0], out, done + rng.randint(1, 15), rng.uniform(0.0, 0.3))
        both[victim].send_signal(signal.SIGSTOP if stopped else signal.SIGKILL)
        began = time.monotonic()
        code, output = ended(both[1 - victim])
        event = {"victim": victim, "stopped": bool(stopped), "code": code, "seconds": time.monotonic() - began,
                 "error_lines": sum(line.startswith("error: ") for line in output.splitlines())}  # fmt: skip
        events.append(event)
        both[victim].kill()
        both[victim].communicate()
    steps = [path.name for path in complete_checkpoints(out / "checkpoints")]
    shutil.copytree(out, alone)
    codes = [code for code, _ in finish(out)]
    equal = outcome(out) == expected
    code, _ = ended(runs.start(alone, *mesh, devices=4))
    state, rows = outcome(alone)
    losses = zip(*([row["loss"] for row in some if "loss" in row] for some in (rows, expected[1])), strict=True)
    return {
        "events": events,
        "exit_codes": codes,
        "equal": equal,
        "one_process": {
            "resumed_after": int(steps[-1]),
            "exit_code": code,
            "state_equal": state == expected[0],
            "largest_difference_of_a_loss": max(abs(a - b) / b for a, b in losses),
        },
    }


def soak(runs: Runs, repeat: int) -> Figures:
    """Memory, open files and threads of a run of 5,000 updates with 50 evaluations and saves, from update 500 on."""
    out, samples = runs.directory / "soak", []
    process = runs.start(out, "--steps", "5000", "--checkpoint.every", "100", "--eval.every", "100")
    for step in (500, 1600, 2700, 3800, 4900):
        wait_for(process, out, step, 0.0)
        proc = Path("/proc") / str(process.pid)
        resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files, threads = len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))
        samples.append({"update": step, "resident_mb": resident / 2**20, "open_files": files, "threads": threads})
    process.communicate(timeout=TIMEOUT)
    return {"samples": samples, "growth_mb": samples[-1]["resident_mb"] - samples[0]["resident_mb"]}


def overhead(runs: Runs, repeat: int) -> Figures:
    """The cost in an update, of `repeat` × 100 pairs of updates for the quickstart, and `repeat` × 10 for 124M."""
    runtime.use_single_malloc_arena()
    return fault_overhead.overhead({"quickstart": 100 * repeat, "124M": 10 * repeat})


def rows(figures: Figures) -> Rows:
    """One line for each piece that was measured."""
    results: Rows = {}
    if case := figures.get("kills"):
        equal = case["state_equal"] and case["rows_equal"]
        results["SIGKILLs survived"] = (
            case["kills"] if equal else 0,
            f"{case['while_starting']} of them while the run started; final state and rows "
            + ("equal those of the undisturbed run" if equal else "differ"),
        )
    for name, case in figures.get("signals", {}).items():
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(case["exit_codes"].items()))
        results[f"{name}s survived"] = case["equal"], f"of {case['sent']}; exit codes {codes}"
    if case := figures.get("damages"):
        results["damages that were silently wrong"] = (
            case["all"].get("silently wrong", 0),
            f"of {case['damages']}: " + ", ".join(f"{key} {count}" for key, count in sorted(case["all"].items())),
        )
    for name, case in (figures.get("storage", {}) | figures.get("commands", {})).items():
        if isinstance(case, dict):
            after = "ends with the undisturbed state" if case["equal"] else f"has exit code {case['after_it']}"
            details = f"exit code {case['exit_code']}, {case['tracebacks']} tracebacks; the same command then {after}"
            results[f"storage: {name}"] = float(case["equal"]), details
    if case := figures.get("processes"):
        count, one = len(case["events"]), case["one_process"]
        lines, slowest = (max(event[key] for event in case["events"]) for key in ("error_lines", "seconds"))
        results["kills and stops of either of two processes survived"] = (
            count if case["equal"] else 0,
            f"the other ends within {slowest:.0f} s and with at most {lines} error line; state and rows "
            + ("equal those of the undisturbed run" if case["equal"] else "differ"),
        )
        results["largest difference of a loss if one process goes on"] = (
            one["largest_difference_of_a_loss"],
            f"relative, with the same mesh from update {one['resumed_after']} on; the state "
            + ("equal" if one["state_equal"] else "differs by rounding"),
        )
    if case := figures.get("soak"):
        columns = {key: [sample[key] for sample in case["samples"]] for key in case["samples"][0]}
        details = ", ".join(f"{megabytes:.0f}" for megabytes in columns["resident_mb"])
        results["MB of memory that 4,400 updates add"] = (
            case["growth_mb"],
            f"in use at updates {', '.join(map(str, columns['update']))}: {details}; open files "
            f"{columns['open_files']}, threads {columns['threads']}",
        )
    for name, case in figures.get("overhead", {}).items():
        results[f"percent of an update for the protection, {name}"] = fault_overhead.describe(case)
    return results


def main() -> None:
    """Runs the pieces that are not done yet, and writes the file after each."""
    pieces: dict[str, tuple[Callable[..., Figures], int]] = {
        "kills": (kills, 50), "signals": (signals, 20), "damages": (damages, 400), "storage": (storage, 1),
        "commands": (commands, 1), "processes": (processes, 10), "soak": (soak, 1), "overhead": (overhead, 50),
    }  # fmt: skip
    parser = arguments(__doc__, repeat=0)
    parser.add_argument("--pieces", nargs="+", choices=pieces, default=list(pieces), metavar="PIECE")
    parser.add_argument("--again", action="store_true", help="also those that are done")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return
    path = args.results / "faults-cpu.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    figures = {key: known[key] for key in (*pieces, "measured") if key in known}
    figures.setdefault("measured", {})
    for piece in args.pieces:
        if piece in figures and not args.again:
            continue
        function, default = pieces[piece]
        with tempfile.TemporaryDirectory() as directory:
            figures[piece] = function(Runs(Path(directory)), args.repeat or default)
        now = circumstances("cpu")
        figures["measured"][piece] = {key: now[key] for key in ("date", "commit", "uncommitted")}
        undisturbed_run.cache_clear()
        write("faults", figures, rows(figures), args.results, "cpu")


if __name__ == "__main__":
    main()
