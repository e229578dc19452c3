"""What a run shows on a terminal, its rows, its times and its plot add to an update of the quickstart, in one process.

    python bench/display.py [--repeat PAIRS]

Each is timed alone: the work for an update and a redraw of the bar in seconds of a core, which is an upper bound where
a core is idle, and the plot in seconds, because training waits for it. Turns of updates with and without all but the
plot, one after the other, are a check.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import Figures, Rows, arguments, mean_and_interval, write

from gpt2_jax import runtime
from gpt2_jax.config import MeshConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.display import REFRESHES
from gpt2_jax.model import GPT2, n_params
from gpt2_jax.run.goodput import FILE, TRAINING, Clock
from gpt2_jax.run.reporting import Reporter
from gpt2_jax.sharding import make_mesh
from gpt2_jax.step import Metrics, init_state, make_train_step

SIZE = (24, 80)  # lines and columns of the terminal
UPDATES = 50  # in a turn, about four redraws
FLAGS = ("--config", "quickstart", "--steps", "1000000", "--optimizer.decay_steps", "1000000", "--model.vocab_size",
         "257")  # fmt: skip
PLOTS = 5
REPEAT = 2000  # of what takes less than a millisecond


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Standard output is a terminal, whose other end another process reads and throws away."""
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, SIZE)
    os.environ |= {"TERM": "xterm-256color", "LINES": str(SIZE[0]), "COLUMNS": str(SIZE[1])}
    os.environ.pop("CI", None)
    shown = subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with open(writer, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            yield
    finally:
        os.close(reader)
        shown.kill()
        shown.wait()


class Run:
    """The updates of a run on one batch.

    Args:
        out: the run directory.
    """

    def __init__(self, out: Path) -> None:
        self.config = parse_args("bench", "", FLAGS)
        model = GPT2(self.config.model.unrolled())
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        shape = 1, self.config.batch_size, model.config.block_size + 1
        self._tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, shape), jnp.int32)
        self._state = init_state(model, self.config.optimizer, mesh, 0)
        self._program = (
            make_train_step(model, self.config.optimizer, mesh, 0).lower(self._state, self._tokens).compile()
        )
        runtime.keep_freed_memory(self._program)
        self.step = 0
        self.clock = Clock(time.time(), out / FILE)
        checkpoints: Any = SimpleNamespace(newest=0, check_saved=lambda: None)
        size = n_params(self._state.params, model.config)
        tokens = self.config.batch_size * model.config.block_size
        self.reporter = Reporter(out, self.config, mesh, size, checkpoints, lambda step: tokens * step, 0)

    def _update(self) -> tuple[int, Metrics]:
        self._state, metrics = self._program(self._state, self._tokens)
        self.step += 1
        return self.step, metrics

    def without(self) -> float:
        """The seconds of a turn that fetches the metrics, to find a run that diverged, and does nothing else."""
        start = time.perf_counter()
        _, pending = self._update()
        for _ in range(UPDATES - 1):
            _, metrics = self._update()
            jax.device_get(pending)
            pending = metrics
        jax.device_get(pending)
        return time.perf_counter() - start

    def with_reports(self) -> float:
        """The seconds of a turn as `train` has them."""
        with self.reporter.display:
            start = time.perf_counter()
            pending = None
            for _ in range(UPDATES):
                self.clock.waited_for_data(time.perf_counter())
                updated = self._update()
                self.clock.dispatched(updated[1].loss)
                self.reporter.update(pending)
                self.clock.record(self.step, now=False)
                pending = updated
            self.reporter.catch_up(pending)
            return time.perf_counter() - start

    def seconds_of_work(self) -> float:
        """The seconds of a core for an update besides the update and its metrics, over all threads."""
        _, metrics = jax.block_until_ready(self._update())
        start = time.process_time()
        for _ in range(REPEAT):
            jax.device_get(metrics)
        fetching, start = time.process_time() - start, time.process_time()
        for _ in range(REPEAT):
            self.step += 1
            self.clock.waited_for_data(time.perf_counter())
            self.clock.dispatched(metrics.loss)
            self.reporter.update((self.step, metrics))
            self.clock.record(self.step, now=False)
        return (time.process_time() - start - fetching) / REPEAT

    def seconds_of_redraw(self) -> float:
        """The seconds of a core for a redraw."""
        bar = self.reporter.display._bar
        assert bar
        start = time.thread_time()
        for _ in range(REPEAT):
            bar.refresh()
        return (time.thread_time() - start) / REPEAT

    def seconds_of_plot(self) -> float:
        """The seconds of the row and the plot at an evaluation."""
        start = time.perf_counter()
        self.reporter.evaluated(self.step, {"val_loss": 1.0}, "00000000")
        return time.perf_counter() - start


def measure(pairs: int) -> Figures:
    """The shares of an update, and so many pairs of turns."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as out, terminal():
        run = Run(Path(out))
        turns = {"without": run.without, "with": run.with_reports}
        with run.clock:
            run.clock.resume(0)
            run.clock.enter(TRAINING)
            for turn in turns.values():
                turn()
            for pair in range(pairs):
                for name in turns if pair % 2 else reversed(turns):
                    seconds[name].append(turns[name]())
            with run.reporter.display:
                work, redraw = run.seconds_of_work(), run.seconds_of_redraw()
            plot = statistics.median(run.seconds_of_plot() for _ in range(PLOTS))
    ratio, interval = mean_and_interval([*(np.log(seconds["with"]) - np.log(seconds["without"]))])
    update = statistics.median(seconds["without"]) / UPDATES
    return {
        "pairs": pairs,
        "updates_in_a_turn": UPDATES,
        "milliseconds_of_turns": {name: [round(1000 * value, 1) for value in all_] for name, all_ in seconds.items()},
        "turns_with_over_without": math.exp(ratio),
        "interval_95": [*map(math.exp, interval)],
        "update_seconds": update,
        "seconds": {"work": work, "redraw": redraw, "plot": plot},
        "share": {"work": work / update, "redraws": REFRESHES * redraw, "plot": plot / update / run.config.eval.every},
        "rows_in_the_plot": run.step // run.config.log.every,
    }


def rows(figures: Figures) -> Rows:
    """The share of an update in all, and the details."""
    shares = {name: 100 * share for name, share in figures["share"].items()}
    plot = f"{1000 * figures['seconds']['plot']:.0f} ms, {figures['rows_in_the_plot']:,} rows"
    low, high = figures["interval_95"]
    details = (
        f"rows and times {shares['work']:.2f}% of a core, {REFRESHES} redraws a second {shares['redraws']:.2f}%, "
        f"the plot at each evaluation {shares['plot']:.2f}% ({plot}); {figures['pairs']} pairs of turns of "
        f"{figures['updates_in_a_turn']} updates with and without all but the plot: "
        f"{figures['turns_with_over_without']:.4f} of the time, 95% interval {low:.4f} to {high:.4f}; an update takes "
        f"{1000 * figures['update_seconds']:.1f} ms"
    )
    return {"share of an update": (math.fsum(figures["share"].values()), details)}


def main() -> None:
    """Measures, and writes display-cpu.json."""
    args = arguments(__doc__, repeat=100).parse_args()
    runtime.use_single_malloc_arena()
    figures = measure(args.repeat)
    write("display", figures, rows(figures), args.results, "cpu")


if __name__ == "__main__":
    main()
