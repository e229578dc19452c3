"""What a training shows on a terminal, as a terminal of 80 and of 200 columns keeps it (pyte, an emulator).

`python tests/test_terminal.py` writes the files in tests/golden again: look at them before you commit them.
"""

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte")

GOLDEN = Path(__file__).parent / "golden"
# Two to four seconds of training, with two pictures a second, and several rows after each evaluation.
FLAGS = ["--config", "quickstart", "--steps", "200", "--model.n_layer", "1", "--model.n_embd", "64",
         "--model.n_head", "2", "--model.block_size", "64", "--data.text", "text.txt", "--eval.every", "50",
         "--checkpoint.every", "50", "--eval.sample_tokens", "0", "--log.every", "1", "--out", "run"]  # fmt: skip
TIMEOUT = 300.0


def watch(directory, columns):
    """Trains on a terminal. Returns all lines that it holds at the end, and the screens on the way."""
    (directory / "text.txt").write_text("".join(f"{number} squared is {number**2}\n" for number in range(2000)))
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 400, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2_jax.train", *FLAGS], cwd=directory, env=environment, stdin=subprocess.DEVNULL,
        stdout=writer, stderr=writer,
    )  # fmt: skip
    os.close(writer)
    screen = pyte.Screen(columns, 400)  # higher than everything that is printed
    stream, screens, deadline = pyte.ByteStream(screen), [], time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if select.select([reader], [], [], 1.0)[0]:
            try:
                stream.feed(os.read(reader, 1 << 16))
            except OSError:  # the process has closed the terminal
                break
            screens.append([line.rstrip() for line in screen.display if line.strip()])
    os.close(reader)
    assert process.wait(timeout=10) == 0, "\n".join(screens[-1])
    return screens[-1], screens


def masked(lines):
    """The text without numbers, paths, drawings and the places where lines are broken, which depend on the numbers."""
    text = re.sub(r"[\u2500-\u259f\u2800-\u28ff]+", "", "\n".join(lines))
    text = re.sub(r"/\S+", "PATH", text)
    text = re.sub(r"\b[\da-f]{8}\b", "#", text)
    text = re.sub(r"[+-]?\d[\d.,:]*(e[+-]?\d+)?(?:[kMGT]?B|[kM])?", "#", text)
    text = re.sub(r"^time .*?(?=^state)", "time PHASES\n", text, flags=re.MULTILINE | re.DOTALL)  # in their order
    text = re.sub(r"^(training · )?last checkpoint #$", "", text, flags=re.MULTILINE)  # a save may still be written
    entries = re.sub(r"\n {2,}(?=\S)", " ", text).splitlines()  # continued lines are indented
    lines = (re.sub("#( #)+", "#", " ".join(entry.split())) for entry in entries if entry.strip(" #"))
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
def test_a_training_on_a_terminal(tmp_path, columns):
    lines, screens = watch(tmp_path, columns)
    assert masked(lines) == (GOLDEN / f"terminal-{columns}.txt").read_text(encoding="utf-8")
    assert max(map(len, lines)) <= columns
    live = [screen for screen in screens if any("next evaluation at" in line for line in screen)]
    assert live, "the lines under the bar never appeared"
    shown = "\n".join(line for screen in live for line in screen)  # each has what is known by then
    for words in (r" \d+/200 ", r"loss \d\.\d{4} [▁-█]+", r"validation \d\.\d{4} at \d+", r"gradient norm \d",
                  r"learning rate \d", r"tok/s", r"next evaluation at \d+", r"next save at \d+"):  # fmt: skip
        assert re.search(words, shown), words


if __name__ == "__main__":
    for width in (80, 200):
        with tempfile.TemporaryDirectory() as temporary:
            (GOLDEN / f"terminal-{width}.txt").write_text(masked(watch(Path(temporary), width)[0]), encoding="utf-8")
