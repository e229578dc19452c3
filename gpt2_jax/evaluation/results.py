"""Evaluates a model on tasks: finds their examples, scores them together, and puts published figures beside."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.compiler_options import Options
from gpt2_jax.config import GPT2Config, MeshConfig
from gpt2_jax.data.tokenizer import UNKNOWN, Boundaries, Tokenizer, tokenizer_name
from gpt2_jax.distributed.agreement import assert_equal
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.examples import Found, load_examples, locate
from gpt2_jax.evaluation.metrics import Metric, Reported
from gpt2_jax.evaluation.published import Figure, published_figures
from gpt2_jax.evaluation.requests import Score
from gpt2_jax.evaluation.scoring import Scorer
from gpt2_jax.evaluation.task import Prepared, Setting, Task
from gpt2_jax.evaluation.tasks import TASKS, find_tasks
from gpt2_jax.model import GPT2, Params
from gpt2_jax.sharding import make_mesh

OPENAI_BLOCK_SIZE = 1024

Progress = Callable[[str, int], None]
"""Called with the name of a task, and the number of its continuations that are scored."""


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a task found.

    Attributes:
        task: its name.
        protocol: how the numbers are computed.
        data: where the examples come from.
        metrics: by their names. Each has its values per example.
        published: figures to compare with, by the names of metrics; none unless the examples, the tokenizer and
            `block_size` are those of the figures.
        prepared: what the model was asked; None for a task of lm-eval.
        scores: what it answered.
        directions: whether a higher value is better, by the names of metrics whose names do not tell.
    """

    task: str
    protocol: str
    data: str
    metrics: Mapping[str, Metric | Reported]
    published: dict[str, tuple[Figure, ...]]
    prepared: Prepared | None = None
    scores: Sequence[Sequence[Score]] = ()
    directions: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    def same_examples(self, other: Result) -> bool:
        """True if another model got the same examples. Windows of a text depend on its tokenizer and `block_size`."""
        if self.prepared is None or other.prepared is None or not TASKS[self.task].limits_windows:
            return all(
                metric.count == other.metrics[name].count
                for name, metric in self.metrics.items()
                if name in other.metrics
            )
        return _digest(self.prepared) == _digest(other.prepared)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields the scores of each continuation, in JSON types.

        A record has `origin`, such as "example 17" or "val.bin, window 3", `continuation` (its index), `tokens`,
        `log_probs` (nats per token) and `greedy` (whether no token is more probable).
        """
        if self.prepared is None:
            return
        asked = zip(self.prepared.requests, self.prepared.origins, self.scores, strict=True)
        for request, origin, scores in asked:
            for number, (tokens, score) in enumerate(zip(request.continuations, scores, strict=True)):
                yield {
                    "origin": origin,
                    "continuation": number,
                    "tokens": np.asarray(tokens).tolist(),
                    "log_probs": score.log_probs.tolist(),
                    "greedy": score.greedy.tolist(),
                }


class Evaluator:
    """Evaluates a model on tasks, as often as it is called: the examples are read and encoded once.

    Args:
        model: the model.
        tokenizer: its tokenizer; None is enough for the task `loss` on token files.
        tasks: names in `TASKS`, or one string with commas between them.
        mesh: the devices. All processes call the evaluator together.
        data: files or directories with the public files; None for the Hugging Face hub. A directory is searched for
            the usual names of each task's file.
        limit: the most examples of a task; of a task that scores a stream, the most windows. None for all.
        stride: the tokens that a sliding window predicts; None for half of `block_size`.
        named: the tokens around a text, as far as the model's files name them; the others are the tokenizer's.
        flag: the flag or key that `data` comes from, for errors.
        options: those of XLA.

    Raises:
        UserError: a task is unknown, its examples are missing or damaged, or the model cannot read them.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer | None,
        tasks: str | Sequence[str],
        mesh: Mesh,
        *,
        data: Sequence[str | Path] | None = None,
        limit: int | None = None,
        stride: int | None = None,
        named: Boundaries = UNKNOWN,
        flag: str = "--data",
        options: Options | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"limit = {limit} leaves no examples; expected 1 or more")
        self._setting = Setting(tokenizer, model.config.block_size, named, stride, limit)
        self._tasks = [self._prepare(task, locate(task, data, flag), model.config) for task in find_tasks(tasks)]
        for prepared in self._tasks:  # processes with other requests would wait for each other forever
            assert_equal(f"examples of {prepared.task.name}", _digest(prepared.asked))
        self._scorer = Scorer(model, mesh, options)

    def n_continuations(self) -> dict[str, int]:
        """The continuations to score by the names of the tasks, without empty ones."""
        return {
            prepared.task.name: sum(
                len(continuation) > 0 for request in prepared.asked.requests for continuation in request.continuations
            )
            for prepared in self._tasks
        }

    def __call__(self, params: Params, progress: Progress = lambda task, done: None) -> dict[str, Result]:
        """The results by the names of the tasks, in their order.

        Args:
            params: the parameters, placed on the mesh.
            progress: called while the model scores.
        """
        return {prepared.task.name: self._run(prepared, params, progress) for prepared in self._tasks}

    def metric_names(self) -> list[str]:
        """The names of all metrics that the results may have: TASK/METRIC."""
        return [f"{prepared.task.name}/{name}" for prepared in self._tasks for name in prepared.task.metric_names]

    def references(self) -> dict[str, float]:
        """The figures of OpenAI's model of the same size by TASK/METRIC, over all examples of a task."""
        figures = {
            f"{prepared.task.name}/{name}": published_figures(prepared.task.name, name, self._scorer.model.config)
            for prepared in self._tasks
            if prepared.comparable
            for name in prepared.task.metric_names
        }
        return {name: found[0].value for name, found in figures.items() if found and found[0].same_protocol}

    def _prepare(self, task: Task[Any], found: Found, config: GPT2Config) -> _Prepared:
        """Reads the examples of a task and makes its requests.

        Raises:
            UserError: the examples are damaged, or the model cannot read them.
        """
        setting = self._setting
        examples = load_examples(task, found, setting.limit)
        asked = task.prepare(examples, setting)
        _check(task, asked, config)
        comparable = (
            found.standard
            and (setting.limit is not None or task.n_examples in (None, len(examples)))
            and setting.tokenizer is not None
            and tokenizer_name(setting.tokenizer) == "gpt2"
            and config.block_size == OPENAI_BLOCK_SIZE
        )
        return _Prepared(task, found, asked, comparable)

    def _run(self, prepared: _Prepared, params: Params, progress: Progress) -> Result:
        task, asked = prepared.task, prepared.asked
        scores = self._scorer.score(params, asked.requests, functools.partial(progress, task.name))
        metrics = {metric.name: metric for metric in asked.metrics(scores)}
        published: dict[str, tuple[Figure, ...]] = {}
        if prepared.comparable and self._setting.limit is None:
            figures = {name: published_figures(task.name, name, self._scorer.model.config) for name in metrics}
            published = {name: found for name, found in figures.items() if found}
        return Result(task.name, task.describe(self._setting), prepared.found.name, metrics, published, asked, scores)


class _Prepared(NamedTuple):
    """A task whose requests are made. `comparable` says that published figures are over all of the same examples."""

    task: Task[Any]
    found: Found
    asked: Prepared
    comparable: bool


def evaluate(
    model: GPT2,
    params: Params,
    tokenizer: Tokenizer | None,
    tasks: str | Sequence[str],
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    mesh: Mesh | None = None,
    stride: int | None = None,
    progress: Progress = lambda task, done: None,
) -> dict[str, Result]:
    """Evaluates a model on tasks, once. The arguments are those of `Evaluator` and of a call of it.

    Args:
        mesh: the devices, on which `params` are placed; one by default.

    Returns:
        The results by the names of the tasks, in their order.

    Raises:
        UserError: a task is unknown, its examples are missing or damaged, or the model cannot read them.
    """
    paths = [data] if isinstance(data, str | Path) else data
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    return Evaluator(model, tokenizer, tasks, mesh, data=paths, limit=limit, stride=stride)(params, progress)


def _digest(asked: Prepared) -> str:
    """A checksum of all tokens of requests."""
    checksum = 0
    for request in asked.requests:
        for part in (request.context, *request.continuations):
            checksum = zlib.crc32(np.asarray(part, np.int32).tobytes() + b"|", checksum)
    return f"{len(asked.requests)} requests, crc32 {checksum:08x}"


def _check(task: Task[Any], prepared: Prepared, config: GPT2Config) -> None:
    """Checks that the model can read every request.

    Raises:
        UserError: a continuation is longer than `block_size`, or a token is not in the vocabulary.
    """
    for request, origin in zip(prepared.requests, prepared.origins, strict=True):
        longest = max(map(len, request.continuations))
        if longest > config.block_size:
            raise UserError(
                f"{task.name}, {origin}: {longest:,} tokens are to be predicted together, and the model's "
                f"block_size is {config.block_size:,}; take a model with a longer one, or leave the task out"
            )
        largest = max(int(np.max(part)) for part in (request.context, *request.continuations) if len(part))
        if largest >= config.vocab_size:
            raise UserError(
                f"{task.name}, {origin}: the text has the token {largest:,}, and the model's vocabulary ends at "
                f"{config.vocab_size - 1:,}; take the tokenizer that the model was trained with"
            )
