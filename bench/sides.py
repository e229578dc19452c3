"""What trains in a process of its own, when bench/trainers.py says so: `python bench/sides.py SETTINGS`.

Settings are JSON: `side`, `compile`, `nanogpt`, and `flags`, those of `python -m gpt2_jax.train`. All sides take model,
batch, micro-batch and optimizer from them, have no dropout, and get the same random tokens.

    ours          `make_train_step` on the mesh, fed and read as train.py does: one update ahead of its metrics
    transformers  GPT2LMHeadModel with fused attention (SDPA) and fused AdamW
    nanogpt       model.py of a checkout of nanoGPT, with the optimizer that it configures

On a GPU torch computes in bfloat16 under autocast, TF32 where that leaves float32. Both torch sides have nanoGPT's
50,304 rows of vocabulary for GPT-2's 50,257, and wait for the device only at the end of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from trainers import OUT_OF_MEMORY

from gpt2_jax.config import TrainConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.errors import UserError

BATCHES = 8  # different ones, over and over
PADDED = {50257: 50304}  # as nanoGPT's train.py does
VOCABULARIES = {"gpt2": 50257, "bytes": 257}  # with end-of-text


class Side(Protocol):
    """What the process does updates with."""

    def updates(self, count: int) -> float:
        """Does so many, waits for the last one to end, and returns its loss."""

    def about(self) -> dict[str, Any]:
        """What it is."""

    def peak_bytes(self) -> int:
        """The most memory it had so far: of the device, on a CPU of the process."""


def training_config(flags: Sequence[str]) -> TrainConfig:
    """The config of a training's flags, without dropout, and with the vocabulary that its data would give it.

    Raises:
        UserError: as `parse_args`, or the vocabulary depends on a text.
    """
    config = parse_args("bench", "", [*flags, "--model.dropout", "0.0"])
    size = config.model.vocab_size or VOCABULARIES.get(config.data.tokenizer)
    if not size:
        raise UserError("the vocabulary depends on the text; type --model.vocab_size N")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def random_batches(config: TrainConfig) -> list[np.ndarray]:
    """The same for all sides: int32 [micro_batches, sequences, block_size + 1]."""
    rng = np.random.default_rng(0)
    micro = config.micro_batch_size or config.batch_size
    if config.batch_size % micro:
        raise UserError(f"batch_size = {config.batch_size} is no multiple of micro_batch_size = {micro}")
    shape = (config.batch_size // micro, micro, config.model.block_size + 1)
    return [rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(BATCHES)]


def resident_peak() -> int:
    """The most bytes that this process had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Ours:
    """This project's training step on one device, as train.py runs it.

    Args:
        config: validated.
        device: JAX's first by default.
    """

    def __init__(self, config: TrainConfig, device: Any = None) -> None:
        import jax
        import jax.numpy as jnp

        from gpt2_jax import attention, runtime
        from gpt2_jax.model import GPT2
        from gpt2_jax.resolve import resolve
        from gpt2_jax.sharding import batch_sharding, make_mesh
        from gpt2_jax.step import init_state, make_train_step

        self.device = device or jax.devices()[0]
        hardware = attention.hardware_of(self.device)
        runtime.enable_compilation_cache("")  # what it takes to compile is a figure
        self.config, choice = resolve(config, hardware)
        self.mesh = make_mesh(self.config.mesh, [self.device])
        self.model = GPT2(
            dataclasses.replace(self.config.model, attention=choice.backend), jnp.dtype(self.config.dtype)
        )
        self.sharding = batch_sharding(self.mesh, leading_axis=True)
        self.batches = random_batches(self.config)
        self.step = make_train_step(self.model, self.config.optimizer, self.mesh, self.config.seed)
        with self._precision():
            self.state = init_state(self.model, self.config.optimizer, self.mesh, self.config.seed)
        jax.block_until_ready(self.state)
        self.done = 0

    def _precision(self) -> Any:
        import jax

        return jax.default_matmul_precision("highest" if self.config.dtype == "float32" else None)

    def updates(self, count: int) -> float:
        """As `Side.updates`; the metrics of each update are fetched when the next one is under way."""
        import jax

        from gpt2_jax import runtime
        from gpt2_jax.sharding import put_batch

        pending, loss = None, float("nan")
        if not self.done and self.device.platform == "cpu":
            runtime.keep_freed_memory(self.compiled())
        with self._precision():
            for _ in range(count):
                batch = self.batches[self.done % BATCHES]
                with jax.transfer_guard("disallow"):
                    self.state, metrics = self.step(self.state, put_batch(batch, self.sharding))
                if pending is not None:
                    jax.device_get(pending)
                self.done += 1
                pending = metrics
            if pending is not None:
                loss = float(jax.device_get(pending).loss)
            jax.block_until_ready(self.state)
        return loss

    def about(self) -> dict[str, Any]:
        """As `Side.about`."""
        from gpt2_jax.hardware import chip_of
        from gpt2_jax.metrics import flops_per_token
        from gpt2_jax.model import n_params

        shape = self.model.config
        count = n_params(self.state.params, shape)
        in_products = count - shape.block_size * shape.n_embd  # without the position embeddings
        chip = chip_of(self.device) if self.config.dtype == "bfloat16" else None
        return {
            "device": self.device.device_kind,
            "dtype": self.config.dtype,
            "attention": shape.attention,
            "parameters": count,
            "flops_per_token": flops_per_token(in_products, shape.n_layer, shape.n_embd, shape.block_size),
            "peak_flops": chip.flops if chip else None,
        }

    def peak_bytes(self) -> int:
        """As `Side.peak_bytes`."""
        statistics = self.device.memory_stats()  # CPUs keep none
        return int(statistics["peak_bytes_in_use"]) if statistics else resident_peak()

    def compiled(self) -> Any:
        """The compiled update; after the first one it is not compiled again."""
        from gpt2_jax.sharding import put_batch

        with self._precision():
            return self.step.lower(self.state, put_batch(self.batches[0], self.sharding)).compile()

    def program(self) -> dict[str, int]:
        """As `Trainer.program`."""
        compiled = self.compiled()
        text = compiled.as_text()
        counts = {kind: len(re.findall(rf" = \S+ {kind}\(", text)) for kind in ("copy", "transpose", "convert")}
        return {**counts, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}

    def digest(self) -> str:
        """As `Trainer.digest`."""
        import jax

        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(jax.device_get(self.state.params)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


class Torch:
    """A model in torch, with the update that nanoGPT's and transformers' trainers do.

    Args:
        config: validated.
        compile: whether torch compiles the model.
        build: (config, device) -> the module, what computes the mean loss of (model, inputs, targets), the optimizer.
    """

    def __init__(self, config: TrainConfig, compile: bool, build: Callable[..., Any]) -> None:
        import torch

        self.torch, self.config = torch, config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high" if self.device.type == "cuda" else "highest")
        self.module, self.loss, self.optimizer = build(config, self.device)
        self.module.train()
        self.forward = torch.compile(self.module) if compile else self.module
        self.compile = compile
        half = self.device.type == "cuda" and config.dtype != "float32"
        self.autocast = torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext()
        self.dtype = "bfloat16" if half else "float32"
        batches = [torch.from_numpy(batch.astype(np.int64)) for batch in random_batches(config)]
        self.batches = [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches
        self.done = 0

    def updates(self, count: int) -> float:
        """As `Side.updates`."""
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
        """As `Side.about`."""
        cuda = self.device.type == "cuda"
        return {
            "device": self.torch.cuda.get_device_name() if cuda else "cpu",
            "dtype": self.dtype,
            "compile": self.compile,
            "threads": self.torch.get_num_threads(),
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
        }

    def peak_bytes(self) -> int:
        """As `Side.peak_bytes`."""
        return int(self.torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else resident_peak()


def transformers(config: TrainConfig, device: Any) -> tuple[Any, Any, Any]:
    """GPT-2 of `transformers`, for `Torch`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape, optimizer = config.model, config.optimizer
    if not shape.bias:
        raise UserError("transformers' GPT-2 has biases; type --model.bias true")
    module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=PADDED.get(shape.vocab_size, shape.vocab_size),
            n_positions=shape.block_size,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            activation_function={"tanh": "gelu_new", "exact": "gelu"}[shape.gelu],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
            bos_token_id=0,
            eos_token_id=0,
        )
    ).to(device)
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
    """GPT-2 of a checkout of nanoGPT, for `Torch`."""
    path = Path(directory) / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{directory!r} has no model.py; give the checkout of nanoGPT")
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code
    spec.loader.exec_module(code)

    shape, optimizer = config.model, config.optimizer
    module = code.GPT(
        code.GPTConfig(
            vocab_size=PADDED.get(shape.vocab_size, shape.vocab_size),
            block_size=shape.block_size,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            dropout=0.0,
            bias=shape.bias,
        )
    ).to(device)
    betas = (optimizer.beta1, optimizer.beta2)
    adamw = module.configure_optimizers(optimizer.weight_decay, optimizer.learning_rate, betas, device.type)
    return module, lambda model, inputs, targets: model(inputs, targets)[1], adamw


def build(settings: Mapping[str, Any]) -> Side:
    """The side that the settings name."""
    config = training_config(settings["flags"])
    if settings["side"] == "ours":
        return Ours(config)
    builders: dict[str, Callable[..., Any]] = {
        "transformers": transformers,
        "nanogpt": lambda config, device: nanogpt(settings["nanogpt"], config, device),
    }
    return Torch(config, settings["compile"], builders[settings["side"]])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether JAX, torch or Python say that memory is out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "RESOURCE_EXHAUSTED" in str(error)
    )


def serve(settings: Mapping[str, Any], requests: Any, answers: Any) -> None:
    """Builds a side, does its first update, and then what the lines of `requests` say."""

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        start = time.perf_counter()
        side = build(settings)
        built = time.perf_counter()
        side.updates(1)
        first = time.perf_counter() - built
        config = training_config(settings["flags"])
        tokens = config.batch_size * config.model.block_size
        answer(**side.about(), tokens=tokens, build_s=built - start, first_update_s=first)
        for line in requests:
            request = json.loads(line)
            if "updates" in request:
                start = time.perf_counter()
                loss = side.updates(request["updates"])
                answer(seconds=time.perf_counter() - start, loss=loss, peak_bytes=side.peak_bytes())
            elif "program" in request and isinstance(side, Ours):
                answer(**side.program())
            elif "digest" in request and isinstance(side, Ours):
                answer(digest=side.digest())
            else:
                raise ValueError(f"unknown request {line}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise  # the parent shows the end of the traceback
        answer(error=OUT_OF_MEMORY)


def main() -> None:
    """The process: what libraries print goes to stderr, so that stdout has answers alone."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if settings["side"] == "ours":
        from gpt2_jax import runtime

        runtime.use_single_malloc_arena()
    serve(settings, sys.stdin, answers)


if __name__ == "__main__":
    main()
