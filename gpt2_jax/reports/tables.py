"""The tables of a report: a header and rows of cells that are text."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2_jax.display import duration, si
from gpt2_jax.reports.records import RunRecord, evaluation_keys
from gpt2_jax.reports.reference_runs import reference_runs
from gpt2_jax.run.goodput import PHASES, STOPPED

Table = tuple[list[str], list[list[str]]]
PUBLISHED = "OpenAI's weights, published"


def summary_table(runs: Sequence[RunRecord]) -> Table:
    """The header, a row for each run, and one for each published run of the same model on the same data."""
    header = ["Run", "Model", "Update", "Tokens", "Validation loss", "best", "Training loss", "tokens/s", "Time"]
    rows = []
    for run in runs:
        model = run.config.model
        speed = run.speed()
        rows.append(
            [
                run.name,
                f"{model.n_layer} layers × {model.n_embd}, {model.block_size} tokens",
                f"{run.last_step:,} of {run.config.steps:,}",
                si(run.tokens),
                _number(run.final("val_loss")),
                _number(run.best("val_loss")),
                _number(run.final("loss")),
                "" if speed is None else si(speed),
                duration(sum(run.seconds.values()) - run.seconds.get(STOPPED, 0.0)) if run.seconds else "",
            ]
        )
    for reference in reference_runs(run.config for run in runs):
        last = max(reference.losses)
        facts = f"{last:,}", si(last * reference.tokens_per_update), _number(reference.losses[last])
        rows.append([f"{reference.name} ({reference.source})", "", *facts, *[""] * (len(header) - 2 - len(facts))])
    return header, rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def evaluation_table(runs: Sequence[RunRecord]) -> Table:
    """A row for each metric of the tasks: its last value in each run, and the published figure."""
    rows = []
    for key in evaluation_keys(runs):
        published = next(filter(None, (run.published(key) for run in runs)), "")
        rows.append([key, *(_number(run.final(key)) for run in runs), published])
    return ["Metric", *(run.name for run in runs), PUBLISHED], rows


def time_table(runs: Sequence[RunRecord]) -> Table:
    """The header and a row for each phase: time and share in each run that knows."""
    timed = [run for run in runs if run.seconds]
    rows = []
    for phase in PHASES:
        if any(phase in run.seconds for run in timed):
            parts = [(run.seconds.get(phase, 0.0), sum(run.seconds.values())) for run in timed]
            rows.append([phase, *(f"{duration(seconds)} ({seconds / total:.1%})" for seconds, total in parts)])
    return ["Phase", *(run.name for run in timed)], rows


def facts_table(runs: Sequence[RunRecord]) -> Table:
    """The header and the rows about the newest checkpoint of each run: what made it, and its fingerprint."""
    known = [run for run in runs if run.facts]
    columns = [
        {
            "checkpoint": run.facts["step"],
            "fingerprint of the state": run.facts.get("fingerprint", {}).get("state", ""),
            "fingerprint of the parameters": run.facts.get("fingerprint", {}).get("params", ""),
            "data": run.facts.get("data", ""),
            **run.facts.get("made_by", {}),
        }
        for run in known
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return ["", *(run.name for run in known)], [[key, *(str(c.get(key, "")) for c in columns)] for key in keys]


def code_block(text: str) -> str:
    """A text as a code block of Markdown."""
    return "    " + text.replace("\n", "\n    ")
