"""Evaluation: the numbers that people compare GPT-2s by, computed as the published protocols do."""

from gpt2_jax.evaluation.metrics import Metric, paired_difference
from gpt2_jax.evaluation.published import Figure
from gpt2_jax.evaluation.results import Evaluator, Result, evaluate
from gpt2_jax.evaluation.tasks import TASKS

__all__ = ["TASKS", "Evaluator", "Figure", "Metric", "Result", "evaluate", "paired_difference"]
