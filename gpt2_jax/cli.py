"""Runs a command: sets up the process, and ends with an exit code and at most one line about an error."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from gpt2_jax.errors import UserError, fixable, strip_controls

STARTED = time.time()  # of a command: the package imports this module first
RETRY_SECONDS = 0.5  # until a lost Ctrl-C is raised again


def run_command(main: Callable[[list[str]], int]) -> None:
    """Runs a command's `main` on `sys.argv`, then exits.

    The exit code is that of `main`; 2 after a `UserError`, which is printed in one line, and for `fixable` errors; 130
    after Ctrl-C; 141 if the reader of stdout has closed it.
    """
    gc.freeze()  # Imported modules stay alive: scanning them in every collection took a tenth of the start.
    silence_third_parties()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print "?" on a terminal without UTF-8, instead of a traceback
            stream.reconfigure(errors="replace")
    interrupts: list[int] = []
    try:
        if sys.stdout is None:
            raise UserError("standard output is closed; to run without it, type > /dev/null")
        with _interruptible(interrupts):
            code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    except UserError as error:
        code = _report("error: " + str(error).replace("\n", " "), 2)
    except Exception as error:
        if interrupts:  # a library caught the interrupt, and raised an error of its own
            code = _report("interrupted", 130)
        elif isinstance(error, BrokenPipeError):
            code = 141
        elif line := fixable(error):
            code = _report(f"error: {line}", 2)
        else:
            raise
    if (failed := _drop_unless_writable(sys.stdout)) and not code:  # a full disk may show only now
        code = 141 if isinstance(failed, BrokenPipeError) else _report(f"error: {fixable(failed) or failed}", 2)
    _drop_unless_writable(sys.stderr)
    if interrupts and code == 130 and "jax" in sys.modules:  # its threads may still compile, and crash at the shutdown
        os._exit(code)
    sys.exit(code)


def _report(line: str, code: int) -> int:
    warn(line)
    return code


def warn(line: str) -> None:
    """Prints a line to standard error, which may be closed."""
    with suppress(OSError):
        print(strip_controls(line), file=sys.stderr or open(os.devnull, "w"), flush=True)  # noqa: SIM115


def _drop_unless_writable(stream: TextIO | None) -> OSError | None:
    """Flushes a stream. If that fails, later writes to it go nowhere, also the one at the exit of the process."""
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        assert stream is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


# --- Ctrl-C --------------------------------------------------------------------------------------------


def end_imports_at_once() -> None:
    """Lets Ctrl-C end a command that still imports its libraries: without a traceback, with exit code 130.

    The package calls it first. It does nothing in programs of others that import the package.
    """
    words = iter(sys.orig_argv)
    is_module = any(word == "-m" and next(words, "").startswith("gpt2_jax.") for word in words)
    is_script = os.path.basename((sys.argv or [""])[0]).startswith("gpt2-")
    if (is_module or is_script) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)


def _exit_at_once(number: int, frame: Any) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


@contextmanager
def _interruptible(interrupts: list[int]) -> Iterator[None]:
    """Raises KeyboardInterrupt at Ctrl-C, and again while it is lost.

    Python prints an exception in a callback of the garbage collector or in `__del__`, and continues. JAX has such a
    callback, which ran in much of the start: 2 of 16 interrupts were lost. JAX also traces within bare `except:`.

    Args:
        interrupts: receives the number of each signal.
    """
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if before is signal.SIG_IGN:  # in the background of a script
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        interrupts.append(number)
        if sys.platform != "win32":  # has no timer
            signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS, RETRY_SECONDS)
        raise KeyboardInterrupt

    def retry(number: int, frame: Any) -> None:
        error = sys.exc_info()[1]  # of the code that the signal interrupts: set while it cleans up
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__context__
        if error is None:
            raise KeyboardInterrupt

    def hide(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            hook(lost)

    signal.signal(signal.SIGINT, interrupt)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, retry)
    sys.unraisablehook = hide
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook


def silence_third_parties() -> None:
    """Silences log lines that repeat what a command prints itself. Only commands call this, never the Python API.

    Orbax logs every phase of a save through absl, and also the errors that it raises. It raises the first error of a
    save, asyncio logs the others, and Python warns of what never ran. huggingface_hub logs warnings that our one-line
    errors repeat. matplotlib warns where it cannot write a cache of fonts, as with a read-only home.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when huggingface_hub is imported
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
