"""Metrics of a run: the rows of metrics.jsonl, the plot, throughput and FLOPs."""

from __future__ import annotations

import gc
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.display import duration, si
from gpt2_jax.errors import UserError, one_line
from gpt2_jax.files import replace_text
from gpt2_jax.hardware import chip_of
from gpt2_jax.parsing import is_count, parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

MAX_ROW_BYTES = 1 << 20  # of metrics.jsonl; a row of ours has 200
PANELS = 3  # of tasks in a row of the plot
PLOT_POINTS = 100  # of the training curve, each the mean of consecutive rows


def flops_per_token(config: GPT2Config, n_params: int) -> int:
    """Model FLOPs per token, forward and backward: 6 N + 12 L C T (PaLM, Chowdhery et al. 2022, appendix B).

    Args:
        n_params: all parameters. N leaves out the position embeddings, which take part in no matmul.
    """
    matmul_params = n_params - config.block_size * config.n_embd
    return 6 * matmul_params + 12 * config.n_layer * config.n_embd * config.block_size


def peak_flops(devices: Sequence[jax.Device], dtype: str) -> float | None:
    """FLOP/s of devices together, at the peak of their matmuls; None for float32 and for unknown chips.

    Known peaks are for bfloat16 and float16, which are equally fast.
    """
    chip = chip_of(devices[0]) if dtype != "float32" else None
    return chip.flops * len(devices) if chip else None


class Throughput(NamedTuple):
    """Speed of training. `mfu` is None where the chip's peak is unknown."""

    tokens_per_second: float
    mfu: float | None


class ThroughputMeter:
    """Tokens per second and model FLOPs utilization of training. The clock stops for everything else.

    Args:
        flops_per_token: model FLOPs.
        devices: all devices of the mesh.
        dtype: the dtype of matmuls.
    """

    def __init__(self, flops_per_token: int, devices: list[jax.Device], dtype: str) -> None:
        self._flops = flops_per_token
        self._peak = peak_flops(devices, dtype)
        self._since: float | None = None
        self._tokens = 0

    def stop(self) -> None:
        """Stops the clock: what follows is not training."""
        self._since = None

    def start(self, tokens: int) -> None:
        """Starts the clock after `tokens` consumed tokens, unless it runs already."""
        if self._since is None:
            self._since, self._tokens = time.perf_counter(), tokens

    def read(self, tokens: int) -> Throughput | None:
        """The speed since the last `read` or the `start` of the clock; None if the clock was stopped."""
        now = time.perf_counter()
        since, before = self._since, self._tokens
        self._since, self._tokens = now, tokens
        if since is None:
            return None
        rate = (tokens - before) / (now - since)
        return Throughput(rate, self._peak and rate * self._flops / self._peak)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in order of steps.

    Args:
        path: rows after `step` and an incomplete last line are deleted. A run that resumes from an older checkpoint
            writes them again.
        step: the step that the run resumes after, 0 for a new run.

    Raises:
        UserError: the file does not hold rows of a run.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._waiting: list[str] = []  # rows, as lines
        kept = [row for row in read_rows(path) if row["step"] <= step]
        replace_text(path, "".join(_to_json(row) for row in kept))

    def write(self, row: Row) -> None:
        """Appends a row, after those that could not be written before. They are in the file when this returns.

        Raises:
            UserError: the file was deleted.
            OSError: the disk is full, or cannot be written. The row is kept for the next call, or for `flush`.
        """
        self._waiting.append(_to_json(row))
        self.flush()

    def flush(self) -> None:
        """Writes the rows that could not be written before.

        Raises:
            UserError, OSError: as `write`.
        """
        if not self._waiting:
            return
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND)  # not created anew: rows would be missing
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path} was deleted while the run trains; start it again to resume from the newest checkpoint"
            ) from error
        size = os.fstat(file).st_size
        try:
            with open(file, "wb", buffering=0) as lines:
                try:
                    content = "".join(self._waiting).encode()
                    while content:
                        content = content[lines.write(content) :]
                except OSError:
                    lines.truncate(size)  # no part of a row stays
                    raise
        except OSError as error:  # of a file descriptor, so it does not know the name
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._waiting.clear()


def _to_json(row: Row) -> str:
    """A line of JSON. NaN and infinity, which JSON does not have, are an error."""
    return json.dumps(row, allow_nan=False) + "\n"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a metrics.jsonl, without an incomplete last line.

    Raises:
        UserError: a line is not the row of a run.
    """
    if not path.exists():
        return
    try:
        with open(path, "rb") as file:
            number = 0
            while (line := file.readline(MAX_ROW_BYTES)).endswith(b"\n") or len(line) == MAX_ROW_BYTES:
                number += 1
                yield parse_row(line)
    except (OSError, ValueError) as error:
        where = f"{path}, line {number}" if isinstance(error, ValueError) else str(path)
        raise UserError(f"{where} does not hold the row of a run ({one_line(error)}); move the file away") from error


def parse_row(line: bytes) -> Row:
    """Parses a row, and checks the types of what is compared and plotted.

    Raises:
        ValueError: it is not the row of a run.
    """
    row = parse_json(line.decode("utf-8"))
    if not isinstance(row, dict) or not is_count(row.get("step")):
        raise ValueError("expected an object with a count 'step'")
    for key, value in row.items():
        plotted = key in ("loss", "val_loss") or "/" in key
        if plotted and (not (type(value) is float or is_count(value)) or not is_count(row.get("tokens"))):
            raise ValueError(f"expected a number {key!r} with a count 'tokens'")
    return row


def format_row(row: Row, seconds_left: float | None) -> list[str]:
    """The parts of a line about a training row."""
    speed, mfu = row["tokens_per_second"], row["mfu"]
    parts = [f"loss {row['loss']:.4f}", f"gradient norm {row['grad_norm']:.3g}"]
    parts += [f"learning rate {row['learning_rate']:.3g}"]
    parts += [] if speed is None else [f"{si(speed)} tok/s"]
    parts += [] if mfu is None else [f"MFU {mfu:.1%}"]
    return parts + ([] if seconds_left is None else [f"{duration(seconds_left)} left"])


class _Curve(NamedTuple):
    """A column of the rows over tokens. Arrays of machine numbers, as the rows of a long run fill memory."""

    tokens: array[float]
    values: array[float]


def thinned(values: Sequence[np.ndarray | array[float]], points: int) -> list[np.ndarray]:
    """Columns of equal length with at most `points` entries, each the mean of consecutive ones."""
    group = -(-len(values[0]) // points)
    starts = range(0, len(values[0]), max(group, 1))
    return [np.add.reduceat(column, starts) / np.diff([*starts, len(column)]) for column in values]


def loss_figure(rows: Iterable[Row], title: str, references: Mapping[str, float] | None = None) -> Figure:
    """Training and validation loss over tokens, and below it a panel for each metric of the tasks.

    The training curve has about 100 points, each a mean of rows.

    Args:
        references: values to compare metrics with, by TASK/METRIC: dashed lines.
    """
    curves: dict[str, _Curve] = {}
    for row in rows:
        for key, value in row.items():
            if key in ("loss", "val_loss") or "/" in key:
                curve = curves.setdefault(key, _Curve(array("d"), array("d")))
                curve.tokens.append(row["tokens"])
                curve.values.append(value)
    # Imported late: it takes a second, and only one process plots.
    from matplotlib.figure import Figure

    tasks = [key for key in curves if "/" in key]
    n_rows = -(-len(tasks) // PANELS)
    figure = Figure(figsize=(8, 4.5 + 2.2 * n_rows), dpi=120)
    if n_rows:
        figure.set_layout_engine("constrained")  # takes as long as drawing
    else:
        figure.subplots_adjust(left=0.1, right=0.97, bottom=0.11, top=0.92)
    grid = figure.add_gridspec(1 + n_rows, PANELS, height_ratios=[4.5] + [2.2] * n_rows)
    axes = figure.add_subplot(grid[0, :])
    if training := curves.get("loss"):
        length = -(-len(training.tokens) // PLOT_POINTS)
        label = "training" + (f" (means of {length} rows)" if length > 1 else "")
        axes.plot(*thinned(training, PLOT_POINTS), label=label, color="tab:blue", alpha=0.6, linewidth=1.2)
    if validation := curves.get("val_loss"):
        label = f"validation ({validation.values[-1]:.4f} at the end)"
        axes.plot(*validation, label=label, color="tab:orange", marker="o", markersize=4, linewidth=1.2)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    if axes.lines:
        axes.legend(frameon=False)
    for index, key in enumerate(tasks):
        panel = figure.add_subplot(grid[1 + index // PANELS, index % PANELS])
        panel.plot(*curves[key], color="tab:green", marker="o", markersize=3, linewidth=1.2)
        if references and key in references:
            panel.axhline(references[key], color="gray", linestyle="--", linewidth=1, label="OpenAI's model")
            panel.legend(frameon=False, fontsize="x-small")
        panel.set_title(key.replace("/", " "), fontsize="small")
        panel.tick_params(labelsize="x-small")
    for panel in figure.axes:
        panel.xaxis.set_major_formatter(lambda value, _: si(value))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def plot(metrics: Path, image: Path, references: Mapping[str, float] | None = None) -> None:
    """Plots the rows of a metrics.jsonl, as `loss_figure`. The image is replaced atomically."""
    partial = image.with_name(image.name + ".partial")
    title = metrics.absolute().parent.name
    # A figure is a cycle, and Python's own collections are rare: 16 MB of figures waited for one. Without a collection
    # meanwhile, the youngest generation has all that the plot makes. To search every object takes a tenth of a second.
    gc.disable()
    try:
        loss_figure(read_rows(metrics), title, references).savefig(partial, format="png")
        partial.replace(image)
    finally:
        gc.collect(0)
        gc.enable()
