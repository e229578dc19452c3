"""Updates to pass over: named in `skip_updates`, or added to it by a rewind.

A rewind resumes the run from its newest checkpoint with a longer `skip_updates` (PaLM, Chowdhery et al. 2022, section
5.1). The result is bit for bit that of a run that had this `skip_updates` from the start.
"""

from __future__ import annotations

import dataclasses

from gpt2_jax.checkpoint_info import complete_checkpoints
from gpt2_jax.config import TrainConfig
from gpt2_jax.distributed.agreement import broadcast_from_primary, is_primary
from gpt2_jax.errors import ReplicaError, RewindError, UserError
from gpt2_jax.files import user_path
from gpt2_jax.run.directory import saved_config, write_config


def with_skipped_updates(config: TrainConfig, saved: TrainConfig | None) -> TrainConfig:
    """The config of a resumed run, with the updates that were passed over before."""
    before = saved.skip_updates if saved else ()
    return dataclasses.replace(config, skip_updates=tuple(sorted({*config.skip_updates, *before})))


def check_skipped_updates(config: TrainConfig, saved: TrainConfig | None, start: int) -> None:
    """Checks that updates which are newly named were not done yet.

    Raises:
        UserError: one was.
    """
    before = saved.skip_updates if saved else ()
    done = [update for update in config.skip_updates if update <= start and update not in before]
    if done:
        raise UserError(
            f"skip_updates names update {done[0]}, and the newest checkpoint of {config.out} is from after update "
            f"{start}; move away the checkpoints from {done[0]} on, or type another --out"
        )


def rewound(config: TrainConfig, error: RewindError, restored: int | None) -> tuple[TrainConfig, int | None]:
    """The config to resume with after a rewind, which is also written to the run directory.

    Args:
        error: says why. Without an update to pass over, copies of the training state differ.
        restored: the checkpoint that the run went back to when copies differed the last time, None for never.

    Returns:
        The config, and `restored` for the next call.

    Raises:
        ReplicaError: copies differ again before a newer checkpoint was saved. A device that always computes wrongly
            would otherwise send the run back forever.
    """
    saved = saved_config(config)
    out = user_path(config.out, "out")
    steps = [path.name for path in complete_checkpoints(out / "checkpoints")] if saved else []
    newest = int(broadcast_from_primary("newest", steps[-1] if steps else "0"))
    where = f"checkpoints/{newest}" if newest else "the start"
    if not error.update:
        if restored == newest:
            raise ReplicaError(f"{error}; the run has already gone back to {where} for this") from error
        restored = newest
    first = max(newest + 1, error.update - config.optimizer.rewind_updates + 1)
    named = range(first, error.update + 1) if error.update else ()
    config = with_skipped_updates(dataclasses.replace(config, skip_updates=(*config.skip_updates, *named)), saved)
    if is_primary():
        if saved:  # a kill before the first update must not forget them
            write_config(out, dataclasses.replace(saved, skip_updates=config.skip_updates))
        passing = f", passing over {error.update if len(named) == 1 else f'{first} to {error.update}'}" if named else ""
        print(f"{error}; continuing from {where}{passing}", flush=True)
    return config, restored
