"""HellaSwag: which of four endings follows a text (Zellers et al., 2019), by the two protocols in use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.examples import HubDataset, RowTask, label_field, text_field, text_list
from gpt2_jax.evaluation.metrics import Metric, accuracy
from gpt2_jax.evaluation.requests import Score
from gpt2_jax.evaluation.task import Collector, Prepared, Setting, totals

ENDINGS = 4
N_EXAMPLES = 10_042
BRACKETS = re.compile(r"\[.*?\]")  # as in lm-eval, not across lines


@dataclasses.dataclass(frozen=True)
class Choice:
    """A context, the endings to choose from, and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


class HellaSwag(RowTask[Choice]):
    """The protocol of lm-eval's task `hellaswag`, lm_eval/tasks/hellaswag."""

    name = "hellaswag"
    protocol = (
        'lm-eval hellaswag, 0-shot: "Activity: ctx_a Ctx_b" without brackets; acc by summed log-probability, acc_norm '
        "by log-probability per character of the ending"
    )
    metric_names = ("acc", "acc_norm")
    files: tuple[str, ...] = ("hellaswag_val.jsonl", "hellaswag_val_pre.jsonl")
    hub = HubDataset("Rowan/hellaswag", None, "validation")
    n_examples = N_EXAMPLES

    def from_row(self, row: dict[str, Any], where: str) -> Choice:
        """See `RowTask.from_row`. Rows are those of rowanz/hellaswag, or have the cleaned context in `query`."""
        endings, label = text_list(row, "endings", ENDINGS, where), label_field(row, "label", ENDINGS, where)
        if "query" in row:
            # Cleaned before, but a few texts still have brackets. Cleaning all of them again would remove more spaces.
            texts = [clean(text) if "[" in text else text for text in (text_field(row, "query", where), *endings)]
        else:
            activity, first, second = (text_field(row, name, where) for name in ("activity_label", "ctx_a", "ctx_b"))
            texts = [clean(text) for text in (f"{activity}: {first} {second.capitalize()}", *endings)]
        return Choice(texts[0], tuple(texts[1:]), label)

    def prepare(self, examples: Sequence[Choice], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        collector = Collector()
        for number, example in enumerate(examples, 1):
            where = f"{self.name}, example {number}"
            pairs = [setting.pair(self.name, example.context, " " + ending, where) for ending in example.endings]
            collector.add(pairs, f"example {number}")
        lengths = np.array([[len(ending) for ending in example.endings] for example in examples], np.float64)

        def metrics(scores: Sequence[Sequence[Score]]) -> list[Metric]:
            sums = np.array([totals(row) for row in collector.by_example(scores)])
            with np.errstate(divide="ignore", invalid="ignore"):  # An empty ending gets −inf, as in lm-eval.
                return choice_metrics(sums, sums / lengths, examples)

        return Prepared(collector.requests, collector.origins, metrics)


class HellaSwagCompletion(HellaSwag):
    """The protocol of build-nanogpt and llm.c, hellaswag.py."""

    name = "hellaswag-completion"
    protocol = (
        "build-nanogpt and llm.c hellaswag.py: the raw ctx, then a space and the raw ending, encoded separately; acc "
        "by the summed loss of the ending, acc_norm by its mean per token"
    )
    files = ("hellaswag_val.jsonl",)

    def from_row(self, row: dict[str, Any], where: str) -> Choice:
        """See `RowTask.from_row`."""
        if "ctx" not in row and "query" in row:
            raise UserError(
                f"{where} has a cleaned context (query); expected the raw one (ctx): download hellaswag_val.jsonl of "
                "rowanz/hellaswag, or choose the task hellaswag"
            )
        endings, label = text_list(row, "endings", ENDINGS, where), label_field(row, "label", ENDINGS, where)
        return Choice(text_field(row, "ctx", where), endings, label)

    def prepare(self, examples: Sequence[Choice], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        collector = Collector()
        lengths = []
        for number, example in enumerate(examples, 1):
            where = f"{self.name}, example {number}"
            context = setting.encode(self.name, example.context, where)
            if not len(context):
                context = np.array([setting.need_end_of_text(self.name)], np.int32)
            endings = [setting.encode(self.name, " " + ending, where) for ending in example.endings]
            collector.add([(context, ending) for ending in endings], f"example {number}")
            lengths.append([len(ending) for ending in endings])
        n_tokens = np.array(lengths, np.float64)

        def metrics(scores: Sequence[Sequence[Score]]) -> list[Metric]:
            sums = np.array([totals(row) for row in collector.by_example(scores)])
            return choice_metrics(sums, sums / n_tokens, examples)

        return Prepared(collector.requests, collector.origins, metrics)


def clean(text: str) -> str:
    """Removes the marks of WikiHow from a text, as lm-eval's `preprocess` in tasks/hellaswag/utils.py."""
    return BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def choice_metrics(sums: np.ndarray, normalized: np.ndarray, examples: Sequence[Choice]) -> list[Metric]:
    """acc and acc_norm: the highest log-probability is right. Of equal ones the first is chosen.

    Args:
        sums: float64 [examples, endings].
        normalized: the same, each divided by the length of the ending.
        examples: have the right choices.
    """
    labels = np.array([example.label for example in examples])
    return [
        accuracy("acc", sums.argmax(axis=1) == labels),
        accuracy("acc_norm", normalized.argmax(axis=1) == labels),
    ]
