"""Process setup of every command, and its errors: one line on stderr and an exit code."""

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

    Exit codes: that of `main`, 2 after a `UserError`, 130 after Ctrl-C, 141 where the reader of stdout has gone.
    """
    gc.freeze()  # Imported modules stay alive. Scanning them in every collection took a tenth of the start.
    silence_third_parties()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 gets a "?", not a traceback
            stream.reconfigure(errors="replace")
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader has gone; write nothing more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def silence_third_parties() -> None:
    """Silences log lines that repeat what a command reports itself. Library calls never do this.

    Orbax logs every phase of a save through absl and raises its errors besides. The Hugging Face hub logs what our
    one-line errors say.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when huggingface_hub is imported
    logging.getLogger("absl").setLevel(logging.CRITICAL)
