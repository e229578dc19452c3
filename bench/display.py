"""What a run shows on a terminal, and the times that it keeps, against an older checkout whose output is a pipe.

    python bench/display.py --before CHECKOUT [--repeat ROUNDS]

Both train the quickstart, in turns.
"""

from __future__ import annotations

import functools
import os
import pty
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path

from fault_runs import ROOT
from record import Figures, Rows, arguments, write
from turns import describe, speeds_in_turns

SIZE = (24, 80)  # lines and columns of the terminal
FLAGS = ("--config", "quickstart", "--steps", "1000000", "--log.every", "1", "--eval.every", "500", "--eval.tokens",
         "4096", "--eval.sample_tokens", "0", "--checkpoint.every", "500")  # fmt: skip


def start(checkout: Path, terminal: bool, programs: str, out: Path) -> subprocess.Popen[str]:
    """Starts a training whose output is read and thrown away."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, SIZE)
    variables = {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu", "TERM": "xterm-256color"}
    environment = {**os.environ, **variables}
    environment.pop("CI", None)
    command = [sys.executable, "-m", "gpt2_jax.train", *FLAGS, "--out", str(out), "--compilation_cache", programs]
    streams = {"stdin": subprocess.DEVNULL, "stdout": writer, "stderr": writer}
    process = subprocess.Popen(command, env=environment, text=True, **streams)
    os.close(writer)

    def read() -> None:
        try:
            while os.read(reader, 1 << 16):
                pass
        except OSError:  # the terminal is closed
            return

    threading.Thread(target=read, daemon=True).start()
    return process


def rows(figures: Figures) -> Rows:
    """The row of the result."""
    return {"updates over those of the older checkout": (figures["now_over_before"], describe(figures))}


def main() -> None:
    """Measures, and writes display-cpu.json."""
    parser = arguments(__doc__, repeat=10)
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    args = parser.parse_args()
    before = args.before.absolute()
    with tempfile.TemporaryDirectory() as programs:
        sides = {
            "before": functools.partial(start, before, False, programs),
            "now": functools.partial(start, ROOT, True, programs),
        }
        figures: Figures = speeds_in_turns(sides, 500, args.repeat)
    write("display", figures, rows(figures), args.results, "cpu")


if __name__ == "__main__":
    main()
