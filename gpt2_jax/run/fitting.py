"""Fits a run into the memory of its devices: the values for "auto", and the line about a run that does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager

import jax
from jax.sharding import Mesh

from gpt2_jax.checkpoint_info import complete_checkpoints, read_info
from gpt2_jax.compilation_cache import ProgramCache
from gpt2_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, TrainConfig
from gpt2_jax.config.toml import to_toml
from gpt2_jax.display import count
from gpt2_jax.distributed.agreement import broadcast_from_primary, least
from gpt2_jax.errors import DamagedError, UserError
from gpt2_jax.files import user_path
from gpt2_jax.hardware import available_memory
from gpt2_jax.planning import shortage
from gpt2_jax.planning.estimate import Memory, TooLargeError, compile_step
from gpt2_jax.planning.fit import smallest_change
from gpt2_jax.planning.micro_batch import USABLE, Change, Fit, fit, is_open
from gpt2_jax.run.provenance import made_by

GROWTH = 1.05  # a larger part of memory that is free is worth a new search


def fitted(
    config: TrainConfig, saved: TrainConfig | None, mesh: Mesh, cache: ProgramCache | None
) -> tuple[TrainConfig, str]:
    """The config with values for "auto" that fit into the memory of the devices, and a line that says how they came.

    A run that resumes on the devices that it ran on keeps its values, so that it stays equal to an undisturbed one bit
    for bit. On other devices, and for a new run, they come from the cache of programs or from a search. All processes
    call it together.

    Args:
        config: resolved, with the vocabulary size of the data.
        saved: the config of the run before it was interrupted.
        mesh: the devices.
        cache: remembers what was found.

    Raises:
        UserError: nothing fits.
    """
    if not is_open(config):
        return config, ""
    if saved and _ran_here(config, mesh):
        before = Change(
            saved.micro_batch_limit if config.micro_batch_size == "auto" else None,
            saved.model.remat if config.model.remat == "auto" else None,
        )
        return before.apply(config), "as before"
    devices = list(mesh.devices.flat)
    memory = least("memory", available_memory(jax.local_devices()[0]))
    key = "micro-batch-" + hashlib.sha256(_facts(config, mesh).encode()).hexdigest()
    found = _remembered(broadcast_from_primary("micro-batch", _get(cache, key)), memory)
    if found:
        return found.apply(config), f"as found before: {found.memory}"
    try:
        found = fit(config, devices, memory, lambda line: None)
    except TooLargeError as error:
        raise UserError(_no_memory(config, devices, error.memory)) from error
    if cache and found.compilations:
        cache.put(key, json.dumps([*found[:2], *found.memory]).encode())
    if not found.compilations:
        return found.apply(config), ""
    return found.apply(config), f"{found.memory}, found in {count(found.compilations, 'compilation')}"


def _facts(config: TrainConfig, mesh: Mesh) -> str:
    """All that the memory of the training step depends on, and more."""
    config = dataclasses.replace(
        config,
        out="",
        steps=1,
        skip_updates=(),
        init_from="",
        compilation_cache="",
        data=DataConfig(),
        checkpoint=CheckpointConfig(),
        eval=EvalConfig(),
        log=LogConfig(),
    )
    return json.dumps(made_by(mesh)) + to_toml(config)


def _get(cache: ProgramCache | None, key: str) -> str:
    return (cache.get(key) or b"").decode() if cache else ""


def _remembered(entry: str, available: int | None) -> Fit | None:
    """What an entry of the cache says, if it still fits and memory has not grown since."""
    if not entry or not available:
        return None
    size, remat, required, before = json.loads(entry)
    fits = required <= USABLE * available
    return Fit(size, remat, Memory(required, available), 0) if fits and available <= GROWTH * before else None


def _ran_here(config: TrainConfig, mesh: Mesh) -> bool:
    """True if the newest checkpoint of the run was saved on the same devices."""
    checkpoints = complete_checkpoints(user_path(config.out, "out") / "checkpoints")
    here = made_by(mesh)
    for path in reversed(checkpoints):
        try:
            before = read_info(path).get("made_by", {})
        except DamagedError:
            continue
        return all(before.get(key) == here[key] for key in ("device", "mesh"))
    return False


def explaining_memory(config: TrainConfig, mesh: Mesh) -> AbstractContextManager[None]:
    """Replaces the error of a device that has no memory left by one line with the smallest change that fits.

    Args:
        config: resolved, without "auto".
        mesh: the devices.
    """
    devices = list(mesh.devices.flat)

    def explain(available: int, doing: str) -> str:
        try:
            memory = compile_step(config, devices, available).memory
        except TooLargeError as error:
            memory = error.memory
        return _no_memory(config, devices, memory, doing)

    return shortage.explaining_memory(explain, f"type a smaller --micro_batch_size than {config.micro_batch_limit}")


def _no_memory(config: TrainConfig, devices: Sequence[jax.Device], memory: Memory, doing: str = "") -> str:
    """The line about a config whose training step ran out of memory, or would."""
    lacking = memory._replace(required=memory.available + 1) if memory.fits and memory.available else memory
    change = smallest_change(config, devices, lacking)
    return shortage.shortage(
        "the training step", memory, doing, str(change or ""), otherwise="take a smaller model, or more devices"
    )
