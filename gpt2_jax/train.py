"""Trains a GPT-2: `python -m gpt2_jax.train --config NAME|FILE.toml [--section.key value ...]`.

Started again with the same config, a run continues from its newest checkpoint, bit for bit.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType

import jax
import jax.numpy as jnp

from gpt2_jax import attention
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.cli import parse_args, run_command
from gpt2_jax.config import TrainConfig, UserError
from gpt2_jax.data import open_data
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import TrainBatches, read_ahead
from gpt2_jax.files import exclusive
from gpt2_jax.interop.initial import open_initial
from gpt2_jax.model import GPT2
from gpt2_jax.run import TRAIN, DivergedError, Run, is_due, open_directory, saved_config
from gpt2_jax.sharding import batch_sharding, make_mesh, micro_batches, put_batch
from gpt2_jax.step import make_train_step


def main(args: Sequence[str]) -> int:
    """The command; returns its exit code."""
    config = parse_args(TRAIN, "Train a GPT-2.", args)
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
    if jax.process_count() > 1:
        raise UserError(f"training runs in one process so far, found {jax.process_count()}; start it on one host")
    config, choice = resolve(config, attention.current_hardware())
    initial, config = open_initial(config, saved_config(config))
    mesh = make_mesh(config.mesh, devices)
    schedule = BatchSchedule(config.batch_size, config.batch_ramp, config.model.block_size)
    accumulation = {size: micro_batches(size, config.micro_batch_size, mesh) for size in schedule.sizes()}
    data, config = open_data(config)
    out = open_directory(config)

    model = GPT2(dataclasses.replace(config.model, attention=choice.backend), jnp.dtype(config.dtype))
    train_step = make_train_step(model, config.optimizer, mesh, config.seed)
    process = (jax.process_index(), jax.process_count())
    source = TrainBatches(data.train, schedule, accumulation, process)
    sharding = batch_sharding(mesh, micro_batches=True)
    # float32 means float32: left alone, GPUs would round the operands of products to TF32 and TPUs to bfloat16.
    precision = "highest" if config.dtype == "float32" else None

    with (
        jax.default_matmul_precision(precision),
        exclusive(out, "training"),
        Checkpoints(out / "checkpoints", config.checkpoint.keep) as checkpoints,
    ):
        run = Run(config, data, model, mesh, schedule, out, checkpoints, initial)
        done = run.start
        run.say_hello(choice)
        with stop_signals() as received, run.display, closing(read_ahead(source, run.start, config.steps)) as batches:
            try:
                while done < config.steps and not received:
                    batch = next(batches)
                    with jax.transfer_guard("disallow"):  # only the batch goes to the device, and explicitly
                        run.state, metrics = train_step(run.state, put_batch(batch, sharding))
                    run.report()  # of the update before: the device has its next work already
                    done += 1
                    run.pending = (done, metrics)
                    if done == config.steps or is_due(done, config.eval.every):
                        run.evaluate(done)
                    if is_due(done, config.checkpoint.every):
                        run.save(done)
            except UserError:  # damaged data, found late: nothing of the run so far is lost
                run.save(done)
                raise
            run.save(done)
            if done < config.steps:
                checkpoints.wait()
                run.display.say(f"stopped after update {done} of {config.steps}; the same command continues it")
                return 128 + received[0]
        run.summarize()
    return 0


def resolve(config: TrainConfig, hardware: attention.Hardware) -> tuple[TrainConfig, attention.Choice]:
    """Fills in what follows from the config and the hardware, and chooses the attention backend.

    Raises:
        UserError: the attention backend asked for cannot serve.
    """
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if hardware.platform == "cpu" else "bfloat16"
    optimizer = dataclasses.replace(config.optimizer, decay_steps=config.optimizer.decay_steps or config.steps)
    choice = attention.choose(
        config.model.attention,
        hardware=hardware,
        dtype=jnp.dtype(dtype),
        time=config.model.block_size,
        head_dim=config.model.n_embd // config.model.n_head,
        dropout=config.model.dropout,
    )
    return dataclasses.replace(config, dtype=dtype, optimizer=optimizer), choice


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within, SIGTERM and the first Ctrl-C only add their number to the list: the loop ends where it can go on."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        print(f"\n{signal.Signals(number).name}: stopping after this update, with a checkpoint", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C means it

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_command(main)
