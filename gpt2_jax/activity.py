"""What a thread is doing, in words, and how much of it is done, for another thread that shows it or checks it.

The words come from the stack of the thread, so that the work itself contains no call for them.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import NamedTuple, TypeVar

from gpt2_jax.display import duration, status_line

DEVICE, COMPILING = "waiting for the device", "compiling"
# What a thread is doing while a module, or one function of it, is on its stack. The outermost one counts.
_DOING = {
    "gpt2_jax.convert._convert": "converting the model",
    "gpt2_jax.data.open_data": "reading the data",
    "gpt2_jax.run.fitting": "searching for the largest micro-batch that fits",
    "gpt2_jax.run.initial": "loading the initial model",
    "gpt2_jax.run.evaluating.open_tasks": "reading the examples of the tasks",
    "gpt2_jax.run.evaluating": "evaluating",
    "gpt2_jax.evaluation.results.__init__": "reading the examples of the tasks",
    "gpt2_jax.evaluation.results": "evaluating",
    "gpt2_jax.interop.open_model": "opening the model",
    "gpt2_jax.interop.stored": "loading the model",
    "gpt2_jax.run.checkpoints.restore_or_init": "restoring a checkpoint or creating the initial state",
    "gpt2_jax.run.checkpoints.fingerprint": "comparing the copies of the training state",
    "gpt2_jax.run.checkpoints": "saving a checkpoint",
    "gpt2_jax.checkpoint": "waiting for checkpoints on disk",
    "gpt2_jax.run.directory": "opening the run directory",
    "gpt2_jax.reports.following": "waiting for trackers",
    "gpt2_jax.run.samples": "writing text with the model",
    "gpt2_jax.run.summary": "writing the summary",
    "gpt2_jax.run.reporting": "writing a report to the terminal, metrics.jsonl or loss.png",
    "gpt2_jax.display": "writing to the terminal",
    "gpt2_jax.distributed.agreement": "waiting for another process",
    "grain": "reading a batch of training data",
}
_COMPILERS = {"jax._src.compiler", "jax._src.interpreters.mlir", "jax._src.interpreters.partial_eval"}
# A compiled program has no frame of its own: it is called from one of these.
_CALLS_DEVICE = ("jax", "gpt2_jax.train", "gpt2_jax.step", "gpt2_jax.sharding", "gpt2_jax.run.profiling")


class _Share(NamedTuple):
    """How much of the work of a thread is done.

    Attributes:
        done: the share of it that is finished.
        item: the share of the current item in all of it.
        worker: the code of the function that works. If it is not on the stack, the work was given up.
    """

    done: float
    item: float
    worker: CodeType


_SHARES: dict[int, _Share] = {}  # by the identifier of the thread

Item = TypeVar("Item")


def tracked(items: Iterable[Item], total: float, size: Callable[[Item], float] = lambda item: 1.0) -> Iterator[Item]:
    """Passes items on, and keeps the share of them that the calling thread has finished for `activity_of`.

    Work within an item of other tracked work counts as a part of that item.

    Args:
        items: the work.
        total: the size of all items.
        size: of one item.
    """
    thread, worker = threading.get_ident(), sys._getframe(1)
    outer = _share(thread, worker)
    done, whole = (outer.done, outer.item) if outer else (0.0, 1.0)
    code, share = worker.f_code, None
    del worker  # it holds this generator
    try:
        for item in items:
            part = whole * size(item) / total if total else 0.0
            share = _SHARES[thread] = _Share(min(done, 1.0), part, code)
            yield item
            done += part
    finally:  # after an error this may run late, when the generator is collected
        if _SHARES.get(thread) is share:
            _SHARES.pop(thread, None)
            if outer:
                _SHARES[thread] = outer


def _share(thread: int, frame: FrameType | None) -> _Share | None:
    """The share of the work of a thread, if one of the frames from this one outwards works on it."""
    share = _SHARES.get(thread)
    while frame and share:
        if frame.f_code is share.worker:
            return share
        frame = frame.f_back
    return None


class Activity(NamedTuple):
    """What a thread is doing, in words, and the share of it that is done; None if that is unknown."""

    doing: str
    share: float | None = None

    def __str__(self) -> str:
        return self.doing if self.share is None else f"{self.doing}, {self.share:.0%}"


def activity_of(thread: int) -> Activity:
    """What a thread is doing.

    Args:
        thread: its identifier.
    """
    frame = sys._current_frames().get(thread)
    doing, share = describe(_outwards(frame)), _share(thread, frame)
    return Activity(doing, None if doing == COMPILING or share is None else share.done)


def activity_before(error: BaseException) -> str:
    """What the thread that raised an error was doing, in words."""
    return describe(reversed([frame for frame, _ in traceback.walk_tb(error.__traceback__)]))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame:
        yield frame
        frame = frame.f_back


def describe(frames: Iterable[FrameType]) -> str:
    """What a thread is doing, in words.

    Args:
        frames: its frames, from the innermost outwards.
    """
    places: list[tuple[str, str]] = []  # module and function
    for frame in frames:
        spec = frame.f_globals.get("__spec__")  # knows the name of a module that runs as __main__
        module = spec.name if spec else frame.f_globals.get("__name__", "?")
        places.append((module, frame.f_code.co_name))
    if any(module in _COMPILERS for module, _ in places):
        return COMPILING
    if ("gpt2_jax.data.contents", "_hash") in places:  # within a longer phase
        return "hashing the token files"
    for module, function in reversed(places):
        found = _DOING.get(f"{module}.{function}") or _DOING.get(module) or _DOING.get(module.partition(".")[0])
        if found and module == "gpt2_jax.run.reporting" and any(inner.startswith("jax.") for inner, _ in places):
            return DEVICE  # it fetches the metrics of an update
        if found:
            return found
    module, function = places[0] if places else ("?", "?")
    calls_device = any(module == name or module.startswith(f"{name}.") for name in _CALLS_DEVICE)
    return DEVICE if calls_device else f"in {module}.{function}"


class Stopwatch:
    """What the thread that creates it is doing, and for how long, for another thread that asks now and then."""

    def __init__(self) -> None:
        self._thread, self._doing, self._since = threading.get_ident(), "", time.perf_counter()

    def read(self) -> tuple[Activity, float]:
        """What the thread is doing, and for how many seconds the words have been the same."""
        activity, now = activity_of(self._thread), time.perf_counter()
        if activity.doing != self._doing:
            self._doing, self._since = activity.doing, now
        return activity, now - self._since

    def line(self) -> str:
        """`read` as text; "" if the thread asks itself, as it does where it begins to show the line."""
        if threading.get_ident() == self._thread:
            return ""
        activity, seconds = self.read()
        return f"{activity}, {duration(seconds)}"


def activity_line(quiet: bool = False) -> AbstractContextManager[None]:
    """Shows in a line on a terminal what the calling thread does within the `with` block.

    Args:
        quiet: shows nothing.
    """
    return status_line(Stopwatch().line, quiet)
