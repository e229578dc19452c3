"""Trainers that can be compared: each in a process of its own (bench/sides.py), which does updates when told to.

    with Trainer("ours", flags) as ours, Trainer("nanogpt", flags, nanogpt=DIR, compile=True) as theirs:
        ours.run(10)["seconds"], theirs.run(10)["seconds"]

So each has its own memory, threads and settings, is started, compiled and warmed up once, and only one works at a time,
as often as one likes. Parent and process speak JSON, a line each way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import python_path

SIDES = Path(__file__).with_name("sides.py")
OUT_OF_MEMORY = "out of memory"  # the error of a side that has too little


class TrainerError(Exception):
    """A trainer could not do what it was told; the text says why, `OUT_OF_MEMORY` if it was that.

    Args:
        trainer: its name.
    """

    def __init__(self, reason: str, trainer: str) -> None:
        super().__init__(reason)
        self.trainer = trainer


class Trainer:
    """A process that trains; it has done its first update when this returns. Close it, or use it in a `with`.

    Args:
        side: "ours", "transformers" or "nanogpt".
        flags: of a training config, with --config.
        compile: whether torch compiles the model.
        nanogpt: directory of the checkout.
        environment: what is set beside this process's own.

    Attributes:
        about: `device`, `parameters`, `build_s`, `first_update_s` (with compilation), `tokens` per update, and of ours
            `flops_per_token` and `peak_flops` (None where it is unknown).

    Raises:
        TrainerError: it could not start.
    """

    def __init__(
        self,
        side: str,
        flags: Sequence[str],
        *,
        compile: bool = False,
        nanogpt: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = side + (" compiled" if compile else "")
        settings = {"side": side, "flags": list(flags), "compile": compile, "nanogpt": nanogpt}
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # Several share the card: none may take it all.
        ours = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": python_path()}
        self._process = subprocess.Popen(
            [sys.executable, str(SIDES), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **ours, **(environment or {})},
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def run(self, updates: int) -> dict[str, Any]:
        """Does so many updates: `seconds` for all of them, `loss` of the last, `peak_bytes` so far."""
        return self._ask(updates=updates)

    def program(self) -> dict[str, int]:
        """Of ours: how many instructions of some kinds the compiled update has, and its temporary bytes."""
        return self._ask(program=True)

    def digest(self) -> str:
        """Of ours: a hash of all parameters."""
        return str(self._ask(digest=True)["digest"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer will say why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = "\n".join(self._errors.read().splitlines()[-10:])
            # Linux kills what takes more memory than there is.
            raise TrainerError(OUT_OF_MEMORY if code == -9 else f"exit code {code}: {last}", self.name)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TrainerError(answer["error"], self.name)
        return answer


def updates_for(trainer: Trainer, seconds: float, least: int) -> int:
    """How many updates of a trainer take so long, after one that warms it up; no fewer than `least`."""
    trainer.run(1)
    count = 1
    while (took := trainer.run(count)["seconds"]) < seconds / 10 and count < least:
        count *= 2
    return max(least, math.ceil(seconds * count / took))


def alternate(trainers: Sequence[Trainer], blocks: Sequence[int], repeat: int) -> dict[str, list[float]]:
    """Seconds per update of each trainer in each repetition; they take turns, A B A B, after a turn to warm up.

    Args:
        blocks: how many updates each does in a repetition.
    """
    runs: dict[str, list[float]] = {trainer.name: [] for trainer in trainers}
    for repetition in range(repeat + 1):
        for trainer, updates in zip(trainers, blocks, strict=True):
            seconds = trainer.run(updates)["seconds"] / updates
            if repetition:
                runs[trainer.name].append(seconds)
    return runs


def median_time(runs: Mapping[str, Sequence[float]], name: str) -> float:
    """The median of a trainer's seconds per update."""
    return statistics.median(runs[name])
