"""Runs a command: sets up the process, and ends with an exit code and at most one line about an error."""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
from collections.abc import Callable

from gpt2_jax.errors import UserError


def run_command(main: Callable[[list[str]], int]) -> None:
    """Runs a command's `main` on `sys.argv`, then exits.

    The exit code is that of `main`; 2 after a `UserError`, which is printed in one line; 130 after Ctrl-C; 141 if the
    reader of stdout has closed it.
    """
    gc.freeze()  # Imported modules stay alive: scanning them in every collection took a tenth of the start.
    silence_third_parties()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print "?" on a terminal without UTF-8, instead of a traceback
            stream.reconfigure(errors="replace")
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the flush at exit would raise it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def silence_third_parties() -> None:
    """Silences log lines that repeat what a command prints itself. Only commands call this, never the Python API.

    Orbax logs every phase of a save through absl, and also the errors that it raises. huggingface_hub logs warnings
    that our one-line errors repeat.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when huggingface_hub is imported
    logging.getLogger("absl").setLevel(logging.CRITICAL)
