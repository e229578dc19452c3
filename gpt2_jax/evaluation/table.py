"""Results as the lines of a table, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_jax.evaluation.metrics import higher_is_better, paired_difference
from gpt2_jax.evaluation.results import Result

Results = Mapping[str, Result]


def table(models: Mapping[str, Results]) -> list[str]:
    """The table of one model with published figures, or of several with their differences from the first."""
    first, *others = models.values()
    lines = _compared(models) if others else _single(first)
    return [*lines, "", *(f"{result.task}: {result.protocol}; {result.data}" for result in first.values())]


def _single(results: Results) -> list[str]:
    rows = [["task", "metric", "value", "stderr", "count", "OpenAI's weights"]]
    for result in results.values():
        for index, (name, metric) in enumerate(result.metrics.items()):
            published = ", ".join(
                number(figure.value) + ("" if figure.same_protocol else " (paper)")
                for figure in result.published.get(name, ())
            )
            row = [name, number(metric.value), number(metric.stderr), f"{metric.count:,}", published]
            rows.append(["" if index else result.task, *row])
    return aligned(rows, numbers={2, 3, 4})


def _compared(models: Mapping[str, Results]) -> list[str]:
    names, (first, *others) = _short(list(models)), models.values()
    header = ["task", "metric", "count", names[0]]
    for name in names[1:]:
        header += [name, "difference", "stderr"]
    rows = [header]
    for task, result in first.items():
        for index, (name, metric) in enumerate(result.metrics.items()):
            row = ["" if index else task, name, f"{metric.count:,}", number(metric.value)]
            for other in others:
                compared = other[task].metrics.get(name)
                if compared is None:  # such as bits per byte with a tokenizer that is not known
                    row += ["", "", ""]
                    continue
                if not result.same_examples(other[task]):
                    row += [number(compared.value), "", ""]
                    continue
                difference, stderr = paired_difference(compared, metric)
                row += [number(compared.value), f"{difference:+.4f}", number(stderr)]
            rows.append(row)
    return aligned(rows, numbers=set(range(2, len(header))))


def _short(names: Sequence[str]) -> list[str]:
    """The models by the ends of their names, or by letters if those are equal."""
    ends = [name.rstrip("/").rpartition("/")[2] for name in names]
    return ends if len(set(ends)) == len(ends) else [chr(ord("A") + index) for index in range(len(names))]


def number(value: float | None) -> str:
    """Formats a value: four decimals below 10, two above; "" for None."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def aligned(rows: Sequence[Sequence[str]], numbers: set[int]) -> list[str]:
    """Aligns the columns of a table: those in `numbers` to the right, the others to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(text: str, index: int) -> str:
        return text.rjust(widths[index]) if index in numbers else text.ljust(widths[index])

    return ["  ".join(cell(text, index) for index, text in enumerate(row)).rstrip() for row in rows]


def to_json(models: Mapping[str, Results]) -> dict[str, Any]:
    """The content of `--json`. Programs read its keys. A perplexity that is infinite is null."""
    (_, first), *others = models.items()
    return {
        "models": {
            name: {task: _result(result) for task, result in results.items()} for name, results in models.items()
        },
        "differences": {name: _differences(results, first) for name, results in others},
    }


def _result(result: Result) -> dict[str, Any]:
    metrics = {
        name: {
            "value": _finite(metric.value),
            "stderr": _finite(metric.stderr),
            "count": metric.count,
            "higher_is_better": result.directions.get(name, higher_is_better(name)),
            "published": [figure._asdict() for figure in result.published.get(name, ())],
        }
        for name, metric in result.metrics.items()
    }
    return {"protocol": result.protocol, "data": result.data, "metrics": metrics}


def _differences(results: Results, first: Results) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    for task, result in results.items():
        for name in result.metrics.keys() & first[task].metrics.keys() if result.same_examples(first[task]) else ():
            difference, stderr = paired_difference(result.metrics[name], first[task].metrics[name])
            entry = {"difference": _finite(difference), "stderr": _finite(stderr)}
            differences.setdefault(task, {})[name] = entry
    return differences


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
