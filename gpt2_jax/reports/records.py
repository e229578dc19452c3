"""What the directory of a run tells: its config, rows, samples, times, and the facts of its newest checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoint_info import complete_checkpoints, read_info
from gpt2_jax.config import TrainConfig, flatten
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import DamagedError, UserError
from gpt2_jax.evaluation.published import Figure, published_figures
from gpt2_jax.metrics import Row, read_rows
from gpt2_jax.parsing import is_count
from gpt2_jax.run.goodput import goodput, hours_by_step, read_processes
from gpt2_jax.run.noise_scale import NoiseScale, estimate

OPENAI_BLOCK_SIZE = 1024
# The columns of the rows about training, with their titles.
TRAINING = {
    "loss": "Loss (nats per token)",
    "grad_norm": "Gradient norm, before clipping",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization",
    "loss_scale": "Loss scale of float16",
}
NOISE = ("micro_grad_norm", "sequences", "micro_sequences")  # columns of runs that measure the noise scale


@dataclasses.dataclass(frozen=True)
class Curve:
    """A column of the rows: float64 arrays of equal length, ascending in `step`."""

    step: np.ndarray
    tokens: np.ndarray
    value: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, read from its directory."""

    name: str
    """Differs from that of every other run in the same report."""
    path: Path
    config: TrainConfig
    curves: Mapping[str, Curve]
    """By the key of the rows: those of `TRAINING`, "val_loss", and TASK/METRIC."""
    skipped: Sequence[tuple[int, str]]
    """Updates that were passed over, with the reason."""
    samples: Sequence[Row]
    """The rows of samples.jsonl."""
    layers: Mapping[str, tuple[np.ndarray, Sequence[str], np.ndarray]]
    """Statistics of layers by name: tokens [rows], names of the layers, and values [layers, rows]."""
    seconds: Mapping[str, float]
    """Where the time went, by phase; empty if the run has no time.jsonl."""
    hours: tuple[Sequence[int], Sequence[float]]
    """Updates, and the hours until then."""
    facts: Mapping[str, Any]
    """Of the newest checkpoint that can be read: "step", "fingerprint", "made_by"; empty without one."""

    @property
    def last_step(self) -> int:
        """The last update with a row."""
        return max(int(curve.step[-1]) for curve in self.curves.values())

    @property
    def tokens(self) -> int:
        """The tokens consumed until then."""
        return max(int(curve.tokens[-1]) for curve in self.curves.values())

    def final(self, key: str) -> float | None:
        """The last value of a curve; None without one."""
        return float(self.curves[key].value[-1]) if key in self.curves else None

    def best(self, key: str) -> float | None:
        """The lowest value of a curve; None without one."""
        return float(self.curves[key].value.min()) if key in self.curves else None

    def speed(self) -> float | None:
        """The median of the tokens per second."""
        return float(np.median(self.curves["tokens_per_second"].value)) if "tokens_per_second" in self.curves else None

    def noise_scale(self) -> NoiseScale | None:
        """The gradient noise scale; None if the run did not measure it, or has few rows."""
        if not {*NOISE} <= self.curves.keys():
            return None
        first = self.curves["micro_grad_norm"]
        grad_norm = self.curves["grad_norm"]
        grad_norms = grad_norm.value[np.isin(grad_norm.step, first.step)]
        return estimate(first.tokens, grad_norms, *(self.curves[key].value for key in NOISE))

    def reference(self, key: str) -> Figure | None:
        """The published figure of OpenAI's model of the same size for TASK/METRIC, by the same protocol."""
        task, _, metric = key.partition("/")
        limited = self.config.eval.tasks_limit or self.config.model.block_size != OPENAI_BLOCK_SIZE
        if limited or self.config.data.tokenizer != "gpt2":
            return None
        return next(
            (figure for figure in published_figures(task, metric, self.config.model) if figure.same_protocol), None
        )

    def published(self, key: str) -> str:
        """`reference` with its source, as text; "" for none."""
        figure = self.reference(key)
        return f"{figure.value:.4g} ({figure.source})" if figure else ""


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in some directories. Equal directory names are told apart by their parents.

    Raises:
        UserError: one is not the directory of a run with rows.
    """
    absolute = [path.absolute() for path in paths]
    if len({*absolute}) < len(absolute):
        raise UserError("a run is given twice; give each once")
    depth = 1
    while len({path.parts[-depth:] for path in absolute}) < len(absolute):
        depth += 1
    return [read_run(path, "/".join(path.absolute().parts[-depth:])) for path in paths]


def read_run(path: Path, name: str) -> RunRecord:
    """The run in a directory.

    Raises:
        UserError: it is not the directory of a run with rows.
    """
    rows = read_rows(path / "metrics.jsonl")
    columns: dict[str, list[tuple[float, float, float]]] = {}
    skipped: list[tuple[int, str]] = []
    with_layers: list[Row] = []
    for row in rows:
        if reason := row.get("skipped"):
            skipped.append((row["step"], str(reason)))
        if _has_layers(row):
            with_layers.append(row)
        for key, value in row.items():
            if (key in (*TRAINING, *NOISE, "val_loss") or "/" in key) and (type(value) is float or is_count(value)):
                if not is_count(row.get("tokens")):
                    raise UserError(f"{path / 'metrics.jsonl'} has a row with {key!r} and without a count 'tokens'")
                columns.setdefault(key, []).append((row["step"], row["tokens"], value))
    if not columns:
        raise UserError(f"{path} has no metrics.jsonl with rows; give the directory of a run")
    if not (path / "config.toml").exists():
        raise UserError(f"{path} has no config.toml; give the directory of a run")
    config = read_config(str(path / "config.toml"), note=lambda line: None)
    processes = read_processes(path)
    return RunRecord(
        name=name,
        path=path,
        config=config,
        curves={key: Curve(*np.array(values, np.float64).T) for key, values in columns.items()},
        skipped=skipped,
        layers=_layers(with_layers),
        samples=[row for row in read_rows(path / "samples.jsonl") if {"prompt", "text"} <= row.keys()],
        seconds=goodput(processes),
        hours=hours_by_step(processes),
        facts=_newest_facts(path / "checkpoints"),
    )


def _has_layers(row: Row) -> bool:
    """True for a row with statistics of layers: numbers by statistic and layer, null for one that is not finite."""
    layers = row.get("layers")
    if not isinstance(layers, dict) or not is_count(row.get("tokens")):
        return False
    return all(
        isinstance(values, dict) and all(value is None or type(value) in (int, float) for value in values.values())
        for values in layers.values()
    )


def _layers(rows: Sequence[Row]) -> dict[str, tuple[np.ndarray, Sequence[str], np.ndarray]]:
    found: dict[str, tuple[np.ndarray, Sequence[str], np.ndarray]] = {}
    for name, first in rows[0]["layers"].items() if rows else ():
        layers = [*first]
        values = [[row["layers"].get(name, {}).get(layer) for row in rows] for layer in layers]
        found[name] = np.array([row["tokens"] for row in rows]), layers, np.array(values, np.float64)
    return found


def _newest_facts(directory: Path) -> Mapping[str, Any]:
    with suppress(OSError):
        for path in reversed(complete_checkpoints(directory)):
            with suppress(DamagedError):
                return {"step": int(path.name), **read_info(path)}
    return {}


def config_differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The keys in which the configs differ, with the value of each run. `out` always differs, and is left out."""
    columns = zip(*(flatten(run.config).items() for run in runs), strict=True)
    found = {pairs[0][0]: [value for _, value in pairs] for pairs in columns}
    return {key: values for key, values in found.items() if key != "out" and len({*map(repr, values)}) > 1}


def smoothed(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """The mean of each value and those before it, over a share of the whole length."""
    width = max(1, math.ceil(share * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def evaluation_keys(runs: Iterable[RunRecord]) -> list[str]:
    """TASK/METRIC of all tasks that a run was evaluated on, in order of appearance."""
    return list(dict.fromkeys(key for run in runs for key in run.curves if "/" in key))
