"""The lines under the progress bar of a run on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.text import Text

from gpt2_jax.activity import DEVICE, Stopwatch
from gpt2_jax.config import TrainConfig
from gpt2_jax.display import duration, si
from gpt2_jax.metrics import Row

BLOCKS = "▁▂▃▄▅▆▇█"
TREND = 16  # blocks of the loss, at most
LONG_SECONDS = 1.0  # of work that is named instead of "training"
SEPARATOR = " · "


class Panel:
    """What a run has reached, in lines that fit a terminal. The thread that draws it asks for `lines`.

    Args:
        config: of the run.
        start: the update that the run resumes after, 0 for a new run.
    """

    def __init__(self, config: TrainConfig, start: int) -> None:
        self._config = config
        self.step = start
        """Updates that are done."""
        self._row: Row | None = None
        self._trend = Trend()
        self._validation: tuple[int, float] | None = None
        self._best: tuple[int, float] | None = None
        self.checkpoint = 0
        """The newest checkpoint."""
        self._stopwatch = Stopwatch()

    def resume(self, rows: Iterable[Row]) -> None:
        """Takes note of the rows before the process started."""
        for row in rows:
            if "loss" in row:
                self._trend.add(row["loss"])
            if "val_loss" in row:
                self.validation(row["step"], row["val_loss"])

    def update(self, row: Row) -> None:
        """Takes note of a row about training."""
        self._row = row
        self._trend.add(row["loss"])

    def validation(self, step: int, loss: float) -> None:
        """Takes note of a validation loss."""
        self._validation = step, loss
        if self._best is None or loss < self._best[1]:
            self._best = step, loss

    def lines(self, width: int) -> Iterator[Text]:
        """The lines, for a terminal of some width."""
        for parts in (self._losses(), self._training(), self._work()):
            yield from flow(parts, width)

    def _losses(self) -> list[Text]:
        parts = []
        if self._row:
            parts.append(Text(f"loss {self._row['loss']:.4f} {self._trend}"))
        if self._validation and self._best:
            is_best = self._best == self._validation
            best = ", the best" if is_best else f", best {self._best[1]:.4f} at {self._best[0]:,}"
            text = f"validation {self._validation[1]:.4f} at {self._validation[0]:,}{best}"
            parts.append(Text(text, "green" if is_best else "yellow"))
        return parts

    def _training(self) -> list[Text]:
        if not self._row:
            return []
        row = self._row
        parts = [f"gradient norm {row['grad_norm']:.3g}", f"learning rate {row['learning_rate']:.3g}"]
        parts += [] if row["tokens_per_second"] is None else [f"{si(row['tokens_per_second'])} tok/s"]
        parts += [] if row["mfu"] is None else [f"MFU {row['mfu']:.1%}"]
        return [Text(part) for part in parts]

    def _work(self) -> list[Text]:
        activity, seconds = self._stopwatch.read()
        is_training = activity.doing == DEVICE or seconds < LONG_SECONDS
        parts = [Text("training")] if self.step < self._config.steps else []
        if not is_training:
            parts = [Text(f"{activity}, {duration(seconds)}", "yellow")]
        for noun, every in (("evaluation", self._config.eval.every), ("save", self._config.checkpoint.every)):
            if every and (due := self.step - self.step % every + every) <= self._config.steps:
                parts.append(Text(f"next {noun} at {due:,}"))
        if self.checkpoint:
            parts.append(Text(f"last checkpoint {self.checkpoint:,}"))
        return parts


def flow(parts: Sequence[Text], width: int) -> Iterator[Text]:
    """Lines of parts, as many in each as fit. A part that is wider than a line is cut."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for part in parts:
        if line and len(line) + len(SEPARATOR) + len(part) > width:
            yield line
            line = Text(no_wrap=True, overflow="ellipsis")
        line.append(SEPARATOR if line else "").append_text(part)
    if line:
        yield line


class Trend:
    """A curve of many values in `TREND` blocks at most: each is the mean of as many values, but for the last."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._group, self._in_last = 1, 0  # values for each mean, and of the last one

    def add(self, value: float) -> None:
        """Appends a value."""
        if self._in_last in (0, self._group):
            if len(self._means) == TREND:
                self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
                self._group *= 2
            self._means.append(value)
            self._in_last = 0
        self._in_last += 1
        self._means[-1] += (value - self._means[-1]) / self._in_last

    def __str__(self) -> str:
        means = tuple(self._means)  # another thread adds to it
        if not means:
            return ""
        low, high = min(means), max(means)
        scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
