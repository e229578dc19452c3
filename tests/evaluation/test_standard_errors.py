"""Metrics: values and standard errors against formulas written another way."""

import math
import statistics

import numpy as np
import pytest

from gpt2_jax.evaluation import TASKS, Metric, paired_difference
from gpt2_jax.evaluation.metrics import accuracy, higher_is_better


def test_an_accuracy_has_the_standard_error_of_lm_eval():
    right = [True, False, False, True, True, False, True]
    metric = accuracy("acc", np.array(right))
    # lm_eval/api/metrics.py: the mean, and the sample standard deviation over √n.
    assert metric.value == pytest.approx(statistics.fmean(right))
    assert metric.stderr == pytest.approx(statistics.stdev(map(float, right)) / math.sqrt(len(right)))
    assert metric.count == 7


def test_only_accuracies_are_better_when_higher():
    for task in TASKS.values():
        for name in task.metric_names:
            assert higher_is_better(name) == (name in ("acc", "acc_norm", "last_token_acc")), name
    assert not higher_is_better("")  # of val_loss


def test_a_perplexity_is_lm_evals():
    log_probs, words = [-12.5, -80.25, -3.0], [4, 19, 2]
    metric = Metric("word_perplexity", -np.array(log_probs), np.array(words), "perplexity")
    weighted_mean = sum(log_probs) / sum(words)
    assert metric.value == pytest.approx(math.exp(-weighted_mean))
    bits = Metric("bits_per_byte", -np.array(log_probs), np.array(words), "bits")
    assert bits.value == pytest.approx(-weighted_mean / math.log(2))


@pytest.mark.parametrize("scale", ["mean", "perplexity", "bits"])
def test_the_standard_error_of_a_ratio_is_that_of_many_samples(scale):
    """The spread of the value over samples from a population, which the delta method only approximates."""
    rng = np.random.default_rng(0)
    weights = rng.integers(5, 40, (4000, 300)).astype(float)
    sums = weights * rng.normal(1.5, 0.3, weights.shape) + rng.normal(0, 2, weights.shape)
    metrics = [Metric("x", s, w, scale) for s, w in zip(sums, weights, strict=True)]
    spread = statistics.stdev(metric.value for metric in metrics)
    assert statistics.fmean(metric.stderr or 0 for metric in metrics) == pytest.approx(spread, rel=0.05)


def test_one_example_has_no_standard_error():
    metric = accuracy("acc", np.array([True]))
    assert metric.value == 1
    assert metric.stderr is None
    assert paired_difference(metric, metric) == (0, None)


def test_a_perplexity_can_be_infinite():
    metric = Metric("perplexity", np.array([2000.0, 3.0]), np.ones(2), "perplexity")
    assert metric.value == math.inf


def test_a_paired_difference_of_accuracies_is_that_of_the_differences():
    a, b = np.array([1, 1, 0, 1, 0, 1], bool), np.array([1, 0, 0, 0, 1, 1], bool)
    difference, stderr = paired_difference(accuracy("acc", a), accuracy("acc", b))
    differences = a.astype(float) - b
    assert difference == pytest.approx(statistics.fmean(differences))
    assert stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(6))


def test_a_paired_difference_cancels_what_is_common():
    rng = np.random.default_rng(1)
    weights, hard = rng.integers(5, 40, 500), rng.normal(3, 1, 500)
    better = Metric("loss", weights * hard, weights, "perplexity")
    worse = Metric("loss", weights * (hard + 0.01), weights, "perplexity")
    difference, stderr = paired_difference(worse, better)
    assert difference == pytest.approx(better.value * (math.exp(0.01) - 1))
    assert stderr is not None
    assert better.stderr is not None
    assert stderr == pytest.approx(better.stderr * (math.exp(0.01) - 1))


def test_a_paired_difference_needs_the_same_examples():
    with pytest.raises(ValueError, match="over 2 examples, acc over 3"):
        paired_difference(accuracy("acc", np.ones(2)), accuracy("acc", np.ones(3)))


@pytest.mark.parametrize(("sums", "weights"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_a_metric_needs_examples_with_weights(sums, weights):
    with pytest.raises(ValueError, match="acc has sums"):
        Metric("acc", np.array(sums), np.array(weights))
