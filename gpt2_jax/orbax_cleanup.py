"""Ends what Orbax leaves running after a save or a restore that failed.

Orbax runs each save and restore in an event loop and threads of its own. After an error, some of them would print
tracebacks, and others would delay the exit of the process by ten minutes. Importing this file replaces how Orbax runs
its coroutines, by `_run` below.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

import jax

try:  # Not public. Without them, a failed save or restore is as right, but prints tracebacks and delays the exit.
    from orbax.checkpoint._src import asyncio_utils
    from orbax.checkpoint._src.futures import future
except ImportError:
    asyncio_utils = future = None

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that ignores what other threads hand over after it was closed."""

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            return asyncio.Handle(callback, args, self)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, and cancels the tasks that it leaves behind.

    Orbax reads or writes all arrays at once, and forgets the others at the first error. Each of them would then print a
    traceback: its task, and TensorStore where it cannot cancel.
    """
    loop = _Loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(coroutine)
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        asyncio.set_event_loop(None)
        loop.close()


if hasattr(asyncio_utils, "_run_sync_via_new_loop"):
    asyncio_utils._run_sync_via_new_loop = _run


@contextmanager
def ending_threads() -> Iterator[None]:
    """Ends the threads of a save that fails.

    They wait for a directory that is never made, ten minutes long, with a copy of the state. Python's exit waits for
    them. (Several processes skip Python's exit after an error.)
    """
    try:
        yield
    except BaseException:
        kind = getattr(future, "_SignalingThread", None)
        if kind and jax.process_count() == 1:
            for thread in threading.enumerate():
                if isinstance(thread, kind):
                    waiting: Any = thread
                    waiting.cancel()
                    # It looks whether it was cancelled only after it has received what it waits for.
                    future.set_signals(waiting._receive_signals, operation_id=waiting._operation_id)
        raise
