"""What a task is: where its examples come from, what it asks of a model, and what it makes of the answers."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from gpt2_jax.data.encode import encode_prompt
from gpt2_jax.data.tokenizer import UNKNOWN, Boundaries, Tokenizer, boundaries
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.metrics import Metric
from gpt2_jax.evaluation.requests import Request, Score, Tokens, encode_pair

Example = TypeVar("Example")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What requests depend on besides the examples.

    Attributes:
        tokenizer: encodes texts; None if the model comes without one.
        block_size: the most tokens that the model sees.
        named: the tokens around a text, as far as the model's files name them; the others are the tokenizer's.
        stride: the tokens that a sliding window predicts; None for half of `block_size`.
        limit: the most windows of a task whose examples are windows; None for all.
    """

    tokenizer: Tokenizer | None
    block_size: int
    named: Boundaries = UNKNOWN
    stride: int | None = None
    limit: int | None = None

    @property
    def step(self) -> int:
        """The tokens that a sliding window predicts.

        Raises:
            UserError: `stride` is out of range.
        """
        stride = max(self.block_size // 2, 1) if self.stride is None else self.stride
        if not 1 <= stride <= self.block_size:
            raise UserError(f"stride = {stride}; expected 1 to {self.block_size}, the model's block_size")
        return stride

    @property
    def end_of_text(self) -> int | None:
        """The token that precedes a text; None if the tokenizer has none."""
        around = self.named.or_else(boundaries(self.tokenizer)) if self.tokenizer else self.named
        return around.start if around.start is not None else next(iter(around.ends), None)

    def need_tokenizer(self, task: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(f"{task} needs the model's tokenizer, which is not known; put its files beside the model")
        return self.tokenizer

    def need_end_of_text(self, task: str) -> int:
        """The token that precedes a text.

        Raises:
            UserError: there is none.
        """
        if self.end_of_text is None:
            raise UserError(
                f"{task} starts texts with the end-of-text token, which the tokenizer of this model does not have; "
                "leave this task out"
            )
        return self.end_of_text

    def encode(self, task: str, text: str, where: str) -> np.ndarray:
        """Encodes a text, int32 [tokens].

        Raises:
            UserError: the tokenizer cannot encode it. `where` names the text.
        """
        return np.asarray(encode_prompt(self.need_tokenizer(task), text, where), np.int32)

    def pair(self, task: str, context: str, continuation: str, where: str) -> tuple[list[int], list[int]]:
        """`encode_pair`, with the end-of-text token in place of an empty context.

        Raises:
            UserError: the tokenizer cannot encode them, or the context is empty and there is no end-of-text token.
        """
        before, after = encode_pair(self.need_tokenizer(task), context, continuation, where)
        return before or [self.need_end_of_text(task)], after


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What a task asks of a model.

    Attributes:
        requests: in any order.
        origins: where each request comes from, for errors and for lists of scores: "example 17".
        metrics: makes metrics of the scores of the requests.
    """

    requests: list[Request]
    origins: list[str]
    metrics: Callable[[Sequence[Sequence[Score]]], list[Metric]]


class Task(abc.ABC, Generic[Example]):
    """A task.

    Attributes:
        name: what the user types.
        protocol: how the numbers are computed, in a line. `describe` fills in {block_size} and {stride}.
        metric_names: of the metrics that it may have.
        files: the usual names of the public file with the examples, below a directory of data.
        other_files: names of files with the same examples in another form, for which no figures are published.
        n_examples: how many the published figures are over; None if it is not checked.
        limits_windows: True if a limit counts windows, False if it counts examples.
    """

    name: str
    protocol: str
    metric_names: tuple[str, ...]
    files: tuple[str, ...]
    other_files: tuple[str, ...] = ()
    n_examples: int | None = None
    limits_windows: bool = False

    def describe(self, setting: Setting) -> str:
        """The protocol with the sizes of windows. It is part of every result."""
        return self.protocol.format(block_size=setting.block_size, stride=setting.step)

    @abc.abstractmethod
    def read(self, path: Path) -> Iterator[Example]:
        """Reads the examples in a file, lazily.

        Raises:
            UserError: the file cannot be read, or is not what it should be; with the number of the line.
        """

    @abc.abstractmethod
    def prepare(self, examples: Sequence[Example], setting: Setting) -> Prepared:
        """Makes the requests.

        Raises:
            UserError: an example cannot be encoded, or the tokenizer has no end-of-text token and the task needs one.
        """


class Collector:
    """Collects requests whose continuations belong to examples."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.origins: list[str] = []
        self._places: list[list[tuple[int, int]]] = []

    def add(self, pairs: Sequence[tuple[Tokens, Tokens]], origin: str) -> None:
        """Adds an example: pairs of a context and a continuation. Equal contexts are shared."""
        by_context: dict[tuple[int, ...], int] = {}
        grouped: dict[int, list[Tokens]] = {}
        places = []
        for context, continuation in pairs:
            index = by_context.setdefault(tuple(map(int, context)), len(self.requests) + len(by_context))
            group = grouped.setdefault(index, [])
            places.append((index, len(group)))
            group.append(continuation)
        for context, index in by_context.items():
            self.requests.append(Request(context, tuple(grouped[index])))
            self.origins.append(origin)
        self._places.append(places)

    def by_example(self, scores: Sequence[Sequence[Score]]) -> list[list[Score]]:
        """The scores of each example, in the order of its pairs."""
        return [[scores[request][continuation] for request, continuation in places] for places in self._places]


def totals(scores: Sequence[Score]) -> np.ndarray:
    """The log-probabilities of continuations in nats, float64 [continuations]."""
    return np.array([score.total for score in scores], np.float64)


def nats(scores: Sequence[Score]) -> float:
    """The loss over continuations, summed: −log p."""
    return -float(totals(scores).sum())
