"""The losses of a run as a drawing in the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import uniplot

from gpt2_jax.metrics import read_rows, thinned

HEIGHT = 12  # rows of characters
MARGIN = 12  # columns beside the drawing, for its frame and the numbers
MIN_WIDTH = 40
START = 50  # of the training loss, its share that may be above the drawing: it falls from far
UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))  # of tokens
POINTS = 4  # of the training loss for each column, at most: means of rows


def draw_losses(metrics: Path, width: int, color: bool) -> str:
    """Training and validation loss over tokens; "" for fewer than two training rows.

    Args:
        metrics: metrics.jsonl.
        width: columns of the terminal. Below `MIN_WIDTH`, nothing is drawn.
        color: tells the two curves apart by color.
    """
    training: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    for row in read_rows(metrics):
        for key, points in (("loss", training), ("val_loss", validation)):
            if key in row:
                points.append((row["tokens"], row[key]))
    if len(training) < 2 or width < MIN_WIDTH:
        return ""
    unit, size = next(((unit, size) for unit, size in UNITS if training[-1][0] >= size), ("", 1.0))
    tokens, losses = thinned([np.array(column) for column in zip(*training, strict=True)], POINTS * width)
    means = list(zip(tokens, losses, strict=True))
    curves = {"training": means, "validation": validation} if validation else {"training": means}
    drawn: str = uniplot.plot_to_string(
        xs=[[tokens / size for tokens, _ in points] for points in curves.values()],
        ys=[[loss for _, loss in points] for points in curves.values()],
        lines=True,
        width=width - MARGIN,
        height=HEIGHT,
        line_length_hard_cap=width,
        title="loss (nats per token) over tokens",
        legend_labels=list(curves),
        color=color,
        x_unit=unit,
        y_max=max(loss for _, loss in means[len(means) // START :]),
    )
    return drawn
