"""Traces a few updates of a run with `jax.profiler`. XProf and TensorBoard show the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from gpt2_jax.step import Metrics, TrainState

Update = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]

FIRST = 10  # the first traced update of a process: compilation and warmup are over


@contextmanager
def traced(update: Update, directory: Path, start: int, count: int) -> Iterator[Update]:
    """Yields `update` so that its calls number 10 to 9 + `count` are traced. A count of 0 yields `update` itself.

    The trace ends when the device has finished the last of them, or at the end of the `with` block. Only process 0
    traces: the others run the same program.

    Args:
        directory: where traces go; each gets a subdirectory named after its time.
        start: updates done before the first call. The trace names each update by its number in the run.
    """
    if not count or jax.process_index():
        yield update
        return
    calls, tracing = 0, False

    def traced_update(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        nonlocal calls, tracing
        calls += 1
        if calls == FIRST:
            jax.block_until_ready(state)
            jax.profiler.start_trace(directory)
            tracing = True
        if not tracing:
            return update(state, tokens)
        with jax.profiler.StepTraceAnnotation("train", step_num=start + calls):
            state, metrics = update(state, tokens)
        if calls == FIRST + count - 1:
            stop(state)
        return state, metrics

    def stop(state: TrainState | None = None) -> None:
        nonlocal tracing
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        tracing = False

    try:
        yield traced_update
    finally:
        if tracing:
            stop()
