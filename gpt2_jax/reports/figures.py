"""The figures of a report, by Plotly: tooltips, zoom, and legends that show and hide runs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_jax.errors import import_optional
from gpt2_jax.metrics import thinned
from gpt2_jax.reports.records import TRAINING, Curve, RunRecord, evaluation_keys, smoothed
from gpt2_jax.reports.reference_runs import reference_runs
from gpt2_jax.run.goodput import PHASES
from gpt2_jax.run.layer_statistics import STATISTICS

if TYPE_CHECKING:
    import plotly.graph_objects as go

POINTS = 2000  # of a curve, at most
LAYER_POINTS = 300  # of a statistic of layers, at most
COLUMNS = 3  # of panels with tasks
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "margin": {"l": 70, "r": 20, "t": 50, "b": 50},
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "legend": {"orientation": "h", "yanchor": "top", "y": -0.18, "x": 0},
    "hovermode": "closest",
}
AXES = {"Tokens": "tokens", "Updates": "step", "Hours": "hours"}


def _plotly(module: str) -> Any:
    return import_optional(f"plotly.{module}", "a report in HTML", "plotly")


def color(number: int) -> str:
    """The color of a run, the same in all figures."""
    return COLORS[number % len(COLORS)]


def _x(run: RunRecord, curve: Curve, axis: str) -> np.ndarray:
    if axis != "hours":
        return getattr(curve, axis)
    steps, hours = run.hours
    return np.interp(curve.step, steps, hours) if steps else np.full(len(curve.step), np.nan)


def loss_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Training loss, raw and smoothed, and validation loss, over tokens, updates or hours; and published runs."""
    figure = _plotly("graph_objects").Figure()
    xs: dict[str, list[np.ndarray]] = {title: [] for title in AXES}

    def add(run: RunRecord, curve: Curve, values: np.ndarray, name: str, **style: Any) -> None:
        axes = [_x(run, curve, axis) for axis in AXES.values()]
        if len(curve.step) > POINTS:
            *axes, values = thinned([*axes, values], POINTS)
        for title, x in zip(AXES, axes, strict=True):
            xs[title].append(x)
        figure.add_scatter(
            x=axes[0], y=values, name=f"{html.escape(run.name)} {name}",
            hovertemplate=f"%{{y:.4f}} at %{{x}}<extra>{html.escape(run.name)} {name}</extra>", **style,
        )  # fmt: skip

    for number, run in enumerate(runs):
        tone = {"color": color(number)}
        if curve := run.curves.get("loss"):
            add(run, curve, curve.value, "training", line={**tone, "width": 1}, opacity=0.3)
            add(run, curve, smoothed(curve.value), "training, smoothed", line={**tone, "width": 2})
        if curve := run.curves.get("val_loss"):
            style = {"line": {**tone, "width": 2, "dash": "dot"}, "mode": "lines+markers", "marker": {"size": 7}}
            add(run, curve, curve.value, "validation", **style)
    for reference in reference_runs(run.config for run in runs):
        updates = np.array([*reference.losses])
        axes = reference.tokens_per_update * updates, updates, np.full(len(updates), np.nan)
        for title, x in zip(AXES, axes, strict=True):
            xs[title].append(x)
        figure.add_scatter(
            x=xs["Tokens"][-1], y=[*reference.losses.values()], name=f"{reference.name}, validation",
            mode="lines+markers", line={"color": "gray", "dash": "dash"}, marker={"symbol": "x", "size": 6},
            hovertemplate=f"%{{y:.4f}} at %{{x}}<extra>{reference.name}<br>{reference.source}</extra>",
        )  # fmt: skip
    has_hours = all(run.hours[0] for run in runs)
    titles = [title for title in AXES if title != "Hours" or has_hours]
    axis_buttons = [
        {"label": title, "method": "update", "args": [{"x": xs[title]}, {"xaxis.title.text": title}]}
        for title in titles
    ]
    scales: list[Any] = [[{"yaxis.type": scale}] for scale in ("log", "linear")]  # by clicks in turn
    scale_button = {"label": "log", "method": "relayout", "args": scales[0], "args2": scales[1]}
    menu = {"type": "buttons", "direction": "right", "y": 1.02, "yanchor": "bottom", "font": {"size": 11}}
    figure.update_layout(
        **LAYOUT,
        height=560,
        yaxis={"title": TRAINING["loss"]},
        xaxis={"title": {"text": "Tokens"}},
        updatemenus=[
            {**menu, "buttons": axis_buttons, "x": 0, "xanchor": "left"},
            {**menu, "buttons": [scale_button], "x": 1, "xanchor": "right", "active": -1},
        ],
    )
    return figure


def training_figure(runs: Sequence[RunRecord]) -> go.Figure | None:
    """Gradient norm, learning rate, tokens per second and MFU over tokens, one above the other; None without rows."""
    keys = [key for key in TRAINING if key != "loss" and any(key in run.curves for run in runs)]
    if not keys:
        return None
    titles = [TRAINING[key] for key in keys]
    noise = [(number, run, found) for number, run in enumerate(runs) if (found := run.noise_scale())]
    titles += ["Noise scale; batch size dotted"] * bool(noise)
    n_rows = len(titles)
    subplots = _plotly("subplots").make_subplots(
        rows=n_rows, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.25 / n_rows
    )
    for number, run, found in noise:
        for values, dash, name in ((found.critical, "solid", "noise scale"), (found.sequences, "dot", "batch size")):
            subplots.add_scatter(
                x=found.tokens, y=values, row=n_rows, col=1, legendgroup=run.name, showlegend=False,
                line={"color": color(number), "width": 1.5, "dash": dash},
                hovertemplate=f"%{{y:.4g}} sequences at %{{x}}<extra>{html.escape(run.name)} {name}</extra>",
            )  # fmt: skip
    if noise:
        subplots.update_yaxes(type="log", row=n_rows, col=1)
    for row, key in enumerate(keys, 1):
        for number, run in enumerate(runs):
            if curve := run.curves.get(key):
                columns = [curve.tokens, curve.value]
                x, y = thinned(columns, POINTS) if len(curve.step) > POINTS else columns
                subplots.add_scatter(
                    x=x, y=y, row=row, col=1, name=html.escape(run.name), legendgroup=run.name, showlegend=row == 1,
                    line={"color": color(number), "width": 1.2},
                    hovertemplate=f"%{{y:.4g}} at %{{x}}<extra>{html.escape(run.name)}</extra>",
                )  # fmt: skip
    subplots.update_layout(**{**LAYOUT, "legend": {**LAYOUT["legend"], "y": -0.08}}, height=80 + 200 * n_rows)
    subplots.update_xaxes(title_text="Tokens", row=n_rows, col=1)
    return subplots


def evaluation_figure(runs: Sequence[RunRecord]) -> go.Figure | None:
    """A panel for each metric of the tasks, with the published figure of OpenAI's weights; None without tasks."""
    keys = evaluation_keys(runs)
    if not keys:
        return None
    columns = min(COLUMNS, len(keys))
    n_rows = -(-len(keys) // columns)
    figure = _plotly("subplots").make_subplots(
        rows=n_rows, cols=columns, subplot_titles=[html.escape(key.replace("/", " ")) for key in keys],
        vertical_spacing=0.3 / n_rows, horizontal_spacing=0.08,
    )  # fmt: skip
    for index, key in enumerate(keys):
        row, column = index // columns + 1, index % columns + 1
        for number, run in enumerate(runs):
            if curve := run.curves.get(key):
                figure.add_scatter(
                    x=curve.tokens, y=curve.value, row=row, col=column, name=html.escape(run.name),
                    legendgroup=run.name, showlegend=index == 0, mode="lines+markers",
                    line={"color": color(number), "width": 1.5},
                    hovertemplate=f"%{{y:.4g}} at %{{x}}<extra>{html.escape(run.name)}</extra>",
                )  # fmt: skip
        published = {run.reference(key) for run in runs} - {None}
        for one in sorted(filter(None, published)):
            figure.add_hline(one.value, line_dash="dash", line_color="gray", row=row, col=column,
                             annotation_text=f"OpenAI {one.value:.4g}", annotation_font_size=11)  # fmt: skip
    figure.update_layout(**LAYOUT, height=100 + 260 * n_rows)
    return figure


def layers_figure(run: RunRecord) -> go.Figure | None:
    """What happens inside the layers: a panel for each statistic, layers over tokens; None if the run measured none."""
    if not run.layers:
        return None
    n_rows = len(run.layers)
    figure = _plotly("subplots").make_subplots(
        rows=n_rows, shared_xaxes=True, subplot_titles=[html.escape(STATISTICS.get(name, name)) for name in run.layers],
        vertical_spacing=0.25 / n_rows,
    )  # fmt: skip
    for row, (tokens, layers, values) in enumerate(run.layers.values(), 1):
        x, *z = thinned([tokens, *values], LAYER_POINTS)
        figure.add_heatmap(
            x=x, y=[*layers], z=z, row=row, col=1, colorscale="Viridis",
            colorbar={"len": 0.8 / n_rows, "y": 1 - (row - 0.5) / n_rows, "thickness": 12},
            hovertemplate="%{z:.4g} in %{y} at %{x}<extra></extra>",
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed", row=row, col=1)
    figure.update_layout(**LAYOUT, height=80 + 260 * n_rows)
    figure.update_xaxes(title_text="Tokens", row=n_rows, col=1)
    return figure


def time_figure(runs: Sequence[RunRecord]) -> go.Figure | None:
    """Where the time went: a bar for each run, in minutes; None if no run knows."""
    timed = [run for run in runs if run.seconds]
    if not timed:
        return None
    figure = _plotly("graph_objects").Figure()
    for number, phase in enumerate(PHASES):
        minutes = [run.seconds.get(phase, 0.0) / 60 for run in timed]
        if any(minutes):
            figure.add_bar(
                x=minutes, y=[html.escape(run.name) for run in timed], orientation="h", name=phase,
                marker_color=color(number), hovertemplate=f"%{{x:.2f}} minutes {phase}<extra></extra>",
            )  # fmt: skip
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0, "traceorder": "normal", "entrywidth": 90,
              "font": {"size": 11}}  # fmt: skip
    layout = {**LAYOUT, "legend": legend, "height": 180 + 45 * len(timed)}
    figure.update_layout(**layout, barmode="stack", xaxis_title="Minutes", yaxis={"autorange": "reversed"})
    return figure
