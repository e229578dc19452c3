"""Trains a GPT-2: `python -m gpt2_jax.train --config NAME|FILE.toml [--section.key value ...]`.

The same command resumes a run from its newest checkpoint, bit for bit. Started once on every host, it trains one model
over all of them (`distributed/cluster.py` says how the processes find each other).

Exit codes, equal in all processes: 0 after the last update; 143 after SIGTERM, 130 after Ctrl-C and 129 when the
terminal closes (with several processes always 143), with a checkpoint to resume from; 2 for what the user has to fix.
Anything else is a crash, and the same command resumes from the last checkpoint.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext, redirect_stdout
from typing import TextIO

import jax

from gpt2_jax import runtime
from gpt2_jax.activity import activity_line
from gpt2_jax.cli import STARTED, run_command
from gpt2_jax.compiler_options import compiler_options
from gpt2_jax.config import TrainConfig
from gpt2_jax.config.flags import parse_args, parse_flags, take_flags
from gpt2_jax.config.toml import to_toml
from gpt2_jax.data import open_data
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import BatchSource, read_ahead
from gpt2_jax.display import Display
from gpt2_jax.distributed.agreement import assert_equal, is_primary, stop_signals
from gpt2_jax.distributed.cluster import ClusterFlags, detect_cluster
from gpt2_jax.distributed.session import distributed_session
from gpt2_jax.errors import DivergedError, ReplicaError, RewindError, SaveError, UserError
from gpt2_jax.files import exclusive, user_path
from gpt2_jax.hardware import available_memory, current_hardware
from gpt2_jax.interop import is_on_disk
from gpt2_jax.loss_scale import count_overflows
from gpt2_jax.model import n_params
from gpt2_jax.planning.estimate import Memory, program_memory
from gpt2_jax.reports.following import following
from gpt2_jax.reports.trackers import STATE, import_trackers
from gpt2_jax.resolve import build_model, matmul_precision, resolve
from gpt2_jax.run import goodput, summary
from gpt2_jax.run.checkpoints import RunCheckpoints, open_checkpoints
from gpt2_jax.run.curve import draw_losses
from gpt2_jax.run.directory import forget_other_run, open_directory, saved_config, write_config
from gpt2_jax.run.evaluating import open_tasks, validation_loss
from gpt2_jax.run.fitting import explaining_memory, fitted
from gpt2_jax.run.goodput import Clock
from gpt2_jax.run.initial import keep_initial_tokenizer, open_initial
from gpt2_jax.run.layer_statistics import make_add_activations
from gpt2_jax.run.noise_scale import check_several_gradients
from gpt2_jax.run.profiling import parse_updates, traced
from gpt2_jax.run.provenance import check_same_software
from gpt2_jax.run.reporting import Reporter, is_due
from gpt2_jax.run.rewinding import check_skipped_updates, rewound, with_skipped_updates
from gpt2_jax.run.samples import Samples, sample_text
from gpt2_jax.run.stalls import watched
from gpt2_jax.sharding import (
    abstract_batch,
    batch_sharding,
    devices_for,
    local_rows,
    make_mesh,
    num_micro_batches,
    put_batch,
)
from gpt2_jax.step import Metrics, make_eval_step, make_train_step, skip_update

DESCRIPTION = """Train a GPT-2. Start the command once on every host to train over all of them. SLURM, Open MPI and TPU
pod slices need no flags. Elsewhere give --coordinator HOST:PORT (of process 0), --processes N and --process I (from 0),
or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. --coordinator-timeout SECONDS (300) limits the
time to connect. --heartbeat-timeout SECONDS (100) is the silence after which a process counts as dead."""

# After the others, the same command resumes, and may succeed. A run that diverged would diverge again.
EXIT_CODES: dict[type[Exception], int] = {UserError: 2, DivergedError: 2, SaveError: 1, ReplicaError: 1}


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    cluster_args, args = take_flags(ClusterFlags, args)
    if {"--help", "-h"} & set(args) or not any(arg.split("=")[0] == "--config" for arg in args):
        parse_args(summary.TRAIN, DESCRIPTION, args, own=ClusterFlags)  # prints the help or the presets, and exits
    flags = parse_flags(ClusterFlags, cluster_args, prog=summary.TRAIN, description=DESCRIPTION)
    cluster = detect_cluster(flags, os.environ)
    runtime.use_single_malloc_arena()
    runtime.use_most_of_gpu_memory()
    try:
        with distributed_session(cluster, flags, EXIT_CODES):
            notes: list[str] = []
            config = parse_args(summary.TRAIN, DESCRIPTION, args, notes.append)
            display = Display(0, 0, "", file=sys.stderr if config.log.format == "json" else sys.stdout)
            for line in notes if is_primary() else []:
                display.print(line, indent=0)
            return train(config, started=STARTED)
    except (DivergedError, SaveError, ReplicaError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODES[type(error)]


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None, started: float | None = None) -> int:
    """Trains, or resumes training, until `config.steps` updates are done, and reports.

    With several processes, call it within `distributed_session`: otherwise an error in one process leaves the others
    waiting.

    Args:
        config: validated.
        devices: the devices to train on; by default those of `devices_for`.
        started: when the command began, a `time.time()`; by default now.

    Returns:
        0, or 128 + the number of the signal that stopped the run; then the same call resumes it.

    Raises:
        UserError: config, data, devices and run directory do not fit together.
        DivergedError: the loss is no longer finite.
        SaveError: checkpoints could not be saved.
        ReplicaError: copies of the training state differ between devices.
    """
    rows_to = sys.stdout if config.log.format == "json" else None
    restored: int | None = None
    with redirect_stdout(sys.stderr) if rows_to else nullcontext():
        while True:
            path = user_path(config.out, "out") / goodput.FILE
            try:
                with (
                    Clock(started or time.time(), path if is_primary() else None) as clock,
                    ExitStack() as start_line,
                ):
                    quiet = not is_primary() or _downloads(config)
                    start_line.enter_context(activity_line(quiet))
                    return _train(config, devices, rows_to, clock, start_line)
            except RewindError as error:  # resumes in this process, as the same command would
                config, restored = rewound(config, error, restored)
                started = time.time()


def _downloads(config: TrainConfig) -> bool:
    """True if the start may show bars of others: those of downloads."""
    model = bool(config.init_from) and not is_on_disk(config.init_from)
    return model or bool(config.eval.tasks and not config.eval.tasks_data)


def _train(
    config: TrainConfig,
    devices: Sequence[jax.Device] | None,
    rows_to: TextIO | None,
    clock: Clock,
    start_line: ExitStack,
) -> int:
    check_same_software()
    import_trackers(config.log.to)
    hardware = current_hardware()
    cache = runtime.enable_compilation_cache(config.compilation_cache)
    config, attention = resolve(config, hardware)
    saved = saved_config(config)
    config = with_skipped_updates(config, saved)
    initial, config = open_initial(config, saved)
    schedule = BatchSchedule(config.batch_size, config.batch_ramp, config.model.block_size)
    mesh = make_mesh(config.mesh, devices or devices_for(schedule.sizes(), config.mesh))
    for size in schedule.sizes():  # fails here, before the data is read
        num_micro_batches(size, 1 if config.micro_batch_size == "auto" else config.micro_batch_size, mesh)
    data, config = open_data(config)
    config, fit = fitted(config, saved, mesh, cache)
    accumulation = {size: num_micro_batches(size, config.micro_batch_limit, mesh) for size in schedule.sizes()}
    check_several_gradients(config, {size: mesh.shape["data"] * count for size, count in accumulation.items()})
    assert_equal("config", to_toml(config))
    assert_equal("data", data.fingerprint)

    model = build_model(config, attention)
    options = compiler_options(config, hardware)
    measured = config.log.noise_scale, config.log.layers > 0
    train_step = make_train_step(model, config.optimizer, mesh, config.seed, options, *measured)
    add_activations = make_add_activations(model, mesh) if config.log.layers else None
    evaluate = functools.partial(validation_loss, make_eval_step(model, mesh, options), data.val, config, mesh)
    tasks = open_tasks(config, model, data.tokenizer, mesh, options)
    continue_prompts = Samples(config, model, data.tokenizer) if config.eval.prompts else None
    source = BatchSource(data.train, schedule, accumulation, functools.partial(local_rows, mesh))
    sharding = batch_sharding(mesh, leading_axis=True)

    with (
        watched(config.log) as watch,
        explaining_memory(config, mesh),
        open_directory(config, saved) as out,
        jax.default_matmul_precision(matmul_precision(config.dtype)),
        exclusive(out, "training") if is_primary() else nullcontext(),
        open_checkpoints(out / "checkpoints", config.checkpoint) as checkpoints,
    ):
        run_checkpoints = RunCheckpoints(checkpoints, config, model, mesh, data)
        with clock.phase(goodput.RESTORING if saved else goodput.STARTING):
            state, start = run_checkpoints.restore_or_init(initial)
        if is_primary() and not start:
            forget_other_run(out, config, (goodput.FILE, STATE))
        if start < config.steps:  # a run that is over and is typed again takes no time
            clock.resume(start)
        check_skipped_updates(config, saved, start)
        size = n_params(state.params, model.config)
        reporter = Reporter(out, config, mesh, size, run_checkpoints, schedule.tokens_after, start, rows_to)
        reporter.references = tasks.references() if tasks else {}
        if is_primary():
            write_config(out, config)
            if initial:
                keep_initial_tokenizer(initial, config, out)
        start_line.close()
        print_line = run_checkpoints.print_line = reporter.display.print
        run_checkpoints.before_save = reporter.flush
        n_tokens = schedule.tokens_after(config.steps)
        banner = summary.banner(config, data, mesh, attention, options, fit, state.params, n_tokens, out, start)
        for line in banner + run_checkpoints.room(start):
            reporter.display.print(line, summary.INDENT)
        with (
            stop_signals() as stop_requested,
            reporter.display,
            closing(read_ahead(source, start, config.steps)) as batches,
            traced(train_step, out / "profile", start, parse_updates(config.log.profile), print_line) as update,
            following(out, config.log.to if is_primary() else (), config, print_line) as trackers,
        ):
            if hardware.platform == "cpu" and start < config.steps:
                program = train_step.lower(state, abstract_batch(config, mesh)).compile()
                runtime.keep_freed_memory(program)
                if not fit:
                    reporter.show_memory(Memory(program_memory(program), available_memory(jax.local_devices()[0])))
            clock.enter(goodput.TRAINING)
            step, evaluations = start, dict[str, float]()
            pending: tuple[int, Metrics | None] | None = None  # the update whose metrics are still on the device
            while step < config.steps and not (signal_number := stop_requested(step)):
                since = time.perf_counter()
                try:
                    batch = next(batches)
                except UserError:  # damaged data, found late: keep what was trained
                    if jax.process_count() == 1:  # saving needs all processes, and the others do not know of the error
                        reporter.catch_up(pending)
                        run_checkpoints.save(step, state, run_checkpoints.fingerprint(state), evaluations)
                    raise
                clock.waited_for_data(since)
                with jax.transfer_guard("disallow"):  # only the batch goes to the device, and explicitly
                    if step + 1 in config.skip_updates:
                        state, metrics = skip_update(state), None
                    else:
                        tokens = put_batch(batch, sharding)
                        state, metrics = update(state, tokens)
                        clock.dispatched(metrics.loss)
                        if add_activations and is_due(step + 1, config.log.layers):
                            metrics = add_activations(metrics, state.params, tokens)
                        elif add_activations:
                            metrics = metrics._replace(layers=None)
                reporter.update(pending)  # fetched only now, when the device already has its next work
                watch.step = step
                step, evaluations = step + 1, {}
                pending = step, metrics
                evaluates = step == config.steps or is_due(step, config.eval.every)
                every = config.eval.tasks_every or config.eval.every
                runs_tasks = tasks is not None and (step == config.steps or is_due(step, every))
                saves = step < config.steps and is_due(step, config.checkpoint.every)
                if evaluates or runs_tasks or saves or is_due(step, config.log.check_replicas):
                    reporter.catch_up(pending)
                    watch.step = step
                    with clock.phase(goodput.EVALUATING):
                        fingerprint = run_checkpoints.fingerprint(state)
                        if evaluates:
                            evaluations |= reporter.validation(step, *evaluate(state.params, config.eval.tokens))
                            reporter.samples(step, continue_prompts(state.params) if continue_prompts else [])
                        if tasks is not None and runs_tasks:
                            evaluations |= reporter.tasks(step, tasks(state.params, reporter.progress))
                        if evaluations or saves:
                            reporter.evaluated(step, evaluations, fingerprint.state)
                    if saves:
                        with clock.phase(goodput.SAVING):
                            run_checkpoints.save(step, state, fingerprint, evaluations)
                    clock.record(step)
                clock.record(step, now=False)
            reporter.catch_up(pending)
            fingerprint = run_checkpoints.fingerprint(state)
            clock.enter(goodput.SAVING)
            run_checkpoints.save_and_wait(step, state, fingerprint, evaluations)
            clock.enter(goodput.EVALUATING)
            clock.record(step)
            trackers.is_over = step == config.steps
            if step < config.steps:
                print_line(f"stopped after update {step} of {config.steps}; the same command resumes it")
                return 128 + signal_number
        with activity_line(quiet=not is_primary()):
            loss_sum, n_targets = evaluate(state.params, 0 if data.val_text else config.eval.tokens)
            sample = sample_text(model, state.params, data, config)
        clock.record(step)
        if is_primary():
            best = checkpoints.best()
            final = fingerprint.state, count_overflows(state.opt_state)
            reporter.display.draw(functools.partial(draw_losses, out / "metrics.jsonl"))
            for line in summary.closing(config, data, out, loss_sum, n_targets, sample, best, *final):
                reporter.display.print(line, summary.indent(line))
    return 0


def command() -> None:
    """Entry point of `gpt2-train`."""
    run_command(main)


if __name__ == "__main__":
    command()
