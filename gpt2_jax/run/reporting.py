"""Reports of a run: rows of metrics.jsonl, the line or bar on the terminal, the plot, and the check for divergence."""

from __future__ import annotations

import json
import math
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import jax
from jax.sharding import Mesh

from gpt2_jax.config import TrainConfig
from gpt2_jax.display import Display, count, duration, si
from gpt2_jax.distributed.agreement import is_primary
from gpt2_jax.errors import DivergedError, RewindError
from gpt2_jax.evaluation import Result
from gpt2_jax.evaluation.table import number
from gpt2_jax.hardware import peak_memory
from gpt2_jax.loss_scale import MIN_SCALE
from gpt2_jax.metrics import MetricsFile, Row, ThroughputMeter, flops_per_token, format_row, plot, read_rows
from gpt2_jax.planning.estimate import Memory
from gpt2_jax.run.checkpoints import RunCheckpoints
from gpt2_jax.run.layer_statistics import to_row
from gpt2_jax.run.noise_scale import noise_columns
from gpt2_jax.run.panel import Panel
from gpt2_jax.run.summary import INDENT
from gpt2_jax.sharding import num_micro_batches
from gpt2_jax.step import Metrics


class Reporter:
    """Logs updates and evaluations. All processes call it; only process 0 writes, plots and prints.

    Attributes:
        references: figures of OpenAI's model of the same size by TASK/METRIC, for the plot.

    Args:
        out: the run directory.
        config: resolved.
        mesh: the devices, for MFU.
        n_params: number of parameters of the model.
        checkpoints: has the step that a diverged run names as the last good checkpoint.
        tokens_after: tokens consumed by the first k updates.
        start: the step that the run resumes after, 0 for a new run.
        rows_to: where rows are printed too, as they are in metrics.jsonl; None for nowhere.
    """

    def __init__(
        self,
        out: Path,
        config: TrainConfig,
        mesh: Mesh,
        n_params: int,
        checkpoints: RunCheckpoints,
        tokens_after: Callable[[int], int],
        start: int,
        rows_to: TextIO | None = None,
    ) -> None:
        self._out, self._config, self._checkpoints, self._tokens_after = out, config, checkpoints, tokens_after
        self._file = MetricsFile(out / "metrics.jsonl", start) if is_primary() else None
        self._samples = MetricsFile(out / "samples.jsonl", start) if is_primary() and config.eval.prompts else None
        self._meter = ThroughputMeter(flops_per_token(config.model, n_params), list(mesh.devices.flat), config.dtype)
        self._reported = self._start = start
        self._outliers = 0  # in a row
        self._rows_wait = False
        self.references: Mapping[str, float] = {}
        self._mesh = mesh
        self._panel = Panel(config, start)
        self._panel.checkpoint = checkpoints.newest
        self._panel.resume(read_rows(out / "metrics.jsonl") if start and self._file else ())
        self.display = Display(start, config.steps, "", quiet=self._file is None, below=self._panel.lines)
        self._printed_rows = Display(0, 0, "", file=rows_to) if rows_to and self._file else None

    def show_memory(self, memory: Memory) -> None:
        """Prints what the training step requires, and what there is."""
        self.display.print(f"{'memory':10}{memory} for an update", INDENT)

    def update(self, pending: tuple[int, Metrics | None] | None) -> None:
        """Waits for the metrics of an update and logs a row if one is due.

        Args:
            pending: the step and its metrics, which are None for an update that was passed over. None, or an update
                that was already reported, does nothing.

        Raises:
            DivergedError: the loss, the gradient norm or a parameter is not finite, or the update is an outlier and
                `on_outlier` is "stop". An overflow of float16 is none, unless the loss scale is at its minimum.
            RewindError: it is an outlier and `on_outlier` is "rewind".
        """
        if pending is None or pending[0] <= self._reported:
            return
        step, metrics = pending
        self._reported = self._panel.step = step
        if metrics is None:
            self._skipped(step, "by skip_updates")
            return
        *values, outlier, loss_scale, overflows, micro_grad_norm, layers = jax.device_get(metrics)
        if step == self._start + 1 and (peak := peak_memory(jax.local_devices()[0])):  # not on CPU
            self.show_memory(Memory(*peak))
        loss, grad_norm, learning_rate, param_norm = map(float, values)
        scaling = {} if loss_scale is None else {"loss_scale": float(loss_scale), "overflows": int(overflows)}
        found = f"loss {loss}, gradient norm {grad_norm}"
        if scaling and not math.isfinite(grad_norm):  # before outliers: this update did not reach their watch
            found += f" at loss scale {loss_scale:g}"
            if math.isfinite(param_norm) and loss_scale > MIN_SCALE:
                self._skipped(step, f"overflow of float16: {found}", **scaling)
                return
        elif outlier:
            self._handle_outlier(step, found)
            if self._config.optimizer.on_outlier == "skip":
                return
        self._check_finite(step, loss + grad_norm + param_norm, f"{found} and parameters of norm {param_norm}")
        self._outliers = 0
        tokens = self._tokens_after(step)
        if layers is not None:
            self._write({"step": step, "tokens": tokens, "layers": to_row(layers)})
        if not is_due(step, self._config.log.every) and step != self._config.steps:
            self._meter.start(tokens)
            return
        speed = self._meter.read(tokens)
        self._checkpoints.check_saved()
        row = {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": speed and round(speed.tokens_per_second, 1),
            "mfu": speed and speed.mfu and round(speed.mfu, 4),
            **scaling,
            **({} if micro_grad_norm is None else self._noise(step, float(micro_grad_norm))),
        }
        self._write(row)
        total = self._tokens_after(self._config.steps)
        seconds = (total - tokens) / speed.tokens_per_second if speed else None
        self._panel.update(row)
        self._panel.checkpoint = self._checkpoints.newest
        beside = [f"{si(tokens)}/{si(total)} tokens"] + ([] if seconds is None else [f"{duration(seconds)} left"])
        self.display.show(step, f"update {step}/{self._config.steps}", format_row(row, seconds), beside)

    def _noise(self, step: int, micro_grad_norm: float) -> dict[str, float]:
        config = self._config
        sequences = (self._tokens_after(step) - self._tokens_after(step - 1)) // config.model.block_size
        count = num_micro_batches(sequences, config.micro_batch_limit, self._mesh)
        return noise_columns(micro_grad_norm, sequences, count * self._mesh.shape["data"])

    def _handle_outlier(self, step: int, found: str) -> None:
        optimizer = self._config.optimizer
        problem = f"update {step} is an outlier, with {found}"
        if optimizer.on_outlier == "rewind":
            raise RewindError(problem, step)
        self._outliers += 1
        if optimizer.on_outlier == "stop" or self._outliers > optimizer.outlier_window:
            many = f", as were the {optimizer.outlier_window} updates before" if optimizer.on_outlier == "skip" else ""
            raise DivergedError(f"{problem}{many}; {self._before()}; look at it with {self._look_command(step)}")
        self._skipped(step, f"outlier: {found}")

    def _look_command(self, step: int) -> str:
        return f"python -m gpt2_jax.data {shlex.quote(str(self._out))} --update {step}"

    def _skipped(self, step: int, reason: str, **more: float) -> None:
        """Logs an update that changed nothing, with `more` keys of its row."""
        self.display.print(f"update {step}: skipped ({reason})")
        self._write({"step": step, "tokens": self._tokens_after(step), "skipped": reason, **more})

    def _before(self) -> str:
        saved = self._checkpoints.newest
        return f"checkpoints/{saved} is from before" if saved else "nothing was saved"

    def _check_finite(self, step: int, value: float, found: str) -> None:
        """Raises a DivergedError that names what was `found` unless `value` is finite."""
        if not math.isfinite(value):
            raise DivergedError(
                f"update {step} has {found}; {self._before()}; type "
                f"--optimizer.learning_rate {self._config.optimizer.learning_rate / 2:g} and another --out"
            )

    def validation(self, step: int, loss_sum: float, n_targets: int) -> dict[str, float]:
        """Prints the validation loss.

        Returns:
            The loss in nats per token by its name.

        Raises:
            DivergedError: the loss is not finite.
        """
        loss = loss_sum / n_targets
        self._check_finite(step, loss, f"validation loss {loss}")
        self._panel.validation(step, loss)
        self.display.print(f"update {step}: validation loss {loss:.4f} over {n_targets:,} tokens")
        return {"val_loss": loss}

    def tasks(self, step: int, results: Mapping[str, Result]) -> dict[str, float]:
        """Prints the results of tasks.

        Returns:
            The finite ones by TASK/METRIC. A perplexity may overflow to infinity, which JSON does not have.
        """
        for task, result in results.items():
            parts = [
                f"{name} {number(metric.value)} ± {number(metric.stderr) or 'unknown'}"
                for name, metric in result.metrics.items()
            ]
            self.display.print(f"update {step}: {task} {', '.join(parts)}")
        return {
            f"{task}/{name}": metric.value
            for task, result in results.items()
            for name, metric in result.metrics.items()
            if math.isfinite(metric.value)
        }

    def samples(self, step: int, continued: Sequence[tuple[str, str]]) -> None:
        """Logs continuations of prompts, and prints the start of the first one."""
        tokens = self._tokens_after(step)
        for prompt, text in continued:
            self._append(self._samples, {"step": step, "tokens": tokens, "prompt": prompt, "text": text})
        for prompt, text in continued[:1]:
            start = f"update {step}: "
            room = self.display.console.width - len(start)
            self.display.print(start + textwrap.shorten(prompt + text, room, placeholder=" …"))

    def progress(self, task: str, done: int) -> None:
        """Shows the progress of a task."""
        step = self._reported
        self.display.show(
            step, f"update {step}/{self._config.steps}", [f"{task}: {count(done, 'continuation')} scored"]
        )

    def evaluated(self, step: int, evaluations: Mapping[str, float], fingerprint: str) -> None:
        """Logs evaluations with the fingerprint of the state, and redraws the plot; without any, the fingerprint."""
        self._write({"step": step, "tokens": self._tokens_after(step), **evaluations, "fingerprint": fingerprint})
        if self._file and evaluations:
            try:
                plot(self._file.path, self._out / "loss.png", self.references)
            except OSError as error:
                self.display.print(f"{self._out / 'loss.png'} cannot be written ({error.strerror}); continuing")

    def _write(self, row: Row) -> None:
        self._append(self._file, row)
        if self._printed_rows:
            self._printed_rows.print(json.dumps(row))

    def _append(self, file: MetricsFile | None, row: Row) -> None:
        """Writes a row. One that cannot be written waits: a checkpoint is saved only with all rows before it."""
        if file:
            try:
                file.write(row)
                self._rows_wait = False
            except OSError as error:
                if not self._rows_wait:
                    self.display.print(f"{file.path} cannot be written ({error.strerror}); its rows wait in memory")
                self._rows_wait = True

    def flush(self) -> None:
        """Writes the rows that wait.

        Raises:
            OSError: they cannot be written.
        """
        for file in (self._file, self._samples):
            if file:
                file.flush()

    def catch_up(self, pending: tuple[int, Metrics | None] | None) -> None:
        """`update`, then stops the throughput clock: what follows is not training."""
        self.update(pending)
        self._meter.stop()


def is_due(step: int, every: int) -> bool:
    """True if `step` is a multiple of `every`; never for 0."""
    return every > 0 and step % every == 0
