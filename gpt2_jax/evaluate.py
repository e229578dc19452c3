"""Evaluates models: `python -m gpt2_jax.evaluate --model MODEL --tasks hellaswag,lambada`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from gpt2_jax import runtime
from gpt2_jax.activity import activity_line
from gpt2_jax.cli import run_command
from gpt2_jax.config import Dtype, MeshConfig
from gpt2_jax.config.flags import parse_flags, take_flags
from gpt2_jax.display import Display, count, duration
from gpt2_jax.distributed.agreement import is_primary
from gpt2_jax.distributed.cluster import ClusterFlags, detect_cluster
from gpt2_jax.distributed.session import distributed_session
from gpt2_jax.errors import UserError, import_optional, strip_controls
from gpt2_jax.evaluation import TASKS, Evaluator, Result
from gpt2_jax.evaluation.scoring import lower_score_step
from gpt2_jax.evaluation.table import table, to_json
from gpt2_jax.evaluation.tasks import HARNESS, find_tasks
from gpt2_jax.files import replace_text, user_path
from gpt2_jax.generation import LanguageModel
from gpt2_jax.hardware import current_hardware
from gpt2_jax.interop import MODEL_KINDS, is_on_disk, use_model
from gpt2_jax.interop.stored import StoredModel
from gpt2_jax.model import GPT2
from gpt2_jax.planning.estimate import required_memory
from gpt2_jax.planning.shortage import Setting, naming_a_smaller_setting
from gpt2_jax.resolve import matmul_dtype, same_or_narrower
from gpt2_jax.sharding import make_mesh

PROG = "python -m gpt2_jax.evaluate"
DESCRIPTION = """Evaluate a model on public tasks, as the published protocols do. Without --data, the examples come from
the Hugging Face hub. Start the command once on every host to evaluate over all of them: it takes the same flags as
gpt2_jax.train (--coordinator HOST:PORT, --processes N, --process I)."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command."""

    tasks: Annotated[str, tyro.conf.arg(help=f"Tasks, with commas between: {', '.join(TASKS)}, lm-eval:TASK.")]
    model: Annotated[str, tyro.conf.arg(help=f"MODEL: {MODEL_KINDS}.", help_behavior_hint="")] = ""
    compare: tuple[str, ...] = ()
    """Several MODELs instead of one: the table shows how each differs from the first."""
    data: tuple[str, ...] = ()
    """Directories with the public files under their usual names, or files. The task loss reads any text or tokens."""
    limit: int = 0
    """Examples per task at most, or windows of a task that scores a stream of text; 0 for all."""
    stride: int = 0
    """Tokens that a sliding window predicts; 0 for half of the model's block_size."""
    json: str = ""
    """File to write the results to, as JSON."""
    dump: str = ""
    """File to write the log-probabilities of all tokens to, as lines of JSON."""
    dtype: Dtype = "float32"
    """Dtype of activations and matmuls. Published figures are in float32; bfloat16 is faster on accelerators.
    auto is the one that gpt2_jax.train takes on the same device."""
    fsdp: int = 1
    """Devices that share one copy of the parameters, for a model that does not fit into one."""


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    cluster_args, args = take_flags(ClusterFlags, args)
    flags = parse_flags(Flags, args, prog=PROG, description=DESCRIPTION)
    cluster_flags = parse_flags(ClusterFlags, cluster_args, prog=PROG, description=DESCRIPTION)
    names = _model_names(flags)
    for name, value in (("--limit", flags.limit), ("--stride", flags.stride)):
        if value < 0:
            raise UserError(f"{name} {value}; expected 1 or more, or 0 for the default")
    with distributed_session(detect_cluster(cluster_flags, os.environ), cluster_flags, {UserError: 2}):
        return _evaluate(names, flags)


def _model_names(flags: Flags) -> list[str]:
    if bool(flags.model) == bool(flags.compare):
        raise UserError("give --model MODEL, or --compare MODEL MODEL ..., and not both")
    names = [flags.model] if flags.model else list(flags.compare)
    if flags.compare and len(set(names)) < max(2, len(names)):
        raise UserError(f"--compare {' '.join(names)}: expected at least two MODELs, each once")
    return names


def _evaluate(names: Sequence[str], flags: Flags) -> int:
    runtime.enable_compilation_cache("auto")
    mesh = make_mesh(MeshConfig(fsdp=flags.fsdp))
    for flag, text in (("--json", flags.json), ("--dump", flags.dump)):
        if text and not (path := user_path(text, flag)).absolute().parent.is_dir():
            raise UserError(f"{flag} {path}: {path.parent} is not a directory; create it, or type another path")
    # What is mistyped is found before the first model takes its time.
    tasks = _split_tasks(flags.tasks)
    for name in names if flags.compare else ():
        use_model(name, lambda stored: None)
    dtype = matmul_dtype(flags.dtype, current_hardware())
    models = {name: _evaluate_model(name, flags, tasks, mesh, dtype) for name in names}
    if is_primary():
        for line in table(models):
            print(strip_controls(line))
        if flags.json:
            text = json.dumps(to_json(models), indent=2, allow_nan=False)
            replace_text(user_path(flags.json, "--json"), text + "\n")
        if flags.dump:
            replace_text(user_path(flags.dump, "--dump"), _records(models))
    return 0


def _records(models: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    """The lines of `--dump`: one for each continuation."""
    for name, results in models.items():
        for task, result in results.items():
            for record in result.records():
                yield json.dumps({"model": name, "task": task, **record}) + "\n"


class _Tasks(NamedTuple):
    """The names of our tasks, and of those of the harness."""

    own: list[str]
    harness: list[str]


def _split_tasks(text: str) -> _Tasks:
    """Checks and sorts the names of `--tasks`.

    Raises:
        UserError: there is no such task, or lm-eval is not installed.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    tasks = _Tasks(
        own=[name for name in names if not name.startswith(HARNESS)],
        harness=[name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS)],
    )
    if tasks.own or not tasks.harness:
        find_tasks(tasks.own)
    if tasks.harness:
        import_optional("lm_eval", f"the task {HARNESS}{tasks.harness[0]}", "lm-eval")
        from gpt2_jax.evaluation.harness import check_tasks

        check_tasks(tasks.harness)
    return tasks


def _evaluate_model(name: str, flags: Flags, tasks: _Tasks, mesh: Mesh, dtype: Dtype) -> dict[str, Result]:
    """Loads and evaluates a model."""

    def load(stored: StoredModel) -> tuple[Evaluator | None, LanguageModel, StoredModel]:
        evaluator = None
        if tasks.own:
            evaluator = Evaluator(  # finds what is wrong with the examples before the parameters are read
                GPT2(stored.config.unrolled("auto"), jnp.dtype(dtype)),
                stored.tokenizer,
                tasks.own,
                mesh,
                data=flags.data or None,
                limit=flags.limit or None,
                stride=flags.stride or None,
                named=stored.named,
            )
        with _explaining_memory(stored, mesh, dtype):
            return evaluator, stored.load(mesh, jnp.dtype(dtype)), stored

    downloads = not flags.data or not is_on_disk(name)  # these show bars of their own
    with activity_line(quiet=downloads or not is_primary()):
        evaluator, gpt2, stored = use_model(name, load)
    with _explaining_memory(stored, mesh, dtype):
        results = _run(evaluator, gpt2, name) if evaluator else {}
        if tasks.harness:
            from gpt2_jax.evaluation.harness import run_harness

            results |= run_harness(gpt2, tasks.harness, mesh, flags.limit or None)
    return results


def _explaining_memory(stored: StoredModel, mesh: Mesh, dtype: Dtype) -> AbstractContextManager[None]:
    """Replaces the error of a device without memory by one line with the smallest change that fits."""

    def required(fsdp: int, dtype: Dtype) -> int:
        """Compiles the step, and returns the bytes that it requires on each device."""
        here = make_mesh(MeshConfig(fsdp=fsdp))
        model, params = stored.abstract(here, jnp.dtype(dtype))
        return required_memory(lower_score_step(model, here, params), params)

    settings = [
        Setting({"--fsdp": fsdp, "--dtype": other}, functools.partial(required, fsdp, other))
        for other in same_or_narrower(dtype, current_hardware())
        for fsdp in range(mesh.shape["fsdp"], mesh.size + 1)
        if mesh.size % fsdp == 0
    ]
    return naming_a_smaller_setting("scoring", settings)


def _run(evaluator: Evaluator, gpt2: LanguageModel, name: str) -> dict[str, Result]:
    """Evaluates our own tasks with a progress bar."""
    counts = evaluator.n_continuations()
    before = dict(zip(counts, itertools.accumulate(counts.values(), initial=0), strict=False))
    total, began = sum(counts.values()), list[tuple[float, int]]()
    with Display(0, total, "compiling", quiet=not is_primary()) as display:

        def progress(task: str, done: int) -> None:
            done += before[task]
            if not began:  # those so far waited for the compiler
                began.append((time.perf_counter(), done))
            start, compiled = began[0]
            parts = [task]
            if done > compiled:
                parts.append(f"{duration((time.perf_counter() - start) * (total - done) / (done - compiled))} left")
            display.show(done, f"{name}, {done:,} of {count(total, 'continuation')}", parts)

        return evaluator(gpt2.params, progress)


def command() -> None:
    """Entry point of `gpt2-evaluate`."""
    run_command(main)


if __name__ == "__main__":
    command()
