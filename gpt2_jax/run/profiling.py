"""Traces some updates of a run with `jax.profiler`. XProf, TensorBoard and Perfetto open the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from gpt2_jax.errors import one_line
from gpt2_jax.run.operations import read_profile
from gpt2_jax.step import Metrics, TrainState, TrainStep

Update = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]

SUMMARY = "summary.txt"


def parse_updates(text: str) -> range:
    """The updates of `log.profile`, START:COUNT; none for ""."""
    start, count = map(int, text.split(":")) if text else (0, 0)
    return range(start, start + count)


@contextmanager
def traced(
    update: TrainStep, directory: Path, start: int, updates: range, print_line: Callable[[str], object]
) -> Iterator[Update]:
    """Yields `update` so that some updates of the run are traced. For no updates, yields `update` itself.

    The trace ends when the device has finished the last of them, or at the end of the `with` block. Then lines say
    where the time went, and `SUMMARY` in `directory` has them too. Only process 0 traces: the others run the same
    program.

    Args:
        directory: of traces. Each gets a subdirectory named after its time.
        start: updates done before the first call.
        updates: their numbers. Those that were done before are not traced.
        print_line: prints a line about the trace.
    """
    updates = range(max(updates.start, start + 1), updates.stop)
    if not updates:
        yield update
        return
    number, first, program = start, 0, ""

    def traced_update(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        nonlocal number, first, program
        number += 1
        if number == updates.start:
            # In every process, because compilers of several processes may exchange what they measured.
            program = update.lower(*jax.tree.map(_abstract, (state, tokens))).compile().as_text() or ""
            jax.block_until_ready(state)
            if not jax.process_index():
                try:
                    jax.profiler.start_trace(directory)
                    first = number
                except Exception as error:  # the profiler may raise anything; the run continues without a trace
                    print_line(f"profile: the trace cannot be started: {one_line(error)}")
        if not first:
            return update(state, tokens)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, metrics = update(state, tokens)
        if number == updates.stop - 1:
            jax.block_until_ready(state)
            stop()
        return state, metrics

    def stop() -> None:
        nonlocal first
        traced_updates, first = range(first, number + 1), 0
        for line in _write_trace(directory, program, traced_updates):
            print_line(line)

    try:
        yield traced_update
    finally:
        if first:
            stop()


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _write_trace(directory: Path, program: str, updates: range) -> list[str]:
    """Ends and writes the trace. Returns lines about it, which are also written beside it."""
    try:
        jax.profiler.stop_trace()
        text, *table = read_profile(directory, program, len(updates)).lines()
        lines = [f"profile: updates {updates[0]} to {updates[-1]}, {text}", *table]
        (directory / SUMMARY).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    except Exception as error:  # a full disk, a trace of an unknown form: the run continues
        lines = [f"profile: the trace cannot be written or read: {one_line(error)}"]
    return [*lines, f"type xprof --logdir {directory}, or open its .trace.json.gz with https://ui.perfetto.dev"]
