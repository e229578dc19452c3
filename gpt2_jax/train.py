"""Trains a GPT-2: `python -m gpt2_jax.train --config NAME|FILE.toml [--section.key value ...]`.

Started again with the same config, a run continues from its newest checkpoint, bit for bit.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import importlib.metadata
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_jax import attention
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.cli import parse_args, run_command
from gpt2_jax.config import TrainConfig, UserError, differences, read_config, to_toml
from gpt2_jax.data import Data, open_data
from gpt2_jax.data.corpus import STDLIB
from gpt2_jax.data.pipeline import BatchSchedule, TrainBatches, eval_batches, read_ahead
from gpt2_jax.data.tokenizer import end_of_text
from gpt2_jax.generate import sample
from gpt2_jax.metrics import Display, MetricsFile, Row, ThroughputMeter, flops_per_token, plot, replace_text
from gpt2_jax.model import GPT2, n_params, stack_layers, unstack_layers
from gpt2_jax.sharding import batch_sharding, make_mesh, micro_batches, put_batch
from gpt2_jax.step import (
    EvalStep,
    Metrics,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)

PROG = "python -m gpt2_jax.train"


class DivergedError(Exception):
    """The loss is no longer a number."""


def main(args: Sequence[str]) -> int:
    """The command; returns its exit code."""
    config = parse_args(PROG, "Train a GPT-2.", args)
    try:
        return train(config)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> int:
    """Trains, or continues training, until `config.steps` updates are done, and reports.

    Args:
        config: validated.
        devices: to train on; all by default.

    Returns:
        0, or 128 + the number of a signal that stopped the run; then the same call continues it.

    Raises:
        UserError: config, data, devices and run directory do not fit together.
        DivergedError: the loss is not finite any more.
    """
    data, config = open_data(config)
    config, choice = resolve(config)
    mesh = make_mesh(config.mesh, devices)
    schedule = BatchSchedule(config.batch_size, config.batch_ramp, config.model.block_size)
    accumulation = {size: micro_batches(size, config.micro_batch_size, mesh) for size in schedule.sizes()}
    out = open_run(config)

    model = GPT2(dataclasses.replace(config.model, attention=choice.backend), jnp.dtype(config.dtype))
    train_step = make_train_step(model, config.optimizer, mesh, config.seed)
    source = TrainBatches(data.train, schedule, accumulation, config.seed, process())
    sharding = batch_sharding(mesh, micro_batches=True)

    with Checkpoints(out / "checkpoints", config.checkpoint.keep) as checkpoints, stop_signals() as received:
        start = checkpoints.latest() or 0
        state = restore(checkpoints, start, data, model, config, mesh) if start else None
        state = state or init_state(model, config.optimizer, mesh, config.seed)
        run = Run(config, data, model, mesh, schedule, out, checkpoints, start, state)
        run.say_hello(choice)
        with run.display, closing(read_ahead(source, start, config.steps)) as batches:
            for step in range(start + 1, config.steps + 1):
                try:
                    batch = next(batches)
                except UserError:  # damaged data, found late: nothing of the run so far is lost
                    run.report()
                    run.save(step - 1)
                    raise
                with jax.transfer_guard("disallow"):  # nothing but the batch goes to the device, and it explicitly
                    run.state, metrics = train_step(run.state, put_batch(batch, sharding))
                run.report()  # the update before this one: the device has its next work already
                run.pending = (step, metrics)
                last = step == config.steps
                if last or is_due(step, config.eval.every):
                    run.evaluate(step)
                if last or received or is_due(step, config.checkpoint.every):
                    run.save(step)
                if received and not last:
                    run.display.say(f"stopped after update {step} of {config.steps}; the same command continues it")
                    return 128 + received[0]
        run.summarize()
    return 0


def resolve(config: TrainConfig) -> tuple[TrainConfig, attention.Choice]:
    """Fills in what follows from the config and the platform, and chooses the attention backend.

    Raises:
        UserError: the attention backend asked for cannot serve.
    """
    platform = attention.current_platform()
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    optimizer = dataclasses.replace(config.optimizer, decay_steps=config.optimizer.decay_steps or config.steps)
    choice = attention.choose(
        config.model.attention,
        platform=platform,
        dtype=jnp.dtype(dtype),
        time=config.model.block_size,
        head_dim=config.model.n_embd // config.model.n_head,
        dropout=config.model.dropout,
    )
    return dataclasses.replace(config, dtype=dtype, optimizer=optimizer), choice


def open_run(config: TrainConfig) -> Path:
    """Makes sure of the run directory: that it belongs to this config, if it is there, and can be written.

    Raises:
        UserError: it belongs to another config, or cannot be written.
    """
    out = Path(config.out).expanduser()
    written = out / "config.toml"
    try:
        if written.exists() and (changed := differences(config, read_config(str(written)))):
            raise UserError(
                f"{out} holds a run of another config ({'; '.join(changed)}); go back to its values, or give another "
                "--out"
            )
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission")
    except OSError as error:
        raise UserError(f"the run directory {out} cannot be written: {error.strerror}; give another --out") from error
    return out


def restore(
    checkpoints: Checkpoints, step: int, data: Data, model: GPT2, config: TrainConfig, mesh: Mesh
) -> TrainState:
    """The state of a checkpoint, placed on this mesh.

    Raises:
        UserError: the training data is not the one that the run was trained on.
    """
    before = checkpoints.info(step)["data"]
    if before != data.fingerprint:
        raise UserError(
            f"the training data of {config.out} has changed ({before} -> {data.fingerprint}); bring the old data "
            "back, or give another --out"
        )
    unrolled = GPT2(dataclasses.replace(model.config, scan_layers=False), model.dtype)
    state: TrainState = checkpoints.restore(step, abstract_state(unrolled, config.optimizer, mesh))
    if model.config.scan_layers:
        shardings = state_shardings(model, config.optimizer, mesh)
        state = jax.jit(stack_layers, out_shardings=shardings)(state)
    return state


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within, SIGTERM and the first SIGINT only add their number to the list: the loop ends where it can go on."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C means it

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process() -> tuple[int, int]:
    """Index of this process, and the number of all."""
    return jax.process_index(), jax.process_count()


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; 0 is never."""
    return every > 0 and step % every == 0


class Run:
    """A run under way: its state, and what it writes and shows beside the updates themselves."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        model: GPT2,
        mesh: Mesh,
        schedule: BatchSchedule,
        out: Path,
        checkpoints: Checkpoints,
        start: int,
        state: TrainState,
    ) -> None:
        self.config, self.data, self.model, self.mesh, self.schedule = config, data, model, mesh, schedule
        self.out, self.checkpoints, self.start, self.state = out, checkpoints, start, state
        self.n_params = n_params(state.params, model.config)
        replace_text(out / "config.toml", to_toml(config))
        self.metrics = MetricsFile(out / "metrics.jsonl", start)
        self.display = Display(start, config.steps)
        shape = model.config
        self.meter = ThroughputMeter(
            flops_per_token(
                self.n_params - shape.block_size * shape.n_embd, shape.n_layer, shape.n_embd, shape.block_size
            ),
            list(mesh.devices.flat),
            config.dtype,
        )
        self.pending: tuple[int, Metrics] | None = None  # the update whose metrics are still on the device
        self.evaluated: Row | None = None  # the last evaluation
        self._eval_step: EvalStep = make_eval_step(model, mesh)

    def tokens(self, step: int) -> int:
        """Tokens consumed by the first `step` updates."""
        return self.schedule.at(step)[0] * self.config.model.block_size

    def report(self) -> None:
        """Waits for the pending update, if there is one, and logs it if a row is due.

        Raises:
            DivergedError: its loss or gradient is not finite.
        """
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        loss, grad_norm, learning_rate = map(float, jax.device_get(metrics))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"update {step} has loss {loss} and gradient norm {grad_norm}; the checkpoints in {self.out} are from "
                f"before; type --optimizer.learning_rate {self.config.optimizer.learning_rate / 2:g} and another --out"
            )
        tokens = self.tokens(step)
        if not is_due(step, self.config.log.every) and step != self.config.steps:
            self.meter.tick(tokens)
            return
        speed = self.meter.read(tokens)
        row = {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": speed and round(speed.tokens_per_second, 1),
            "mfu": speed and speed.mfu and round(speed.mfu, 4),
        }
        self.metrics.write(row)
        left = self.tokens(self.config.steps) - tokens
        self.display.show(row, seconds_left=left / speed.tokens_per_second if speed else None)

    def evaluate(self, step: int) -> None:
        """Validates, logs the row (unless the run did before), and draws the plot anew.

        The last evaluation of a text takes all of it, whatever `eval.tokens`, and gives bits per byte.
        """
        self.report()
        self.meter.stop()
        text = self.data.val_text if step == self.config.steps else None
        limit = 0 if text else self.config.eval.tokens
        per_device = self.config.batch_size // self.mesh.size
        batch_size = min(self.config.micro_batch_size or per_device, per_device) * self.mesh.size
        sharding = batch_sharding(self.mesh, micro_batches=False)
        sums = [
            self._eval_step(self.state.params, put_batch(batch, sharding))
            for batch in eval_batches(self.data.val, batch_size, limit, process())
        ]
        nats, targets = np.array(jax.device_get(sums), np.float64).sum(axis=0)
        row = {"step": step, "tokens": self.tokens(step), "val_loss": float(nats / targets)}
        if text:
            row["bits_per_byte"] = float(nats / math.log(2) / len(text))
        self.evaluated = row
        if step > self.start:
            self.metrics.write(row)
        self.display.say(f"update {step}: validation loss {row['val_loss']:.4f} over {targets:,.0f} tokens")
        plot(self.metrics.path, self.out / "loss.png")

    def save(self, step: int) -> None:
        """Writes a checkpoint in the background, unless there is one of this step."""
        if step in self.checkpoints.steps():
            return
        self.report()
        self.meter.stop()
        state = unstack_layers(self.state) if self.model.config.scan_layers else self.state
        info = {"tokens": self.tokens(step), "data": self.data.fingerprint}
        val_loss = self.evaluated["val_loss"] if self.evaluated and self.evaluated["step"] == step else None
        self.checkpoints.save(step, state, info, val_loss)

    def say_hello(self, choice: attention.Choice) -> None:
        """What will be trained on what, and where."""
        config, data, shape = self.config, self.data, self.model.config
        device = self.mesh.devices.flat[0].device_kind
        sequences = config.batch_size // self.mesh.size
        count = micro_batches(config.batch_size, config.micro_batch_size, self.mesh)
        versions = " · ".join(f"{name} {importlib.metadata.version(name)}" for name in ("gpt2_jax", "jax"))
        lines = {
            "on": f"{versions} · {self.mesh.size} × {device} (data {self.mesh.shape['data']}, fsdp "
            f"{self.mesh.shape['fsdp']}) · {config.dtype}",
            "model": f"{self.n_params:,} parameters: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} "
            f"wide, {shape.block_size} tokens, vocabulary {shape.vocab_size:,}",
            "attention": str(choice),
            "data": f"{data.train.n_tokens:,} training and {data.val.n_tokens:,} validation tokens "
            f"({config.data.tokenizer})",
            "batch": f"{config.batch_size} sequences = {config.batch_size * shape.block_size:,} tokens per update: "
            f"{self.mesh.size} devices × {count} micro-batches × {sequences // count} sequences",
            "run": f"{self.out}, {config.steps:,} updates"
            + (f", continued after update {self.start:,}" if self.start else ""),
        }
        for name, text in lines.items():
            self.display.say(f"{name:10}{text}")

    def summarize(self) -> None:
        """What the finished run reached, a sample of what it writes, and what to type next."""
        config, data, say = self.config, self.data, self.display.say
        if self.evaluated is None:  # all updates were done by an earlier call
            self.evaluate(config.steps)
        assert self.evaluated is not None
        say("")
        say(f"{'loss':10}{self.evaluated['val_loss']:.4f} nats per token on held-out text")
        if data.val_text:
            zipped = 8 * len(gzip.compress(data.val_text, 9)) / len(data.val_text)
            say(
                f"{'':10}{self.evaluated['bits_per_byte']:.3f} bits per byte; gzip -9 makes {zipped:.3f} of the same "
                f"{len(data.val_text):,} bytes"
            )
        if config.eval.sample_tokens and data.tokenizer:
            start = end_of_text(data.tokenizer)
            prompt = [start] if start is not None else data.tokenizer.encode_ordinary("\n")
            tokens = sample(self.model, self.state.params, prompt, config.eval.sample_tokens, seed=config.seed)
            text = data.tokenizer.decode_bytes(tokens.tolist()).decode("utf-8", "replace")
            text = "".join(
                letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
            )
            say(f"{'sample':10}{config.eval.sample_tokens} tokens written by the model:\n")
            say("    " + text.replace("\n", "\n    ") + "\n")
        say(f"{'run':10}{self.out}: config.toml, metrics.jsonl, loss.png, checkpoints/{config.steps}")
        say(f"{'next':10}{self._next_command()}")

    def _next_command(self) -> str:
        if self.config.data.text == STDLIB:
            return f"{PROG} --config quickstart --data.text 'YOUR/**/*.txt' --out runs/mine"
        return f"{PROG} --config {self.out}/config.toml --steps {2 * self.config.steps} --out {self.out}-longer"


if __name__ == "__main__":
    run_command(main)
