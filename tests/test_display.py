"""Progress as lines and as a bar, and readable numbers."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from gpt2_jax.display import Display, count, duration, si, status_line


def test_plain_lines(capsys):
    with Display(0, 100, "starting") as display:
        display.show(20, "update 20/100", ["loss 2.3457", "12.3k tok/s"])
        display.show(21, "update 21/100", ["loss 2.3456"])  # too soon after the first
        display.show(100, "update 100/100", ["loss 2.0"])
    assert capsys.readouterr().out.splitlines() == [
        "update 20/100: loss 2.3457 · 12.3k tok/s",
        "update 100/100: loss 2.0",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    for counts, shown in ((True, "20/100"), (False, "20%")):
        screen = io.StringIO()
        monkeypatch.setattr(
            "gpt2_jax.display._Console",
            lambda screen=screen, **_: Console(file=screen, force_terminal=True, width=100, highlight=False),
        )
        with Display(0, 100, "starting", counts) as display:
            display.show(20, "update 20/100", ["loss 2.3457", "0:10 left"])
            display.print("validation [bold] stays as it is")
        text = screen.getvalue()
        assert shown in text
        assert "loss 2.3457 · 0:10 left" in text
        assert "validation [bold] stays as it is" in text


def test_a_terminal_breaks_indented_lines_between_words(monkeypatch, capsys):
    facts = "model     964,032 parameters: 2 layers, 6 heads"
    Display(0, 1, "", quiet=False).print(facts, 10)
    assert capsys.readouterr().out == facts + "\n"  # not a terminal
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=30, highlight=False, soft_wrap=True, color_system=None)
    monkeypatch.setattr("gpt2_jax.display._Console", lambda **_: console)
    Display(0, 1, "").print(facts, 10)
    assert screen.getvalue() == "model     964,032 parameters:\n          2 layers, 6 heads\n"


def test_a_line_that_changes_is_only_on_a_terminal(monkeypatch, capsys):
    for name in ("CI", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    with status_line(lambda: "reading the data, 0:03"):
        print("a line between")
    assert capsys.readouterr().out == "a line between\n"
    for term, quiet, shown in (("xterm", False, True), ("dumb", False, False), ("xterm", True, False)):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=40, _environ={"TERM": term})
        monkeypatch.setattr("gpt2_jax.display._Console", lambda console=console, **_: console)
        with status_line(lambda: "reading the data, 0:03", quiet):
            pass
        assert ("reading the data, 0:03" in screen.getvalue()) == shown
        assert shown or not screen.getvalue()


def test_a_drawing_is_only_on_a_terminal(monkeypatch, capsys):
    for name in ("CI", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def drawing(width, color):
        asked.append((width, color))
        return "\x1b[31m▌\x1b[0m"

    Display(0, 1, "").draw(drawing)
    assert (capsys.readouterr().out, asked) == ("", [])
    for environment, color in (({}, True), ({"NO_COLOR": "1"}, False)):
        screen = io.StringIO()
        console = Console(
            file=screen, force_terminal=True, width=60, _environ={"TERM": "xterm-256color", **environment}
        )
        monkeypatch.setattr("gpt2_jax.display._Console", lambda console=console, **_: console)
        Display(0, 1, "").draw(drawing)
        assert "▌" in screen.getvalue()
        assert ("\x1b[" in screen.getvalue()) == color
    assert asked == [(60, True), (60, False)]


def test_a_notebook_gets_plain_lines(monkeypatch, capsys):
    """Its kernel says that commands write to a terminal, and stores every state of a bar."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for parent, bars in ((None, True), ("1", False)):
        monkeypatch.setenv("JPY_PARENT_PID", parent) if parent else monkeypatch.delenv("JPY_PARENT_PID", raising=False)
        with Display(0, 100, "starting") as display:
            display.show(100, "update 100/100", ["loss 2.0"])
        assert ("\x1b" in capsys.readouterr().out) == bars


def test_numbers():
    assert [si(number) for number in (7, 1234, 1_234_567, 10_300_000_000)] == ["7", "1.23k", "1.23M", "10.3G"]
    assert [count(number, "word") for number in (0, 1, 2345)] == ["0 words", "1 word", "2,345 words"]
    assert [duration(seconds) for seconds in (0, 65.2, 3725)] == ["0:00", "1:05", "1:02:05"]


SHOWS = """
from gpt2_jax.display import Display
with Display(0, 9, "") as display:
    for number in range(9):
        display.print(f"line {number}")
        display.show(number + 1, "update", ["loss"])
open("done", "w").close()
"""


@pytest.mark.parametrize(
    ("redirection", "stderr"),
    [
        ("| head -n 1", ""),
        ("| true", ""),
        ("> /dev/full", "standard output cannot be written (No space left on device); continuing without it\n"),
    ],
)
def test_the_work_goes_on_when_nobody_reads(redirection, stderr, tmp_path):
    shell = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", shell, sys.executable, SHOWS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, stderr)
    assert (tmp_path / "done").exists()


def test_names_cannot_command_the_terminal(capsys):
    with Display(0, 1, "") as display:
        display.print("runs/\x1b[2Jmine\x9b1m\r")
    assert capsys.readouterr().out == "runs/\N{REPLACEMENT CHARACTER}[2Jmine\N{REPLACEMENT CHARACTER}1m\n"
