"""Trainers to compare. Each runs in a process of its own and does updates when it is asked to.

    with Trainer("ours", flags) as ours, Trainer("nanogpt", flags, nanogpt=DIR, compile=True) as theirs:
        ours.run(10)["seconds"], theirs.run(10)["seconds"]

So each has its own memory, threads and settings, is compiled and warmed up once, and works alone, in turns.

    ours          `make_train_step` on one device, fed and read as train.py does: metrics are fetched one update late
    transformers  GPT2LMHeadModel with fused attention (SDPA) and fused AdamW
    nanogpt       model.py of a nanoGPT checkout, with the optimizer that it configures

All take model, batch, micro-batch and optimizer from the flags of `python -m gpt2_jax.train`. None has dropout, and all
get the same random tokens. On a GPU torch computes in bfloat16 under autocast, with TF32 where that leaves float32. The
torch trainers have nanoGPT's 50,304 rows for GPT-2's vocabulary of 50,257, and wait for the device only after the last
update. JAX and torch are imported only in the processes that use them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.config import TrainConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.errors import UserError

OUT_OF_MEMORY = "out of memory"
BATCHES = 8  # different ones, used over and over
PADDED = {50257: 50304}  # as in nanoGPT's train.py
VOCABULARIES = {"gpt2": 50257, "bytes": 257}  # with end-of-text


class TrainerError(Exception):
    """A trainer failed. The text is its name and the reason, which can be `OUT_OF_MEMORY`."""


class Trainer:
    """A process that trains. It has done its first update when this returns. Close it, or use it in a `with`.

    Args:
        side: "ours", "transformers" or "nanogpt".
        flags: of a training config, with --config.
        compile: whether torch compiles the model.
        nanogpt: directory of the nanoGPT checkout.

    Attributes:
        about: `device`, `parameters`, `build_s`, `first_update_s` (with compilation) and `tokens` per update; for ours
            also `flops_per_token`, and `peak_flops` (None if it is unknown).

    Raises:
        TrainerError: it could not start.
    """

    def __init__(self, side: str, flags: Sequence[str], *, compile: bool = False, nanogpt: str = "") -> None:
        self.name = side + (" compiled" if compile else "")
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several trainers share the device
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=serve, args=(other_end, side, list(flags), compile, nanogpt))
        self._process.start()
        other_end.close()
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(30)
        self._process.kill()
        self._process.join()

    def run(self, updates: int) -> dict[str, Any]:
        """Does `updates` updates and returns `seconds` for all, the `loss` of the last, and `peak_bytes` so far."""
        with contextlib.suppress(BrokenPipeError):  # the answer has the reason
            self._pipe.send(updates)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            killed = self._process.exitcode == -9  # by Linux, for exceeding the host's memory
            answer = {"error": OUT_OF_MEMORY if killed else f"exit code {self._process.exitcode}"}
        if "error" in answer:
            raise TrainerError(f"{self.name}: {answer['error']}")
        return answer


def updates_for(trainer: Trainer, seconds: float, least: int) -> int:
    """The number of updates that take `seconds`, at least `least`, after one to warm up."""
    trainer.run(1)
    count = 1
    while (took := trainer.run(count)["seconds"]) < seconds / 10 and count < least:
        count *= 2
    return max(least, math.ceil(seconds * count / took))


def alternate(trainers: Sequence[Trainer], blocks: Sequence[int], repeat: int) -> dict[str, list[float]]:
    """Seconds per update of each trainer in each repetition. They take turns, A B A B, after a turn to warm up.

    Args:
        blocks: updates of each trainer in a repetition.
    """
    runs: dict[str, list[float]] = {trainer.name: [] for trainer in trainers}
    for repetition in range(repeat + 1):
        for trainer, updates in zip(trainers, blocks, strict=True):
            seconds = trainer.run(updates)["seconds"] / updates
            if repetition:
                runs[trainer.name].append(seconds)
    return runs


# --- the process ---------------------------------------------------------------------------------------


def training_config(flags: Sequence[str]) -> TrainConfig:
    """The config of a training command without dropout, with the vocabulary size that its tokenizer would give it.

    Raises:
        UserError: as `parse_args`, or the vocabulary depends on a text.
    """
    config = parse_args("bench", "", [*flags, "--model.dropout", "0.0"])
    size = config.model.vocab_size or VOCABULARIES.get(config.data.tokenizer)
    if not size:
        raise UserError("the vocabulary size depends on the text; type --model.vocab_size N")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def random_batches(config: TrainConfig) -> list[np.ndarray]:
    """The same batches for every trainer: int32 [micro_batches, sequences, block_size + 1]."""
    rng = np.random.default_rng(0)
    micro = config.micro_batch_size or config.batch_size
    if config.batch_size % micro:
        raise UserError(f"batch_size = {config.batch_size} is not a multiple of micro_batch_size = {micro}")
    shape = (config.batch_size // micro, micro, config.model.block_size + 1)
    return [rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(BATCHES)]


def resident_peak() -> int:
    """The most bytes that this process had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Ours:
    """Our training step on JAX's first device. Sets JAX's matmul precision for the whole process."""

    def __init__(self, config: TrainConfig) -> None:
        import jax

        from gpt2_jax import runtime
        from gpt2_jax.hardware import hardware_of
        from gpt2_jax.resolve import build_model, matmul_precision, resolve
        from gpt2_jax.sharding import batch_sharding, make_mesh
        from gpt2_jax.step import init_state, make_train_step

        runtime.use_single_malloc_arena()
        self.device = jax.devices()[0]
        runtime.enable_compilation_cache("")  # compile time is a figure
        self.config, attention = resolve(config, hardware_of(self.device))
        jax.config.update("jax_default_matmul_precision", matmul_precision(self.config.dtype))
        self.model = build_model(self.config, attention)
        self.mesh = make_mesh(self.config.mesh, [self.device])
        self.step = make_train_step(self.model, self.config.optimizer, self.mesh, self.config.seed)
        state = init_state(self.model, self.config.optimizer, self.mesh, self.config.seed)
        self.state = jax.block_until_ready(state)
        self.batches, self.sharding = random_batches(self.config), batch_sharding(self.mesh, leading_axis=True)
        self.done = 0

    def updates(self, count: int) -> float:
        """Does `count` updates, waits for the last, and returns its loss.

        The metrics of an update are fetched when the next one is dispatched.
        """
        import jax

        from gpt2_jax import runtime
        from gpt2_jax.sharding import put_batch

        if not self.done and self.device.platform == "cpu":
            lowered = self.step.lower(self.state, put_batch(self.batches[0], self.sharding))
            runtime.keep_freed_memory(lowered.compile())
        pending = None
        for _ in range(count):
            batch = self.batches[self.done % BATCHES]
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.step(self.state, put_batch(batch, self.sharding))
            jax.device_get(pending)
            self.done, pending = self.done + 1, metrics
        jax.block_until_ready(self.state)
        return float("nan") if pending is None else float(jax.device_get(pending).loss)

    def about(self) -> dict[str, Any]:
        """Device, dtype, parameters and other facts."""
        from gpt2_jax.hardware import chip_of
        from gpt2_jax.metrics import flops_per_token
        from gpt2_jax.model import n_params

        count = n_params(self.state.params, self.model.config)
        chip = chip_of(self.device) if self.config.dtype == "bfloat16" else None
        return {
            "device": self.device.device_kind,
            "dtype": self.config.dtype,
            "attention": self.model.config.attention,
            "parameters": count,
            "flops_per_token": flops_per_token(self.model.config, count),
            "peak_flops": chip.flops if chip else None,
        }

    def peak_bytes(self) -> int:
        """The largest memory use so far: of the device, or on CPU of the process."""
        statistics = self.device.memory_stats()  # None on CPU
        return int(statistics["peak_bytes_in_use"]) if statistics else resident_peak()


class Torch:
    """A model in torch, with the update of nanoGPT's and transformers' trainers.

    Args:
        config: validated.
        compile: whether torch compiles the model.
        build: (config, device) -> the module, a function of (model, inputs, targets) to the mean loss, the optimizer.
    """

    def __init__(self, config: TrainConfig, compile: bool, build: Callable[..., Any]) -> None:
        import torch

        self.torch, self.config, self.compile = torch, config, compile
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cuda = self.device.type == "cuda"
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high" if cuda else "highest")
        self.module, self.loss, self.optimizer = build(config, self.device)
        self.module.train()
        self.forward = torch.compile(self.module) if compile else self.module
        half = cuda and config.dtype != "float32"
        self.autocast = torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext()
        self.dtype = "bfloat16" if half else "float32"
        batches = [torch.from_numpy(batch.astype(np.int64)) for batch in random_batches(config)]
        self.batches = [batch.pin_memory() for batch in batches] if cuda else batches
        self.done = 0

    def updates(self, count: int) -> float:
        """See `Ours.updates`."""
        torch, loss = self.torch, None
        for _ in range(count):
            batch = self.batches[self.done % BATCHES]
            for tokens in batch:
                tokens = tokens.to(self.device, non_blocking=True)
                with self.autocast:
                    loss = self.loss(self.forward, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
                (loss / len(batch)).backward()
            if self.config.optimizer.clip_norm:
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.optimizer.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.done += 1
        value = float("nan") if loss is None else loss.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return value

    def about(self) -> dict[str, Any]:
        """See `Ours.about`."""
        return {
            "device": self.torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "dtype": self.dtype,
            "compile": self.compile,
            "threads": self.torch.get_num_threads(),
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
        }

    def peak_bytes(self) -> int:
        """See `Ours.peak_bytes`."""
        return int(self.torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else resident_peak()


def transformers(config: TrainConfig, device: Any) -> tuple[Any, Any, Any]:
    """GPT-2 of `transformers`, for `Torch`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape, optimizer = config.model, config.optimizer
    if not shape.bias:
        raise UserError("the GPT-2 of transformers always has biases; type --model.bias true")
    config_of_theirs = GPT2Config(
        vocab_size=PADDED.get(shape.vocab_size, shape.vocab_size),
        n_positions=shape.block_size,
        **{name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd")},
        activation_function={"tanh": "gelu_new", "exact": "gelu"}[shape.gelu],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        use_cache=False,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
    )
    module = GPT2LMHeadModel(config_of_theirs).to(device)
    adamw = torch.optim.AdamW(
        module.parameters(),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        weight_decay=optimizer.weight_decay,
        fused=True,
    )

    def loss(model: Any, inputs: Any, targets: Any) -> Any:
        logits = model(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return module, loss, adamw


def nanogpt(directory: str, config: TrainConfig, device: Any) -> tuple[Any, Any, Any]:
    """GPT-2 of a nanoGPT checkout, for `Torch`."""
    path = Path(directory) / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{directory!r} has no model.py; expected a nanoGPT checkout; type --nanogpt DIR")
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code
    spec.loader.exec_module(code)

    shape, optimizer = config.model, config.optimizer
    same = {name: getattr(shape, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
    vocab_size = PADDED.get(shape.vocab_size, shape.vocab_size)
    module = code.GPT(code.GPTConfig(vocab_size=vocab_size, dropout=0.0, **same)).to(device)
    betas = (optimizer.beta1, optimizer.beta2)
    adamw = module.configure_optimizers(optimizer.weight_decay, optimizer.learning_rate, betas, device.type)
    return module, lambda model, inputs, targets: model(inputs, targets)[1], adamw


def serve(pipe: Connection, side: str, flags: Sequence[str], compile: bool, nanogpt_directory: str) -> None:
    """Runs the process: builds a side, does its first update, then as many as each message asks for."""
    builders = {"transformers": transformers, "nanogpt": functools.partial(nanogpt, nanogpt_directory)}
    try:
        start = time.perf_counter()
        config = training_config(flags)
        trainer = Ours(config) if side == "ours" else Torch(config, compile, builders[side])
        built = time.perf_counter()
        trainer.updates(1)
        times = {"build_s": built - start, "first_update_s": time.perf_counter() - built}
        pipe.send({**trainer.about(), "tokens": config.batch_size * config.model.block_size, **times})
        while True:
            updates = pipe.recv()
            start = time.perf_counter()
            loss = trainer.updates(updates)
            seconds = time.perf_counter() - start
            pipe.send({"seconds": seconds, "loss": loss, "peak_bytes": trainer.peak_bytes()})
    except EOFError:  # the other end was closed
        return
    except Exception as error:
        of_torch, of_jax = type(error).__name__ == "OutOfMemoryError", "RESOURCE_EXHAUSTED" in str(error)
        if of_torch or of_jax or isinstance(error, MemoryError):
            pipe.send({"error": OUT_OF_MEMORY})
        else:
            traceback.print_exc()
            pipe.send({"error": f"{type(error).__name__}: {error}"})
