"""What a training shows on a terminal, as one of 80 and of 200 columns keeps it: pyte, an emulator, and tmux.

`python tests/test_terminal.py` writes the files in tests/golden again: look at them before you commit them.
"""

import fcntl
import os
import re
import select
import shutil
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


def prepared(directory, **more):
    """Writes the text, and returns the environment of the command."""
    (directory / "text.txt").write_text("".join(f"{number} squared is {number**2}\n" for number in range(2000)))
    hidden = ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "JPY_PARENT_PID", "TMUX")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    return environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", **more}


def written(directory, columns, flags=FLAGS, **environment):
    """Trains on a terminal, and yields what it writes to it."""
    environment = prepared(directory, **environment)
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 400, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2_jax.train", *flags], cwd=directory, env=environment, stdin=subprocess.DEVNULL,
        stdout=writer, stderr=writer,
    )  # fmt: skip
    os.close(writer)
    output, deadline = b"", time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if select.select([reader], [], [], 1.0)[0]:
            try:
                output += (new := os.read(reader, 1 << 16))
            except OSError:  # the process has closed the terminal
                break
            yield new
    os.close(reader)
    assert process.wait(timeout=10) == 0, output.decode()


def watch(directory, columns):
    """Trains on a terminal. Returns all lines that it holds at the end, and the screens on the way."""
    screen = pyte.Screen(columns, 400)  # higher than everything that is printed
    stream, screens = pyte.ByteStream(screen), []
    for new in written(directory, columns, TERM="xterm-256color"):
        stream.feed(new)
        screens.append([line.rstrip() for line in screen.display if line.strip()])
    return screens[-1], screens


def watch_tmux(directory, columns):
    """Trains in tmux. Returns all lines that it holds at the end, and what it shows on the way and at the end.

    The latter has the lines as they were written: tmux joins those that it has broken.
    """
    sockets = tempfile.mkdtemp(prefix="tmux-")  # the path of a socket may have 104 characters
    environment = prepared(directory, LC_ALL="C.UTF-8", TMUX_TMPDIR=sockets)

    def tmux(*args):
        command = ["tmux", "-u", "-L", "gpt2_jax", "-f", "/dev/null", *args]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, encoding="utf-8")
        return [line.rstrip() for line in done.stdout.splitlines() if line.strip()]

    script = '"$0" -m gpt2_jax.train "$@"; echo $? > code; exec sleep 600'
    size = ["-x", str(columns), "-y", "60", "-c", str(directory)]
    tmux("new-session", "-d", *size, "sh", "-c", script, sys.executable, *FLAGS)
    try:
        screens, deadline = [], time.monotonic() + TIMEOUT
        while not (directory / "code").exists() and time.monotonic() < deadline:
            screens.append(tmux("capture-pane", "-p", "-J"))
            time.sleep(0.2)
        lines = tmux("capture-pane", "-p", "-S", "-")
        screens.append(tmux("capture-pane", "-p", "-J", "-S", "-"))
    finally:
        tmux("kill-server")
        shutil.rmtree(sockets)
    assert (directory / "code").read_text() == "0\n", "\n".join(lines)
    return lines, screens


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


def golden(columns):
    return (GOLDEN / f"terminal-{columns}.txt").read_text(encoding="utf-8")


def test_only_the_command_to_copy_is_broken_within_a_word():
    """At 80 columns, against the words at 200. A line without a break in it can be copied."""
    assert golden(80).count("--optimi\nzer") == 1
    assert golden(80).replace("--optimi\nzer", "--optimizer").split() == golden(200).split()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
def test_a_training_on_a_terminal(tmp_path, columns):
    lines, screens = watch(tmp_path, columns)
    assert masked(lines) == golden(columns)
    live = [screen for screen in screens if any("next evaluation at" in line for line in screen)]
    assert live, "the lines under the bar never appeared"
    shown = "\n".join(line for screen in live for line in screen)  # each has what is known by then
    for words in (r" \d+/200 ", r"loss \d\.\d{4} [▁-█]+", r"validation \d\.\d{4} at \d+", r"gradient norm \d",
                  r"learning rate \d", r"tok/s", r"next evaluation at \d+", r"next save at \d+"):  # fmt: skip
        assert re.search(words, shown), words


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize("columns", [80, 200])
def test_a_training_in_tmux(tmp_path, columns):
    lines, screens = watch_tmux(tmp_path, columns)
    assert masked(lines) == golden(columns)
    shown = "\n".join(line for screen in screens[:-1] for line in screen)
    for words in (r" \d+/200 ", r"loss \d\.\d{4} [▁-█]+", r"gradient norm \d", r"next evaluation at \d+"):
        assert re.search(words, shown), words
    broken = {line for screen in screens for line in screen if len(line) > columns}
    assert all(line.startswith("next      python -m gpt2_jax.train ") for line in broken), broken
    assert bool(broken) == (columns == 80)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm-256color", "NO_COLOR": "1"}])
def test_a_terminal_that_cannot_move_its_cursor_and_one_without_colors(tmp_path, environment):
    flags = [*FLAGS]
    flags[flags.index("--steps") + 1] = "60"
    output = b"".join(written(tmp_path, 80, flags, **environment)).decode()
    escapes = set(re.findall(r"\x1b(?:\[[\d;:?]*)?.?", output))
    if environment["TERM"] == "dumb":
        assert not escapes
        assert re.search(r"^update 60/60: loss \d\.\d{4} · gradient norm \d", output, re.MULTILINE)
    else:
        assert escapes == {"\x1b[2K", "\x1b[1A", "\x1b[?25l", "\x1b[?25h"}  # of the cursor, and to clear a line
        assert " 60/60 " in output
    for line in (r"on        gpt2_jax .* 1 × cpu", r"update 50: validation loss \d\.\d{4} over [\d,]+ tokens",
                 r"loss      \d\.\d{4} nats per token over", r"state     fingerprint [\da-f]{8}"):  # fmt: skip
        assert re.search(rf"(?:^|\x1b\[2K){line}", output, re.MULTILINE), line


if __name__ == "__main__":
    for width in (80, 200):
        with tempfile.TemporaryDirectory() as temporary:
            (GOLDEN / f"terminal-{width}.txt").write_text(masked(watch(Path(temporary), width)[0]), encoding="utf-8")
