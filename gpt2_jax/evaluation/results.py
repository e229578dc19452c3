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
from gpt2_jax.evaluation.examples import Found, load_examples, locate
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
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} examples leaves none; type --limit 1 or more")
    chosen = find_tasks(tasks)
    paths = [data] if isinstance(data, str | Path) else data
    setting = Setting(tokenizer, model.config.block_size, stride, limit)
    # Whatever is missing or damaged is found before the first task takes its time.
    everything = [(task, *prepare(task, locate(task, paths), setting, model.config)) for task in chosen]
    scorer = Scorer(model, params, mesh or make_mesh(MeshConfig(), jax.local_devices()[:1]))
    return {
        task.name: score(task, found, prepared, comparable, setting, scorer, progress)
        for task, found, prepared, comparable in everything
    }


def prepare(task: Task[Any], found: Found, setting: Setting, config: GPT2Config) -> tuple[Found, Prepared, bool]:
    """Reads the examples of a task and makes its requests.

    Returns:
        Where they come from, the requests, and whether published figures compare with the results.

    Raises:
        UserError: the examples are damaged, or the model cannot read them.
    """
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
    return found, prepared, comparable


def score(
    task: Task[Any],
    found: Found,
    prepared: Prepared,
    comparable: bool,
    setting: Setting,
    scorer: Scorer,
    progress: Progress | None = None,
) -> Result:
    """Scores the requests of a task. All processes call it together."""

    def report(done: int, total: int) -> None:
        if progress:
            progress(task.name, done, total)

    scores = scorer.score(prepared.requests, report)
    metrics = {metric.name: metric for metric in prepared.metrics(scores)}
    figures = {name: published_figures(task.name, name, scorer.model.config) for name in metrics if comparable}
    published = {name: found for name, found in figures.items() if found}
    return Result(task.name, task.describe(setting), found.name, metrics, published, prepared, scores)


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
