"""Progress as lines and as a bar, and readable numbers."""

import io

from rich.console import Console

from gpt2_jax.display import Display, count, duration, si


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


def test_numbers():
    assert [si(number) for number in (7, 1234, 1_234_567, 10_300_000_000)] == ["7", "1.23k", "1.23M", "10.3G"]
    assert [count(number, "word") for number in (0, 1, 2345)] == ["0 words", "1 word", "2,345 words"]
    assert [duration(seconds) for seconds in (0, 65.2, 3725)] == ["0:00", "1:05", "1:02:05"]
