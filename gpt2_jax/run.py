"""A run and its directory: opening or continuing it, rows, evaluations, checkpoints, and the report at the end."""

from __future__ import annotations

import dataclasses
import errno
import functools
import gzip
import importlib.metadata
import math
import os
import shlex
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gpt2_jax import processes
from gpt2_jax.attention import Choice
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import TrainConfig, UserError, differences
from gpt2_jax.config_file import read_config, to_toml
from gpt2_jax.data import Data
from gpt2_jax.data.corpus import STDLIB
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import eval_batches
from gpt2_jax.decode import generate
from gpt2_jax.display import Display
from gpt2_jax.files import replace_text
from gpt2_jax.interop.stored import StoredModel
from gpt2_jax.metrics import MetricsFile, ThroughputMeter, describe, flops_per_token, plot
from gpt2_jax.model import GPT2, Params, n_params, stack_layers, unstack_layers
from gpt2_jax.sharding import batch_sharding, local_rows, micro_batches, put_batch
from gpt2_jax.step import Metrics, TrainState, abstract_state, init_state, make_eval_step, state_shardings

TRAIN = "python -m gpt2_jax.train"


class DivergedError(Exception):
    """The loss is no longer a number."""


def saved_config(config: TrainConfig) -> TrainConfig | None:
    """The config of the run that `config.out` holds, None if that has no checkpoint yet.

    Raises:
        UserError: it has checkpoints, but no run.
    """
    out = Path(config.out).expanduser()
    try:
        if not any(path.name.isdigit() for path in (out / "checkpoints").iterdir()):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"the run directory {out} cannot be read: {error.strerror}; give another --out") from error
    try:
        return read_config(str(out / "config.toml"))
    except UserError as error:
        raise UserError(f"{out} has checkpoints, but not the config of a run ({error}); give another --out") from error


def open_directory(config: TrainConfig) -> Path:
    """Makes sure of the run directory: that it belongs to this config, if it is there, and can be written.

    Raises:
        UserError: it belongs to another config, cannot be written, or is another one in other processes.
    """
    out = Path(config.out).expanduser()
    written = saved_config(config)
    if written and (changed := differences(config, written)):
        listed = "; ".join(f"{key}: {there!r} -> {here!r}" for key, (there, here) in changed.items())
        advice = "go back to its values, or give another --out"
        if list(changed) == ["optimizer.decay_steps"]:  # which follows from `steps`, if it is not given
            advice = f"type --optimizer.decay_steps {changed['optimizer.decay_steps'][0]} to keep its schedule"
        raise UserError(f"{out} holds a run of another config ({listed}); {advice}")
    try:
        if processes.is_first():
            out.mkdir(parents=True, exist_ok=True)
        for path in (out, *(out / name for name in ("config.toml", "checkpoints", "metrics.jsonl", "loss.png"))):
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, f"no permission for {path.name}")
    except OSError as error:
        raise UserError(f"the run directory {out} cannot be written: {error.strerror}; give another --out") from error
    processes.check_shared(out)
    return out


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; 0 is never."""
    return every > 0 and step % every == 0


class Run:
    """A run under way: its state, and what it writes and shows beside the updates themselves.

    All processes call the same methods in the same order. The first writes, plots and speaks; checkpoints are written
    by all, each its part.

    Args:
        config: resolved.
        data: opened.
        model: with the attention backend that was chosen.
        mesh: the devices.
        schedule: sequences per update.
        out: the run directory, which exists.
        checkpoints: those in it; the run starts from the newest, or anew.
        initial: the model that a new run starts from; None for random parameters.

    Raises:
        UserError: the newest checkpoint is beyond `config.steps`, or the data is not that of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        model: GPT2,
        mesh: Mesh,
        schedule: BatchSchedule,
        out: Path,
        checkpoints: Checkpoints,
        initial: StoredModel | None = None,
    ) -> None:
        self.config, self.data, self.model, self.mesh = config, data, model, mesh
        self.schedule, self.out, self.checkpoints = schedule, out, checkpoints
        self.start = int(processes.of_first("start", str(checkpoints.latest() or 0)))
        self.state = self._restored() if self.start else self._new(initial)
        self.n_params = n_params(self.state.params, model.config)
        self.pending: tuple[int, Metrics] | None = None  # the update whose metrics are still on the device
        self._saved = self.start
        self.val_loss: tuple[int, float] | None = None  # the last evaluation: step and loss

        self.metrics = MetricsFile(out / "metrics.jsonl", self.start) if processes.is_first() else None
        if self.metrics:
            replace_text(out / "config.toml", to_toml(config))
        self.display = Display(self.start, config.steps, "compiling", quiet=self.metrics is None)
        shape = model.config
        in_products = self.n_params - shape.block_size * shape.n_embd  # without the position embeddings
        per_token = flops_per_token(in_products, shape.n_layer, shape.n_embd, shape.block_size)
        self.meter = ThroughputMeter(per_token, list(mesh.devices.flat), config.dtype)
        self._eval_step = make_eval_step(model, mesh)

    def _new(self, initial: StoredModel | None) -> TrainState:
        optimizer = self.config.optimizer
        params = initial.place(abstract_state(self.model, optimizer, self.mesh).params) if initial else None
        return init_state(self.model, optimizer, self.mesh, self.config.seed, params)

    def _restored(self) -> TrainState:
        config, model, step = self.config, self.model, self.start
        if step > config.steps:
            raise UserError(
                f"{self.out} is at update {step} already, beyond steps = {config.steps}; type --steps {step}"
            )
        before = self.checkpoints.info(step)["data"]
        if before != self.data.fingerprint:
            raise UserError(
                f"the data of {self.out} has changed ({before} -> {self.data.fingerprint}); bring the old "
                "data back, or give another --out"
            )
        unrolled = GPT2(dataclasses.replace(model.config, scan_layers=False), model.dtype)
        state: TrainState = self.checkpoints.restore(step, abstract_state(unrolled, config.optimizer, self.mesh))
        if model.config.scan_layers:
            shardings = state_shardings(model, config.optimizer, self.mesh)
            state = jax.jit(stack_layers, out_shardings=shardings)(state)
        return state

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
            saved = f"checkpoints/{self._saved} is from before" if self._saved else "nothing was saved"
            raise DivergedError(
                f"update {step} has loss {loss} and gradient norm {grad_norm}; {saved}; type --optimizer.learning_rate "
                f"{self.config.optimizer.learning_rate / 2:g} and another --out"
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
        if self.metrics:
            self.metrics.write(row)
        left = self.tokens(self.config.steps) - tokens
        parts = describe(row, left / speed.tokens_per_second if speed else None)
        self.display.show(step, f"update {step}/{self.config.steps}", parts)

    def validation_nats(self, limit: int) -> tuple[float, int]:
        """Sum of nats over the first `limit` validation targets (0: all), and how many they are."""
        per_device = self.config.batch_size // self.mesh.size
        batch_size = min(self.config.micro_batch_size or per_device, per_device) * self.mesh.size
        sharding = batch_sharding(self.mesh, micro_batches=False)
        rows = functools.partial(local_rows, self.mesh)
        sums = [
            self._eval_step(self.state.params, put_batch(batch, sharding))
            for batch in eval_batches(self.data.val, batch_size, limit, rows)
        ]
        nats, targets = np.array(jax.device_get(sums), np.float64).sum(axis=0)
        return float(nats), int(targets)

    def evaluate(self, step: int) -> None:
        """Logs the validation loss, and draws the plot anew."""
        self.report()
        self.meter.stop()
        nats, targets = self.validation_nats(self.config.eval.tokens)
        loss = nats / targets
        self.val_loss = (step, loss)
        self.display.say(f"update {step}: validation loss {loss:.4f} over {targets:,} tokens")
        if self.metrics:
            self.metrics.write({"step": step, "tokens": self.tokens(step), "val_loss": loss})
            plot(self.metrics.path, self.out / "loss.png")

    def save(self, step: int) -> None:
        """Writes a checkpoint in the background, unless there is one of this step."""
        self.report()
        self.meter.stop()
        if step == self._saved:
            return
        self._saved = step
        state = self.state
        if self.model.config.scan_layers:
            state = self._unrolled(state)
        val_loss = self.val_loss[1] if self.val_loss and self.val_loss[0] == step else None
        self.checkpoints.save(step, state, {"data": self.data.fingerprint}, val_loss)

    def _unrolled(self, state: TrainState) -> TrainState:
        """The state with its layers apart, as checkpoints have it."""
        if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(state)):
            # On the host: replicated, the state may be so large that the device has no room for a second one.
            return unstack_layers(jax.device_get(state))
        # Parts of it are on other hosts, and so no process has it whole; but then a part is all that is copied.
        unrolled = GPT2(dataclasses.replace(self.model.config, scan_layers=False), self.model.dtype)
        shardings = state_shardings(unrolled, self.config.optimizer, self.mesh)
        return jax.jit(unstack_layers, out_shardings=shardings)(state)

    def _local_params(self) -> Params:
        """The parameters on devices of this process alone; all processes have to call it."""
        params = self.state.params
        if jax.process_count() > 1:
            params = jax.device_put(multihost_utils.process_allgather(params, tiled=True), jax.local_devices()[0])
        return params

    def say_hello(self, choice: Choice) -> None:
        """What will be trained on what, and where."""
        config, data, shape, mesh = self.config, self.data, self.model.config, self.mesh
        kind = mesh.devices.flat[0].device_kind
        versions = " · ".join(f"{name} {importlib.metadata.version(name)}" for name in ("gpt2_jax", "jax"))
        count = micro_batches(config.batch_size, config.micro_batch_size, mesh)
        batch = (
            f"{config.batch_size} sequences = {config.batch_size * shape.block_size:,} tokens per update "
            f"({mesh.size} devices × {count} micro-batches × {config.batch_size // mesh.size // count} sequences)"
        )
        ramp = "".join(f"{size} sequences until {tokens:,} tokens, then " for tokens, size in config.batch_ramp)
        lines = {
            "on": f"{versions} · {mesh.size} × {kind} · mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']} · "
            f"{config.dtype}",
            "model": f"{self.n_params:,} parameters: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} "
            f"wide, {shape.block_size} tokens, vocabulary {shape.vocab_size:,}",
            "attention": str(choice),
            "data": f"{data.train_tokens:,} training and {data.val.n_tokens:,} validation tokens "
            f"({config.data.tokenizer})",
            "batch": ramp + batch,
            "run": f"{self.out}, {config.steps:,} updates"
            + (f", from {config.init_from}" if config.init_from else "")
            + (f", continued after update {self.start:,}" if self.start else ""),
        }
        for name, text in lines.items():
            self.display.say(f"{name:10}{text}")

    def summarize(self) -> None:
        """What the finished run reached, a sample of what it writes, and what to type next."""
        config, data, say = self.config, self.data, self.display.say
        nats, targets = self.validation_nats(0 if data.val_text else config.eval.tokens)
        params = self._local_params() if config.eval.sample_tokens and data.tokenizer else None
        if not processes.is_first():
            return
        say("")
        say(f"{'loss':10}{nats / targets:.4f} nats per token over {targets:,} held-out tokens")
        if data.val_text:
            n_bytes = len(data.val_text)
            zipped = 8 * len(gzip.compress(data.val_text, 9)) / n_bytes
            say(
                f"{'':10}{nats / math.log(2) / n_bytes:.3f} bits per byte; gzip -9 needs {zipped:.3f} for the same "
                f"{n_bytes:,} bytes"
            )
        if params is not None and data.tokenizer:
            prompt = [int(data.val.streams[0][:1][0])]  # end-of-text, or what a text without it starts with
            n_vocab, n_tokens = data.tokenizer.n_vocab, config.eval.sample_tokens
            (tokens,) = generate(
                self.model, params, [prompt], n_tokens, seed=config.seed, vocab_size=n_vocab, slide=True
            )
            text = data.tokenizer.decode_bytes(tokens.tolist()).decode("utf-8", "replace")
            text = "".join(
                char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text
            )
            say(f"{'sample':10}{n_tokens} tokens that the model writes:\n")
            say("    " + text.replace("\n", "\n    ") + "\n")
        best = self.checkpoints.best()
        others = "" if best in (None, config.steps) else f", the best checkpoints/{best}"
        say(f"{'run':10}{self.out}: config.toml, metrics.jsonl, loss.png, checkpoints/{config.steps}{others}")
        say(f"{'next':10}{self._next_command()}")

    def _next_command(self) -> str:
        """The quickstart on the user's own text; otherwise the same model, trained twice as long."""
        if self.config.data.text == STDLIB:
            return f"{TRAIN} --config quickstart --data.text 'YOUR/**/*.txt' --out runs/mine"
        config, out = shlex.quote(str(self.out / "config.toml")), shlex.quote(f"{self.out}-longer")
        return f"{TRAIN} --config {config} --steps {2 * self.config.steps} --optimizer.decay_steps 0 --out {out}"
