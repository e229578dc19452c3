"""The evaluations of a run: its validation loss, and public tasks."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.activity import tracked
from gpt2_jax.compiler_options import Options
from gpt2_jax.config import TrainConfig
from gpt2_jax.data.pipeline import TokenWindows, eval_batches
from gpt2_jax.data.tokenizer import Tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import Evaluator
from gpt2_jax.model import GPT2, Params
from gpt2_jax.sharding import batch_sharding, local_rows, micro_batch_size, put_batch
from gpt2_jax.step import EvalStep


def validation_loss(
    eval_step: EvalStep, windows: TokenWindows, config: TrainConfig, mesh: Mesh, params: Params, limit: int
) -> tuple[float, int]:
    """The loss sum in nats over the first `limit` validation targets (0: all), and the number of targets.

    All processes call it together.
    """
    batch_size = mesh.size * micro_batch_size(config.batch_size, config.micro_batch_limit, mesh.size)
    sharding, rows = batch_sharding(mesh, leading_axis=False), functools.partial(local_rows, mesh)
    batches = eval_batches(windows, batch_size, limit, rows)
    targets = windows.n_tokens - len(windows.streams)
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in tracked(batches, min(limit or targets, targets), lambda _: batch_size * windows.block_size):
        sums.append(eval_step(params, put_batch(batch, sharding)))
        # One is computed and one waits. With 32 that wait, collectives on CPUs can block each other forever.
        jax.block_until_ready(sums[-2:-1])
    loss_sum, n_targets = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    return float(loss_sum), int(n_targets)


def open_tasks(
    config: TrainConfig, model: GPT2, tokenizer: Tokenizer | None, mesh: Mesh, options: Options
) -> Evaluator | None:
    """The evaluation of the tasks in `config.eval`; None if there are none.

    Raises:
        UserError: a task is unknown, its examples are missing or damaged, or `checkpoint.best` is none of its metrics.
    """
    names, best = config.eval.tasks, config.checkpoint.best
    if not names:
        return None
    evaluator = Evaluator(
        model,
        tokenizer,
        names,
        mesh,
        data=config.eval.tasks_data or None,
        limit=config.eval.tasks_limit or None,
        flag="--eval.tasks_data",
        options=options,
    )
    metrics = ["val_loss", *evaluator.metric_names()]
    if best not in metrics:
        raise UserError(f"checkpoint.best = {best!r}; expected one of {', '.join(metrics)}")
    return evaluator
