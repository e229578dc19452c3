"""Metrics as ratios of sums over examples, with their standard errors, and differences between two models."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

Scale = Literal["mean", "perplexity", "bits"]


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """A number over examples: a function of Σ sums / Σ weights.

    Attributes:
        name: its name, such as "acc_norm".
        sums: float64 [examples]. Nats are positive: −log p.
        weights: float64 [examples]; ones for a plain mean.
        scale: the function: "mean" is the ratio, "perplexity" its exponential, "bits" converts nats to bits.

    Raises:
        ValueError: there are no examples, not as many weights as sums, or no weight.
    """

    name: str
    sums: np.ndarray
    weights: np.ndarray
    scale: Scale = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums", np.asarray(self.sums, np.float64))
        object.__setattr__(self, "weights", np.asarray(self.weights, np.float64))
        if not self.sums.size or self.sums.shape != self.weights.shape or not self.weights.sum() > 0:
            raise ValueError(f"{self.name} has sums {self.sums.shape} and weights {self.weights.shape}")

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.sums)

    @property
    def ratio(self) -> float:
        """Σ sums / Σ weights."""
        return float(self.sums.sum() / self.weights.sum())

    @property
    def value(self) -> float:
        """The metric. A perplexity may overflow to infinity."""
        match self.scale:
            case "mean":
                return self.ratio
            case "bits":
                return self.ratio / math.log(2)
            case "perplexity":
                with np.errstate(over="ignore"):
                    return float(np.exp(self.ratio))

    @property
    def stderr(self) -> float | None:
        """The standard error of `value`; None for fewer than two examples.

        It is that of a ratio estimator by the delta method (Cochran, Sampling Techniques, 1977, section 6.3). For a
        plain mean it is the sample standard deviation over √n.
        """
        return _standard_error(self._influence()) if math.isfinite(self.value) else None

    def _influence(self) -> np.ndarray:
        """How much each example contributes to the error of `value` to first order, float64 [examples]."""
        slope = {"mean": 1.0, "bits": 1 / math.log(2), "perplexity": self.value}[self.scale]
        return slope * (self.sums - self.ratio * self.weights) / self.weights.sum()


@dataclasses.dataclass(frozen=True)
class Reported:
    """A number of a task of lm-eval, without the values of its examples."""

    name: str
    value: float
    stderr: float | None
    count: int


def accuracy(name: str, right: np.ndarray) -> Metric:
    """The share of the examples that are right, bool [examples]."""
    return Metric(name, np.asarray(right, np.float64), np.ones(len(right)))


def higher_is_better(name: str) -> bool:
    """True for accuracies, which have "acc" in their names; False for losses and perplexities."""
    return "acc" in name.split("_")


def paired_difference(a: Metric | Reported, b: Metric | Reported) -> tuple[float, float | None]:
    """The difference of a metric between two models on the same examples.

    An example that is hard for both models changes the difference little, so this standard error is smaller than that
    of independent samples.

    Returns:
        `a.value - b.value`, and its standard error; None for fewer than two examples, or if they are not known.

    Raises:
        ValueError: they are over different numbers of examples.
    """
    if a.count != b.count:
        raise ValueError(f"{a.name} is over {a.count} examples, {b.name} over {b.count}; expected the same examples")
    if isinstance(a, Reported) or isinstance(b, Reported):
        return a.value - b.value, None
    difference = a.value - b.value
    return difference, _standard_error(a._influence() - b._influence()) if math.isfinite(difference) else None


def _standard_error(influence: np.ndarray) -> float | None:
    n = len(influence)
    return math.sqrt(n / (n - 1) * float(np.square(influence).sum())) if n > 1 else None
