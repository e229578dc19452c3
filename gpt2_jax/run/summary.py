"""The text at the start and the end of a run."""

from __future__ import annotations

import gzip
import importlib.metadata
import math
import shlex
from pathlib import Path

import jax
from jax.sharding import Mesh

from gpt2_jax.attention import Choice
from gpt2_jax.compiler_options import Options
from gpt2_jax.config import TrainConfig
from gpt2_jax.data import Data
from gpt2_jax.data.corpus import STDLIB
from gpt2_jax.display import duration
from gpt2_jax.metrics import flops_per_token, peak_flops
from gpt2_jax.model import Params, n_params
from gpt2_jax.optimizer import decay_mask
from gpt2_jax.run.goodput import describe_goodput, goodput, read_processes
from gpt2_jax.sharding import num_micro_batches

TRAIN = "python -m gpt2_jax.train"
INDENT = 10  # characters before the text of a line


def banner(
    config: TrainConfig,
    data: Data,
    mesh: Mesh,
    attention: Choice,
    options: Options,
    fit: str,
    params: Params,
    tokens: int,
    out: Path,
    start: int,
) -> list[str]:
    """The lines that name the model, the data and the devices.

    Args:
        options: those of XLA.
        fit: how the micro-batch size was found; "" if the config sets it.
        tokens: of all updates.
        start: the update that the run resumes after.
    """
    model = config.model
    kind = mesh.devices.flat[0].device_kind
    versions = " · ".join(f"{name} {importlib.metadata.version(name)}" for name in ("gpt2_jax", "jax"))
    devices = f"{mesh.size}" if mesh.size == jax.device_count() else f"{mesh.size} of {jax.device_count()}"
    size = n_params(params, model)
    undecayed = sum(
        leaf.size
        for leaf, decays in zip(*map(jax.tree.leaves, (params, decay_mask(params))), strict=True)
        if not decays
    )
    peak = peak_flops(list(mesh.devices.flat), config.dtype)
    least = f", at least {duration(tokens * flops_per_token(model, size) / peak)} at the chips' peak" if peak else ""
    count = num_micro_batches(config.batch_size, config.micro_batch_limit, mesh)
    batch = (
        f"{config.batch_size} sequences = {config.batch_size * model.block_size:,} tokens per update "
        f"({mesh.size} devices × {count} micro-batches × {config.batch_size // mesh.size // count} sequences)"
    )
    passed = ", ".join(f"{name}={value}" for name, value in options.items()) or f"no options are known for {kind}"
    ramp = "".join(f"{size} sequences until {tokens:,} tokens, then " for tokens, size in config.batch_ramp)
    texts = {
        "on": f"{versions} · {devices} × {kind} · mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']} · "
        f"{config.dtype}",
        "model": f"{size:,} parameters ({size - undecayed:,} decayed): {model.n_layer} layers, {model.n_head} "
        f"heads, {model.n_embd} wide, {model.block_size} tokens, vocabulary {model.vocab_size:,}",
        "attention": str(attention),
        **({"compiler": passed} if options or config.compiler_options != "none" else {}),
        "data": f"{data.train_tokens:,} training and {data.val.n_tokens:,} validation tokens ({config.data.tokenizer})",
        "batch": ramp + batch,
        **({"memory": f"{fit}, with remat {model.remat}"} if fit else {}),
        "run": f"{out}, {config.steps:,} updates, {tokens:,} tokens{least}"
        + (f", from {config.init_from}" if config.init_from else "")
        + (f", resumed after update {start:,}" if start else ""),
    }
    return [f"{name:10}{text}" for name, text in texts.items()]


def closing(
    config: TrainConfig,
    data: Data,
    out: Path,
    loss_sum: float,
    n_targets: int,
    sample: str | None,
    best: int | None,
    fingerprint: str,
    overflows: int | None = None,
) -> list[str]:
    """The lines with the loss of the finished run, its files and a command to type next.

    Args:
        loss_sum: nats over `n_targets` held-out tokens.
        sample: the text from `samples.sample_text`.
        best: the step of the best checkpoint.
        fingerprint: that of the final state.
        overflows: updates skipped because a gradient overflowed; None if the loss was not scaled.
    """
    lines = ["", f"{'loss':10}{loss_sum / n_targets:.4f} nats per token over {n_targets:,} held-out tokens"]
    if data.val_text:
        n_bytes = len(data.val_text)
        zipped = 8 * len(gzip.compress(data.val_text, 9)) / n_bytes
        lines.append(
            f"{'':10}{loss_sum / math.log(2) / n_bytes:.3f} bits per byte; gzip -9 needs {zipped:.3f} for the same "
            f"{n_bytes:,} bytes"
        )
    if sample is not None:
        lines.append(f"{'sample':10}{config.eval.sample_tokens} tokens written by the model:\n")
        lines.append("    " + sample.replace("\n", "\n    ") + "\n")
    if overflows is not None:
        lines.append(f"{'float16':10}{overflows:,} of {config.steps:,} updates skipped, because a gradient overflowed")
    others = "" if best in (None, config.steps) else f", the best checkpoints/{best}"
    lines.append(f"{'run':10}{out}: config.toml, metrics.jsonl, loss.png, checkpoints/{config.steps}{others}")
    if seconds := goodput(read_processes(out)):
        lines.append(f"{'time':10}{describe_goodput(seconds)}")
    lines.append(f"{'state':10}fingerprint {fingerprint}, of parameters and optimizer state")
    lines.append(f"{'next':10}{_next_command(config, out)}")
    return lines


def indent(line: str) -> int | None:
    """The indent of what follows where a line is broken; None for a sample and a command, to copy as they are."""
    return None if line.startswith("next") or "\n" in line else INDENT


def _next_command(config: TrainConfig, out: Path) -> str:
    """The quickstart on the user's own text; otherwise the same model, trained twice as long."""
    if config.data.text == STDLIB:
        return f"{TRAIN} --config quickstart --data.text 'YOUR/**/*.txt' --out runs/mine"
    path, longer = shlex.quote(str(out / "config.toml")), shlex.quote(f"{out}-longer")
    return f"{TRAIN} --config {path} --steps {2 * config.steps} --optimizer.decay_steps 0 --out {longer}"
