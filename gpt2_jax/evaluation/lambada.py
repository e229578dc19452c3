"""LAMBADA: the last word of a passage (Paperno et al., 2016), in the text that OpenAI prepared for GPT-2."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.examples import HubDataset, RowTask, text_field
from gpt2_jax.evaluation.metrics import Metric, accuracy
from gpt2_jax.evaluation.requests import Score
from gpt2_jax.evaluation.task import Collector, Prepared, Setting, totals


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage without its last word, and that word."""

    context: str
    word: str


class Lambada(RowTask[Passage]):
    """The protocol of lm-eval's task `lambada_openai`, lm_eval/tasks/lambada, and the paper's accuracy."""

    name = "lambada"
    protocol = (
        "lm-eval lambada_openai, 0-shot: acc if every token of the last word is the most probable one, perplexity of "
        "the word; last_token_acc for its last token only"
    )
    metric_names = ("acc", "perplexity", "last_token_acc")
    files = ("lambada_test.jsonl", "lambada_test_en.jsonl")
    hub = HubDataset("EleutherAI/lambada_openai", "default", "test")
    n_examples = 5153

    def from_row(self, row: dict[str, Any], where: str) -> Passage:
        """See `RowTask.from_row`. The last word is what follows the last space, as in lm-eval."""
        context, _, word = text_field(row, "text", where).rpartition(" ")
        if not word:
            raise UserError(f"{where}: the text is empty or ends with a space; expected a word at its end")
        return Passage(context, word)

    def prepare(self, examples: Sequence[Passage], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        collector = Collector()
        for number, example in enumerate(examples, 1):
            where = f"{self.name}, example {number}"
            pair = setting.pair(self.name, example.context, " " + example.word, where)
            collector.add([pair], f"example {number}")

        def metrics(scores: Sequence[Sequence[Score]]) -> list[Metric]:
            words = [score for (score,) in collector.by_example(scores)]
            return [
                accuracy("acc", np.array([bool(score.greedy.all()) for score in words])),
                Metric("perplexity", -totals(words), np.ones(len(words)), "perplexity"),
                accuracy("last_token_acc", np.array([bool(score.greedy[-1:].all()) for score in words])),
            ]

        return Prepared(collector.requests, collector.origins, metrics)
