"""A report as Markdown: the tables of the page, for an issue, a README or a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpt2_jax.reports.records import RunRecord, config_differences, evaluation_keys
from gpt2_jax.reports.tables import code_block, evaluation_table, facts_table, summary_table, time_table


def write_markdown(runs: Sequence[RunRecord]) -> str:
    """The report about some runs."""
    sections = [("", *summary_table(runs))]
    if any(evaluation_keys(runs)):
        sections.append(("Evaluations", *evaluation_table(runs)))
    if any(run.seconds for run in runs):
        sections.append(("Where the time went", *time_table(runs)))
    if len(runs) > 1 and (different := config_differences(runs)):
        rows = [[key, *(f"`{value!r}`" for value in values)] for key, values in different.items()]
        sections.append(("Differences of the configs", ["Key", *(run.name for run in runs)], rows))
    if any(run.facts for run in runs):
        sections.append(("Made by", *facts_table(runs)))
    parts = [f"# {', '.join(run.name for run in runs)}\n"]
    for title, header, rows in sections:
        parts.append((f"## {title}\n\n" if title else "") + table(header, rows))
    if texts := [_samples(run) for run in runs if run.samples]:
        parts.append("## Samples\n\n" + "\n".join(texts))
    return "\n".join(parts)


def _samples(run: RunRecord) -> str:
    """What the model wrote last."""
    step = max(row["step"] for row in run.samples)
    texts = [f"{row['prompt']}{row['text']}" for row in run.samples if row["step"] == step]
    blocks = [code_block(text) + "\n" for text in texts]
    return f"{run.name}, update {step:,}:\n\n" + "\n".join(blocks)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
