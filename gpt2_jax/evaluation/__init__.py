"""Evaluation: the numbers that people compare GPT-2s by, computed as the published protocols do."""

from gpt2_jax.evaluation.metrics import Metric, paired_difference
from gpt2_jax.evaluation.published import Figure
from gpt2_jax.evaluation.results import ReadyTask, Result, evaluate, prepare_tasks
from gpt2_jax.evaluation.tasks import TASKS

__all__ = ["TASKS", "Figure", "Metric", "ReadyTask", "Result", "evaluate", "paired_difference", "prepare_tasks"]
