"""The Children's Book Test (Hill et al., 2015): which of ten words a sentence of a story leaves out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.examples import text_lines
from gpt2_jax.evaluation.metrics import Metric, accuracy
from gpt2_jax.evaluation.requests import Score
from gpt2_jax.evaluation.task import Collector, Prepared, Setting, Task, totals

CONTEXT_LINES = 20
CANDIDATES = 10
BLANK = "XXXXX"


@dataclasses.dataclass(frozen=True)
class Cloze:
    """The story up to the blank, the rest of the sentence, the candidates, and the index of the right one."""

    before: str
    after: str
    candidates: tuple[str, ...]
    label: int


class ChildrensBooks(Task[Cloze]):
    """One of the kinds of words: CN are common nouns, NE named entities.

    The paper reports the validation questions, as WebText has one of the books of the test questions.
    """

    metric_names = ("acc",)
    protocol = (
        "GPT-2 paper, section 3.2: 20 sentences and the query as detokenized text; acc by the log-probability of the "
        "candidate and the rest of the query"
    )

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.files, self.other_files = (
            (f"cbtest_{kind}_{split}ep.txt", f"CBTest/data/cbtest_{kind}_{split}ep.txt")
            for split in ("valid_2000", "test_2500")
        )

    def read(self, path: Path) -> Iterator[Cloze]:
        """See `Task.read`."""
        story: list[str] = []
        for line, where in text_lines(path, "a sentence"):
            if not line.strip():
                continue
            number, _, content = line.partition(" ")
            if number != str(len(story) + 1):
                raise UserError(
                    f"{where} begins with {number[:20]!r}; expected {len(story) + 1}, the number of a sentence in a "
                    f"story of {CONTEXT_LINES + 1}"
                )
            story.append(content)
            if len(story) > CONTEXT_LINES:
                yield _cloze(story, where)
                story = []
        if story:
            raise UserError(
                f"{path} ends after sentence {len(story)} of a story; expected {CONTEXT_LINES + 1}: copy it again"
            )

    def prepare(self, examples: Sequence[Cloze], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        collector = Collector()
        for number, example in enumerate(examples, 1):
            where = f"{self.name}, example {number}"
            # With the blank in it, as what follows can join with the candidate: "king 's".
            before, _, after = detokenize(f"{example.before} {BLANK} {example.after}").rpartition(BLANK)
            pairs = [setting.pair(self.name, before, word + after, where) for word in example.candidates]
            collector.add(pairs, f"example {number}")
        labels = np.array([example.label for example in examples])

        def metrics(scores: Sequence[Sequence[Score]]) -> list[Metric]:
            sums = np.array([totals(row) for row in collector.by_example(scores)])
            return [accuracy("acc", sums.argmax(axis=1) == labels)]

        return Prepared(collector.requests, collector.origins, metrics)


def _cloze(story: list[str], where: str) -> Cloze:
    query, *fields = [field.strip() for field in story[-1].split("\t") if field.strip()]
    candidates = tuple(fields[1].split("|")) if len(fields) == 2 else ()
    if query.count(BLANK) != 1 or len(candidates) != CANDIDATES or fields[0] not in candidates:
        raise UserError(
            f"{where} is no question; expected a sentence with {BLANK} once, the answer and {CANDIDATES} candidates "
            "with the answer among them, between tabs"
        )
    before, _, after = query.partition(BLANK)
    return Cloze(
        " ".join((*story[:-1], before.strip())).strip(), after.strip(), candidates, candidates.index(fields[0])
    )


# The marks of the Penn Treebank. Only these are undone; a quotation mark ' stays apart, as it may open or close.
_RULES = (
    (re.compile(r" (n't|'(?:s|re|ve|ll|d|m|S))(?!\w)"), r"\1"),
    (re.compile(r" ([.,;:?!])(?!\S)"), r"\1"),  # before the quotation marks, which would follow it directly
    (re.compile(r"(?<!\S)`` ?"), '"'),
    (re.compile(r" ?''(?!\S)"), '"'),
    (re.compile(r"(?<!\S)` "), "'"),
    (re.compile(r"-LRB- ?"), "("),
    (re.compile(r" ?-RRB-"), ")"),
)


def detokenize(text: str) -> str:
    """Undoes the tokenization of the Penn Treebank, as far as rules can."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
