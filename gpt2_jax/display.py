"""Progress display: a bar in a terminal; elsewhere and in notebooks plain lines, at most one every five seconds.

Work continues without a display when its output cannot be written: after `| head`, or on a full disk.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from gpt2_jax.errors import UserError, strip_controls

SECONDS_BETWEEN_LINES = 5.0
REFRESHES = 2  # of a bar, per second


class _Console(Console):
    """rich's console, which would end the program when the reader closes the pipe."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _can_redraw(console: Console) -> bool:
    """True for a terminal that can move its cursor. A notebook looks like one, and keeps every state of a bar."""
    moves = console.is_terminal and not console.is_dumb_terminal
    return moves and not os.environ.get("CI") and "JPY_PARENT_PID" not in os.environ


@contextmanager
def status_line(text: Callable[[], str], quiet: bool = False) -> Iterator[None]:
    """Shows a line that changes, on a terminal, and removes it at the end of the `with` block.

    Args:
        text: the line. It is called from another thread.
        quiet: shows nothing.
    """
    console = _Console(highlight=False, soft_wrap=True, emoji=False)
    if quiet or not _can_redraw(console):
        yield
        return

    def line() -> Text:
        return Text(strip_controls(text()), no_wrap=True, overflow="ellipsis")

    live = Live(
        console=console, get_renderable=line, refresh_per_second=REFRESHES, transient=True, redirect_stderr=False
    )
    with suppress(OSError):  # the terminal was closed
        live.start()
    try:
        yield
    finally:
        with suppress(OSError):
            live.stop()


class _Progress(Progress):
    """A bar with lines below it."""

    def __init__(self, *columns: ProgressColumn, console: Console, below: Callable[[int], Iterable[Text]]) -> None:
        self._lines = lambda: below(console.width)
        super().__init__(*columns, console=console, refresh_per_second=REFRESHES)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield from self._lines()


class Display:
    """A context manager that shows the progress of some work.

    Args:
        done: work already done at the start.
        total: all of the work; 0 if unknown.
        text: shown beside the bar until the first `show`.
        counts: the bar shows "done/total"; otherwise a percentage.
        quiet: shows nothing, for all processes except process 0.
        file: where it is shown; by default what is standard output at that time.
        below: lines to show below a bar, for a terminal of some width. It is called from another thread.
    """

    def __init__(
        self,
        done: float,
        total: float,
        text: str,
        counts: bool = True,
        quiet: bool = False,
        file: TextIO | None = None,
        below: Callable[[int], Iterable[Text]] = lambda width: (),
    ) -> None:
        self.console = _Console(highlight=False, soft_wrap=True, emoji=False, quiet=quiet, file=file)
        self._bar = None
        if _can_redraw(self.console) and not quiet:
            self._bar = _Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn() if counts else TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                below=below,
            )
            self._task = self._bar.add_task("", total=total or None, text=text)
            self._bar.update(self._task, completed=done)
        self._total, self._last_line, self._done = total, -math.inf, False

    def __enter__(self) -> Display:
        if self._bar:
            with self._survive_closed_output():
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            with self._survive_closed_output():
                self._bar.stop()

    def print(self, text: str, indent: int | None = None) -> None:
        """Prints a line that stays on the screen.

        Args:
            text: the line.
            indent: breaks it between words where it is wider than the terminal, and indents what follows by as much.
                Without it, the terminal breaks it anywhere, and a copy of it is one line.
        """
        text = strip_controls(text)
        if indent is not None and self.console.is_terminal:
            wrapper = textwrap.TextWrapper(self.console.width, subsequent_indent=" " * indent, break_on_hyphens=False)
            wrapper.break_long_words = False
            text = wrapper.fill(text)
        with self._survive_closed_output():
            self.console.print(text, markup=False)
            self.console.file.flush()

    def draw(self, drawing: Callable[[int, bool], str]) -> None:
        """Prints a drawing where there is a bar; elsewhere nothing.

        Args:
            drawing: makes it, with ANSI colors, for a width in columns and with or without colors.
        """
        if self._bar:
            color = self.console.color_system is not None and not self.console.no_color
            with self._survive_closed_output(), suppress(UserError):
                self.console.print(Text.from_ansi(drawing(self.console.width, color)))

    @contextmanager
    def _survive_closed_output(self) -> Iterator[None]:
        """Turns the display off if its output cannot be written, and says so on stderr unless the pipe was closed."""
        try:
            yield
        except OSError as error:
            self.console.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())  # for what is still in its buffer
            if isinstance(error, BrokenPipeError):
                return
            with suppress(OSError):  # it may be the same disk, or a terminal that was closed
                print(f"standard output cannot be written ({error.strerror}); continuing without it", file=sys.stderr)

    def show(self, done: float, line: str, parts: Sequence[str], beside: Sequence[str] | None = None) -> None:
        """Shows progress. The end is always shown.

        Args:
            done: work done.
            line: the start of a line, without a bar.
            parts: the rest of the line.
            beside: the text beside a bar, which has less room; by default `parts`.
        """
        now = time.perf_counter()
        if self._bar:
            text = " · ".join(parts if beside is None else beside)
            self._bar.update(self._task, completed=done, text=text)  # written by a thread of rich's
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or (self._total and done >= self._total and not self._done):
            self._last_line, self._done = now, bool(self._total) and done >= self._total
            self.print(f"{line}: " + " · ".join(parts))


def si(number: float) -> str:
    """Formats a number with three digits and a unit: 1234567 -> '1.23M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def count(number: int, noun: str) -> str:
    """Formats a number with its noun: 1 -> '1 document', 1234 -> '1,234 documents'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Formats seconds: 3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
