"""Evaluates a model on tasks: finds their examples, scores them together, and puts published figures beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.config import GPT2Config, MeshConfig
from gpt2_jax.data.tokenizer import Tokenizer, tokenizer_name
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.examples import load_examples, locate
from gpt2_jax.evaluation.metrics import Metric
from gpt2_jax.evaluation.published import Figure, published_figures
from gpt2_jax.evaluation.requests import Score
from gpt2_jax.evaluation.scoring import Scorer
from gpt2_jax.evaluation.task import Prepared, Setting, Task
from gpt2_jax.evaluation.tasks import find_tasks
from gpt2_jax.model import GPT2, Params
from gpt2_jax.sharding import make_mesh

OPENAI_BLOCK_SIZE = 1024

Progress = Callable[[str, int, int], None]
"""Called with the name of a task, and the number of scored and of all its continuations."""


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
        prepared: what the model was asked.
        scores: what it answered.
    """

    task: str
    protocol: str
    data: str
    metrics: dict[str, Metric]
    published: dict[str, tuple[Figure, ...]]
    prepared: Prepared
    scores: list[list[Score]]

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields the scores of each continuation, in JSON types.

        A record has `origin`, such as "example 17" or "val.bin, window 3", `continuation` (its index), `tokens`,
        `log_probs` (nats per token) and `greedy` (whether each token is the most probable one).
        """
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


@dataclasses.dataclass(frozen=True, eq=False)
class ReadyTask:
    """A task with its requests, to be scored any number of times.

    Attributes:
        name: of the task.
        protocol: how the numbers are computed.
        data: where the examples come from.
        prepared: the requests.
        comparable: whether published figures compare with the results.
    """

    name: str
    protocol: str
    data: str
    prepared: Prepared
    comparable: bool

    def score(self, scorer: Scorer, progress: Progress | None = None) -> Result:
        """Scores the requests. All processes call it together."""

        def report(done: int, total: int) -> None:
            if progress:
                progress(self.name, done, total)

        scores = scorer.score(self.prepared.requests, report)
        metrics = {metric.name: metric for metric in self.prepared.metrics(scores)}
        config = scorer.model.config
        figures = {name: published_figures(self.name, name, config) for name in metrics if self.comparable}
        published = {name: found for name, found in figures.items() if found}
        return Result(self.name, self.protocol, self.data, metrics, published, self.prepared, scores)


def prepare_tasks(
    config: GPT2Config,
    tokenizer: Tokenizer | None,
    tasks: str | Sequence[str],
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    stride: int | None = None,
) -> list[ReadyTask]:
    """Reads the examples of tasks and makes their requests for a model with this config. Arguments as of `evaluate`.

    Whatever is missing or damaged is found here, before the first task takes its time.

    Raises:
        UserError: as `evaluate`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} examples leaves none; type --limit 1 or more")
    paths = [data] if isinstance(data, str | Path) else data
    setting = Setting(tokenizer, config.block_size, stride, limit)
    return [_prepare(task, paths, setting, config) for task in find_tasks(tasks)]


def _prepare(task: Task[Any], paths: Sequence[str | Path] | None, setting: Setting, config: GPT2Config) -> ReadyTask:
    found = locate(task, paths)
    examples = load_examples(task, found, setting.limit)
    prepared = task.prepare(examples, setting)
    _check(task, prepared, config)
    comparable = (
        found.standard
        and setting.limit is None
        and task.n_examples in (None, len(examples))
        and setting.tokenizer is not None
        and tokenizer_name(setting.tokenizer) == "gpt2"
        and config.block_size == OPENAI_BLOCK_SIZE
    )
    return ReadyTask(task.name, task.describe(setting), found.name, prepared, comparable)


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
    progress: Progress | None = None,
) -> dict[str, Result]:
    """Evaluates a model on tasks.

    Args:
        model: the model.
        params: its parameters, placed on `mesh`.
        tokenizer: its tokenizer; None is enough for the task `loss` on token files.
        tasks: names in `TASKS`, or one string with commas between them.
        data: files or directories with the public files; None for the Hugging Face hub. A directory is searched for
            the usual names of each task's file.
        limit: the most examples of a task; of a task that scores a stream, the most windows.
        mesh: the devices; one by default.
        stride: the tokens that a sliding window predicts; half of `block_size` by default.
        progress: called while the model scores.

    Returns:
        The results by the names of the tasks, in their order.

    Raises:
        UserError: a task is unknown, its examples are missing or damaged, or the model cannot read them.
    """
    ready = prepare_tasks(model.config, tokenizer, tasks, data=data, limit=limit, stride=stride)
    scorer = Scorer(model, params, mesh or make_mesh(MeshConfig(), jax.local_devices()[:1]))
    return {task.name: task.score(scorer, progress) for task in ready}


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
