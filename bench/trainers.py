"""Trainers to compare. Each runs in a process of its own and does updates when it is asked to.

So each has its own memory, threads and settings, is compiled and warmed up once, and works alone, in turns.

    ours          `make_train_step` on one device or several, fed and read as train.py does: metrics come an update late
    transformers  GPT2LMHeadModel with fused attention (SDPA) and fused AdamW
    nanogpt       model.py of a nanoGPT checkout, with the optimizer that it configures
    llmc          llm.c's train_gpt2 for CPUs, with an AdamW of its own, which neither clips nor decays

All take model, batch, micro-batch and optimizer from the flags of `python -m gpt2_jax.train`; llm.c always has 4
sequences of 64 tokens. None has dropout, and all get the same random tokens. llm.c also gets our initial parameters,
and must compute the same first loss. On a GPU torch computes in bfloat16 under autocast, with TF32 where that leaves
float32. The torch trainers have nanoGPT's 50,304 rows for GPT-2's vocabulary of 50,257, and wait for the device only
after the last update. JAX and torch are imported only in the processes that use them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from record import Figures, take_turns

from gpt2_jax.config import TrainConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.errors import UserError

PADDED = {50257: 50304}  # as in nanoGPT's train.py
VOCABULARIES = {"gpt2": 50257, "bytes": 257}  # with end-of-text


class TrainerError(Exception):
    """A trainer failed. The text is its name and the reason."""


def measure(
    names: Sequence[str], flags: Sequence[str], args: argparse.Namespace, nanogpt: str = "", llmc: str = ""
) -> Figures:
    """The figures of trainers that take turns, by name.

    Args:
        names: "ours", "transformers", "nanogpt", "llmc", or with " compiled" the two of torch with torch.compile.
        flags: of a training config, with --config.
        args: with the repetitions `repeat`, each of at least `seconds` and `updates`, and the number of `devices` that
            ours takes, 0 for all.
        nanogpt: directory of the nanoGPT checkout.
        llmc: llm.c's program train_gpt2.

    Raises:
        TrainerError: one could not start, or failed, or llm.c computes another loss.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several trainers share the device
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in names}

        def call(name: str, function: Callable[..., Figures], *args: Any) -> Figures:
            try:
                return processes[name].submit(function, *args).result()
            except Exception as error:  # BrokenProcessPool if Linux killed the process for its memory
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise TrainerError(f"{name}: {reason}") from error

        about = {name: call(name, start, name, flags, nanogpt, llmc, args.devices) for name in names}
        if "llmc" in names and abs(about["llmc"]["first_loss"] - about["ours"]["first_loss"]) > 1e-3:  # 11 in float32
            raise TrainerError(f"llmc: first loss {about['llmc']['first_loss']}, ours {about['ours']['first_loss']}")
        seconds = {name: call(name, run, args.updates)["seconds"] for name in names}
        blocks = {name: max(args.updates, math.ceil(args.seconds / seconds[name])) for name in names}
        runs = take_turns({name: functools.partial(call, name, run, blocks[name]) for name in names}, args.repeat)
    figures: Figures = {}
    for name in names:
        seconds_per_update = [block["seconds"] for block in runs[name]]
        median, peak = statistics.median(seconds_per_update), about[name].get("peak_flops")
        speed = about[name]["tokens"] / median
        figures[name] = {
            **about[name],
            "loss": runs[name][-1]["loss"],
            "peak_bytes": runs[name][-1]["peak_bytes"],
            "median_s": median,
            "tokens_per_second": speed,
            "mfu": peak and speed * about[name]["flops_per_token"] / peak,
            "updates_per_block": blocks[name],
            "seconds_per_update": seconds_per_update,
        }
    return figures


def training_config(flags: Sequence[str]) -> TrainConfig:
    """The config of a training command without dropout, with the vocabulary size that its tokenizer would give it.

    Raises:
        UserError: as `parse_args`, or the vocabulary depends on a text, or the batch cannot be divided.
    """
    config = parse_args("bench", "", [*flags, "--model.dropout", "0.0"])
    size = config.model.vocab_size or VOCABULARIES.get(config.data.tokenizer)
    if not size:
        raise UserError("the vocabulary size depends on the text; type --model.vocab_size N")
    micro = config.micro_batch_size or config.batch_size
    if config.batch_size % micro:
        raise UserError(f"batch_size = {config.batch_size} is not a multiple of micro_batch_size = {micro}")
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model, micro_batch_size=micro)


# --- in the process ------------------------------------------------------------------------------------

trainer: Ours | Torch | LlmC


def start(name: str, flags: Sequence[str], nanogpt: str, llmc: str, devices: int) -> Figures:
    """Builds a trainer and does its first update, which includes compilation."""
    global trainer
    begin = time.perf_counter()
    config = training_config(flags)
    makers = {"ours": lambda: Ours(config, devices), "llmc": lambda: LlmC(config, llmc)}
    trainer = makers.get(name, lambda: Torch(config, name, nanogpt))()
    built = time.perf_counter()
    loss = trainer.updates(1)
    times = {"build_s": built - begin, "first_update_s": time.perf_counter() - built, "first_loss": loss}
    return {**trainer.about, "tokens": config.batch_size * config.model.block_size, **times}


def run(updates: int) -> Figures:
    """Does updates: `seconds` of each, the `loss` of the last, and the largest use of memory so far."""
    begin = time.perf_counter()
    loss = trainer.updates(updates)
    seconds = (time.perf_counter() - begin) / updates
    if isinstance(trainer, LlmC):
        seconds = trainer.seconds / updates
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "loss": loss, "peak_bytes": trainer.device_peak() or resident}


def random_batches(config: TrainConfig, micro_batches: int) -> Iterator[np.ndarray]:
    """The same batches for every trainer, eight over and over: int32 [micro_batches, sequences, block_size + 1]."""
    shape = (micro_batches, config.batch_size // micro_batches, config.model.block_size + 1)
    windows = np.lib.stride_tricks.sliding_window_view(random_tokens(config), shape[-1])[:: config.model.block_size]
    return itertools.cycle(np.ascontiguousarray(batch).reshape(shape) for batch in np.split(windows, 8))


def random_tokens(config: TrainConfig) -> np.ndarray:
    """The tokens of `random_batches` in one row, int32 [8 · batch_size · block_size + 1]."""
    count = 8 * config.batch_size * config.model.block_size + 1
    return np.random.default_rng(0).integers(0, config.model.vocab_size, count, dtype=np.int32)


class Ours:
    """Our training step on JAX's first devices. Sets JAX's matmul precision for the whole process."""

    def __init__(self, config: TrainConfig, devices: int) -> None:
        import jax

        from gpt2_jax import runtime
        from gpt2_jax.compiler_options import compiler_options
        from gpt2_jax.hardware import hardware_of
        from gpt2_jax.metrics import flops_per_token, peak_flops
        from gpt2_jax.model import n_params
        from gpt2_jax.resolve import build_model, matmul_precision, resolve
        from gpt2_jax.sharding import batch_sharding, make_mesh, num_micro_batches
        from gpt2_jax.step import init_state, make_train_step

        runtime.use_single_malloc_arena()
        self.devices = jax.devices()[: devices or None]
        self.device = self.devices[0]
        runtime.enable_compilation_cache("")  # compile time is a figure
        self.config, attention = resolve(config, hardware_of(self.device))
        jax.config.update("jax_default_matmul_precision", matmul_precision(self.config.dtype))
        self.model = build_model(self.config, attention)
        self.mesh = make_mesh(self.config.mesh, self.devices)
        options = compiler_options(self.config, hardware_of(self.device))
        self.step = make_train_step(self.model, self.config.optimizer, self.mesh, self.config.seed, options)
        state = init_state(self.model, self.config.optimizer, self.mesh, self.config.seed)
        self.state = jax.block_until_ready(state)
        micro_batches = num_micro_batches(config.batch_size, config.micro_batch_size, self.mesh)
        self.batches = random_batches(config, micro_batches)
        self.sharding = batch_sharding(self.mesh, leading_axis=True)
        size = n_params(self.state.params, self.model.config)
        self.about = {
            "device": self.device.device_kind,
            "devices": self.mesh.size,
            "compiler_options": options,
            "dtype": self.config.dtype,
            "attention": self.model.config.attention,
            "parameters": size,
            "flops_per_token": flops_per_token(self.model.config, size),
            "peak_flops": peak_flops(list(self.mesh.devices.flat), self.config.dtype),
        }

    def updates(self, count: int) -> float:
        """Does `count` updates, waits for the last, and returns its loss."""
        import jax

        from gpt2_jax.runtime import keep_freed_memory
        from gpt2_jax.sharding import abstract_batch, put_batch

        if self.device.platform == "cpu" and int(self.state.step) == 0:
            keep_freed_memory(self.step.lower(self.state, abstract_batch(self.config, self.mesh)).compile())
        pending = None
        for batch in itertools.islice(self.batches, count):
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.step(self.state, put_batch(batch, self.sharding))
            jax.device_get(pending)  # of the update before
            pending = metrics
        jax.block_until_ready(self.state)
        return float(metrics.loss)

    def device_peak(self) -> int | None:
        """The largest use of the device's memory so far, None on CPU."""
        memory = self.device.memory_stats()
        return memory["peak_bytes_in_use"] if memory else None


class Torch:
    """GPT-2 in torch, with the update of nanoGPT's and transformers' trainers."""

    def __init__(self, config: TrainConfig, name: str, nanogpt: str) -> None:
        import torch

        compile = name.endswith(" compiled")
        self.torch, self.clip_norm = torch, config.optimizer.clip_norm
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high" if self.cuda else "highest")
        build = functools.partial(nanogpt_model, nanogpt) if name.startswith("nanogpt") else transformers_model
        self.module, self.loss, self.optimizer = build(config, self.device)
        self.module.train()
        self.forward = torch.compile(self.module) if compile else self.module
        half = self.cuda and config.dtype != "float32"
        self.autocast = torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext()
        micro_batches = config.batch_size // config.micro_batch_size
        batches = [
            torch.from_numpy(batch.astype(np.int64))
            for batch in itertools.islice(random_batches(config, micro_batches), 8)
        ]
        self.batches = itertools.cycle([batch.pin_memory() for batch in batches] if self.cuda else batches)
        self.about = {
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "dtype": "bfloat16" if half else "float32",
            "compile": compile,
            "threads": torch.get_num_threads(),
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
        }

    def updates(self, count: int) -> float:
        """See `Ours.updates`."""
        for batch in itertools.islice(self.batches, count):
            for tokens in batch:
                tokens = tokens.to(self.device, non_blocking=True)
                with self.autocast:
                    loss = self.loss(self.forward, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
                (loss / len(batch)).backward()
            if self.clip_norm:
                self.torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.cuda:
            self.torch.cuda.synchronize()
        return loss.item()

    def device_peak(self) -> int | None:
        """See `Ours.device_peak`."""
        return self.torch.cuda.max_memory_allocated() if self.cuda else None


class LlmC:
    """llm.c's train_gpt2, in a directory with a model and token files under the names that it reads.

    Each call starts it anew, and ends it after the updates. `seconds` is the time that it prints for them, without the
    first, in which it allocates its memory.
    """

    def __init__(self, config: TrainConfig, program: str) -> None:
        if (config.batch_size, config.model.block_size) != (4, 64):
            raise UserError("llm.c's train_gpt2 takes 4 sequences of 64 tokens; type --case llmc")
        self.program, self.seconds = os.path.abspath(program), 0.0
        self.directory = tempfile.TemporaryDirectory()
        here = Path(self.directory.name)
        write_llmc_model(config, here)
        data = here / "dev" / "data" / "tinyshakespeare"
        data.mkdir(parents=True)
        tokens = random_tokens(config)[: 4 * 64 + 1]  # the first batch alone: train_gpt2 shuffles several
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, tokens.size
        for split in ("train", "val"):
            (data / f"tiny_shakespeare_{split}.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
        self.about = {"device": "cpu", "dtype": "float32", "threads": len(os.sched_getaffinity(0))}

    def updates(self, count: int) -> float:
        """See `Ours.updates`."""
        words = ["stdbuf", "-oL", self.program]
        pattern = re.compile(r"step \d+: train loss (\S+) \(took (\S+) ms\)")
        with subprocess.Popen(words, cwd=self.directory.name, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            done = list(itertools.islice(filter(None, map(pattern.match, process.stdout)), count + 1))
            process.kill()
        if len(done) <= count:
            raise UserError(f"{self.program} ended after {len(done)} updates; expected {count + 1} of its 41")
        self.seconds = sum(float(step[2]) for step in done[1:]) / 1000
        return float(done[count - 1][1])

    def device_peak(self) -> int | None:
        """See `Ours.device_peak`."""
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def write_llmc_model(config: TrainConfig, directory: Path) -> None:
    """Writes our initial parameters as llm.c's gpt2_124M.bin."""
    import jax

    from gpt2_jax.data.tokenizer import gpt2_encoding
    from gpt2_jax.hardware import Hardware
    from gpt2_jax.interop.llmc import write_llmc
    from gpt2_jax.interop.stored import StoredModel
    from gpt2_jax.model import init_params
    from gpt2_jax.resolve import build_model, resolve

    resolved, attention = resolve(config, Hardware("cpu"))
    model = build_model(resolved, attention)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(config.seed))
    arrays = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def read(name: str) -> np.ndarray:
        rows = model.config.vocab_size if name.startswith("wte") else None
        return np.asarray(arrays[name])[:rows]

    write_llmc(StoredModel("our model", model.config, read, gpt2_encoding), directory, "float32")
    next(directory.glob("model_*.bin")).rename(directory / "gpt2_124M.bin")


def transformers_model(config: TrainConfig, device: Any) -> tuple[Any, Any, Any]:
    """The module, a function of (module, inputs, targets) to the mean loss, and the optimizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape, optimizer = config.model, config.optimizer
    if not shape.bias:
        raise UserError("the GPT-2 of transformers always has biases; type --model.bias true")
    same = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd")}
    settings: dict[str, Any] = {
        "vocab_size": PADDED.get(shape.vocab_size, shape.vocab_size),
        "n_positions": shape.block_size,
        "activation_function": {"tanh": "gelu_new", "exact": "gelu"}[shape.gelu],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    }
    module = GPT2LMHeadModel(GPT2Config(**same, **settings, use_cache=False, attn_implementation="sdpa")).to(device)
    rate, betas, decay = optimizer.learning_rate, (optimizer.beta1, optimizer.beta2), optimizer.weight_decay
    adamw = torch.optim.AdamW(module.parameters(), rate, betas, weight_decay=decay, fused=True)

    def loss(model: Any, inputs: Any, targets: Any) -> Any:
        logits = model(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return module, loss, adamw


def nanogpt_model(directory: str, config: TrainConfig, device: Any) -> tuple[Any, Any, Any]:
    """The same from a nanoGPT checkout."""
    sys.path.insert(0, directory)
    from model import GPT, GPTConfig

    shape, optimizer = config.model, config.optimizer
    same = {name: getattr(shape, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
    vocab_size = PADDED.get(shape.vocab_size, shape.vocab_size)
    module = GPT(GPTConfig(vocab_size=vocab_size, dropout=0.0, **same)).to(device)
    betas = (optimizer.beta1, optimizer.beta2)
    adamw = module.configure_optimizers(optimizer.weight_decay, optimizer.learning_rate, betas, device.type)
    return module, lambda model, inputs, targets: model(inputs, targets)[1], adamw
