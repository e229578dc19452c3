"""Trains a GPT-2: `python -m gpt2_jax.train --config NAME|FILE.toml [--section.key value ...]`.

Started again with the same config, a run continues from its newest checkpoint, bit for bit. Started once on every host,
it is one run over all of them (`launcher.py` says how they find each other).

Exit codes, the same in all processes: 0, the run is done; 143 after SIGTERM, with a checkpoint, and the same command
continues; 2, something that the user has to mend; any other, it crashed, and the same command goes on from the last
checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext

import jax
import jax.numpy as jnp

from gpt2_jax import attention, launcher, processes, runtime
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.cli import parse_args, parse_flags, run_command, take_flags
from gpt2_jax.config import TrainConfig, UserError
from gpt2_jax.config_file import to_toml
from gpt2_jax.data import open_data
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import TrainBatches, read_ahead
from gpt2_jax.files import exclusive
from gpt2_jax.interop.initial import open_initial
from gpt2_jax.model import GPT2
from gpt2_jax.resolve import resolve
from gpt2_jax.run import TRAIN, DivergedError, Run, is_due, open_directory, saved_config
from gpt2_jax.sharding import abstract_batch, batch_sharding, local_rows, make_mesh, micro_batches, put_batch
from gpt2_jax.step import make_train_step

DESCRIPTION = """Train a GPT-2. Started once on every host, it trains over all of them. SLURM, Open MPI and TPU pod
slices need no flags for that; others take --coordinator HOST:PORT (of process 0), --processes N and --process I (from
0), or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. --coordinator-timeout SECONDS (300) is how long
they may take to come together, --heartbeat-timeout SECONDS (100) how long one may be silent before the others end."""


def main(args: Sequence[str]) -> int:
    """The command; returns its exit code."""
    words, args = take_flags(launcher.Flags, args)
    if {"--help", "-h"} & set(args) or not any(word.split("=")[0] == "--config" for word in args):
        parse_args(TRAIN, DESCRIPTION, args)  # shows what there is, and exits
    flags = parse_flags(launcher.Flags, words, prog=TRAIN, description=DESCRIPTION)
    launch = launcher.detect(flags, os.environ)
    runtime.one_heap()
    try:
        with processes.joined(launch, flags, {UserError: 2, DivergedError: 1}):
            return train(parse_args(TRAIN, DESCRIPTION, args))
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> int:
    """Trains, or continues training, until `config.steps` updates are done, and reports.

    One of several processes calls it within `processes.joined`, or an error in one leaves the others waiting.

    Args:
        config: validated.
        devices: to train on; all by default.

    Returns:
        0, or 128 + the number of a signal that stopped the run; then the same call continues it.

    Raises:
        UserError: config, data, devices and run directory do not fit together.
        DivergedError: the loss is not finite any more.
    """
    hardware = attention.current_hardware()
    runtime.keep_programs(config.compilation_cache)
    config, choice = resolve(config, hardware)
    initial, config = open_initial(config, saved_config(config))
    mesh = make_mesh(config.mesh, devices)
    schedule = BatchSchedule(config.batch_size, config.batch_ramp, config.model.block_size)
    accumulation = {size: micro_batches(size, config.micro_batch_size, mesh) for size in schedule.sizes()}
    data, config = open_data(config)
    processes.agree("config", to_toml(config))
    processes.agree("data", data.fingerprint)
    out = open_directory(config)

    model = GPT2(dataclasses.replace(config.model, attention=choice.backend), jnp.dtype(config.dtype))
    train_step = make_train_step(model, config.optimizer, mesh, config.seed)
    source = TrainBatches(data.train, schedule, accumulation, functools.partial(local_rows, mesh))
    sharding = batch_sharding(mesh, micro_batches=True)
    # float32 means float32: left alone, GPUs would round the operands of products to TF32 and TPUs to bfloat16.
    precision = "highest" if config.dtype == "float32" else None

    with (
        jax.default_matmul_precision(precision),
        exclusive(out, "training") if processes.is_first() else nullcontext(),
        Checkpoints(out / "checkpoints", config.checkpoint.keep) as checkpoints,
    ):
        run = Run(config, data, model, mesh, schedule, out, checkpoints, initial)
        done = run.start
        run.say_hello(choice)
        with (
            processes.stop_signals() as asked_to_stop,
            run.display,
            closing(read_ahead(source, run.start, config.steps)) as batches,
        ):
            if hardware.platform == "cpu" and done < config.steps:
                runtime.keep_memory(train_step.lower(run.state, abstract_batch(config, mesh)).compile())
            try:
                while done < config.steps and not (signal_number := asked_to_stop(done)):
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
                if jax.process_count() == 1:  # the others know nothing of it, and saving needs them all
                    run.save(done)
                raise
            run.save(done)
            if done < config.steps:
                checkpoints.wait()
                run.display.say(f"stopped after update {done} of {config.steps}; the same command continues it")
                return 128 + signal_number
        run.summarize()
    return 0


if __name__ == "__main__":
    run_command(main)
