"""A report as one HTML file, which needs nothing else: no network, no other file."""

from __future__ import annotations

import html
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt2_jax.config import flatten
from gpt2_jax.reports import figures
from gpt2_jax.reports.records import RunRecord, config_differences
from gpt2_jax.reports.tables import evaluation_table, facts_table, summary_table, time_table

MAX_SKIPPED = 100  # updates that were skipped, of each run
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; margin: 0; background: #fff; }
main { max-width: 1100px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e3e5e8; vertical-align: top; }
th, .summary td { white-space: nowrap; } th { font-weight: 600; } td { font-variant-numeric: tabular-nums; }
td.differs { background: #fff4d6; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.note { color: #606770; font-size: .85rem; }
details { margin: .4rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f9; padding: .6rem .8rem; margin: .4rem 0; }
.prompt { font-weight: 600; }
"""


def write_page(runs: Sequence[RunRecord]) -> str:
    """The page about some runs.

    Raises:
        UserError: Plotly is not installed.
    """
    names = ", ".join(run.name for run in runs)
    sections = [
        ("Loss", _figure(figures.loss_figure(runs), first=True)),
        ("Training", _figure(figures.training_figure(runs))),
        *((f"Layers of {html.escape(run.name)}", _figure(figures.layers_figure(run))) for run in runs),
        ("Evaluations", _evaluations(runs)),
        ("Where the time went", _time(runs)),
        ("Samples", _samples(runs)),
        ("Skipped updates", _skipped(runs)),
        ("Config", _config(runs)),
        ("Made by", _made_by(runs)),
    ]
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections if content)
    version = importlib.metadata.version("gpt2_jax")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(names)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<h1>{html.escape(names)}</h1>\n{_summary(runs)}\n{body}"
        f'<p class="note">gpt2_jax {html.escape(version)}</p>\n</main>\n</body>\n</html>\n'
    )


def _summary(runs: Sequence[RunRecord]) -> str:
    header, rows = summary_table(runs)
    dots = [f'<span class="dot" style="background: {figures.color(number)}"></span>' for number in range(len(runs))]
    dots += [""] * (len(rows) - len(runs))  # published runs
    cells = [[dot + html.escape(row[0]), *map(html.escape, row[1:])] for dot, row in zip(dots, rows, strict=True)]
    return f'<div class="summary">{_table(header, cells)}</div>'


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML."""
    head = "".join(f"<th>{title}</th>" for title in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'


def _escaped_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are text."""
    return _table(map(html.escape, header), (map(html.escape, row) for row in rows))


class Differs(str):
    """A cell that is marked."""


def _cell(content: str) -> str:
    return f'<td class="differs">{content}</td>' if isinstance(content, Differs) else f"<td>{content}</td>"


def _figure(figure: Any, first: bool = False) -> str:
    """A figure as HTML, "" for None. The first one of a page brings Plotly's program."""
    if figure is None:
        return ""
    config = {"displaylogo": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=first, config=config))


def _evaluations(runs: Sequence[RunRecord]) -> str:
    figure = figures.evaluation_figure(runs)
    if figure is None:
        return ""
    return _figure(figure) + _escaped_table(*evaluation_table(runs))


def _time(runs: Sequence[RunRecord]) -> str:
    figure = figures.time_figure(runs)
    if figure is None:
        return ""
    note = (
        "Waiting for data: the device had nothing to do. Lost: done again after a restart. Stopped: no process ran. "
        "Tokens/s above count training alone."
    )
    return _figure(figure) + _escaped_table(*time_table(runs)) + f'<p class="note">{note}</p>'


def _samples(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        by_step: dict[int, list[Mapping[str, Any]]] = {}
        for row in run.samples:
            by_step.setdefault(row["step"], []).append(row)
        for step, rows in by_step.items():
            texts = "".join(
                f'<pre><span class="prompt">{html.escape(prompt)}</span>{html.escape(text)}</pre>'
                for prompt, text in ((str(row["prompt"]), str(row["text"])) for row in rows)
            )
            opened = " open" if step == max(by_step) else ""
            title = f"{html.escape(run.name)}, update {step:,}"
            parts.append(f"<details{opened}><summary>{title}</summary>{texts}</details>\n")
    return "".join(parts)


def _skipped(runs: Sequence[RunRecord]) -> str:
    rows = [
        [html.escape(run.name), f"{step:,}", html.escape(reason)]
        for run in runs
        for step, reason in run.skipped[-MAX_SKIPPED:]
    ]
    note = f'<p class="note">The last {MAX_SKIPPED} of each run.</p>'
    cut = any(len(run.skipped) > MAX_SKIPPED for run in runs)
    return _table(["Run", "Update", "Reason"], rows) + note * cut if rows else ""


def _config(runs: Sequence[RunRecord]) -> str:
    different = config_differences(runs) if len(runs) > 1 else {}
    header = ["Key", *(html.escape(run.name) for run in runs)]
    first = ""
    if different:
        rows = [[key, *(Differs(_value(value)) for value in values)] for key, values in different.items()]
        first = _table(header, rows)
    configs = [flatten(run.config) for run in runs]
    everything = [
        [key, *((Differs if key in different else str)(_value(config[key])) for config in configs)]
        for key in configs[0]
    ]
    return f"{first}<details><summary>Every key</summary>{_table(header, everything)}</details>"


def _value(value: Any) -> str:
    return html.escape(repr(value))


def _made_by(runs: Sequence[RunRecord]) -> str:
    return _escaped_table(*facts_table(runs)) if any(run.facts for run in runs) else ""
