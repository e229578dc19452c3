"""The losses of some runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2_jax.display import si
from gpt2_jax.metrics import thinned
from gpt2_jax.reports.records import RunRecord, smoothed
from gpt2_jax.reports.reference_runs import reference_runs

POINTS = 1000  # of a curve, at most


def write_picture(runs: Sequence[RunRecord], path: Path) -> None:
    """Writes a PNG: training loss, smoothed, and validation loss over tokens. It appears whole or not at all."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        tone = f"C{number % 10}"
        if curve := run.curves.get("loss"):
            x, y = thinned([curve.tokens, smoothed(curve.value)], POINTS)
            axes.plot(x, y, color=tone, linewidth=1.2, alpha=0.7, label=f"{run.name} training, smoothed")
        if curve := run.curves.get("val_loss"):
            label = f"{run.name} validation, {curve.value[-1]:.4f} at the end"
            axes.plot(curve.tokens, curve.value, color=tone, marker="o", markersize=4, linestyle=":", label=label)
    for reference in reference_runs(run.config for run in runs):
        tokens = [reference.tokens_per_update * update for update in reference.losses]
        style: dict[str, Any] = {"color": "gray", "marker": "x", "markersize": 4, "linestyle": "--", "linewidth": 1}
        axes.plot(tokens, [*reference.losses.values()], label=f"{reference.name}, validation", **style)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: si(value))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
