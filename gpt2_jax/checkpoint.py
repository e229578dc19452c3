"""Checkpoints on disk: asynchronous, atomic and sharded. Keeps the newest ones and the best.

Only this file uses Orbax, and `orbax_cleanup.py` after an error. It saves and restores trees of arrays and knows
nothing of the model. A checkpoint is complete when Orbax has written the file `COMPLETE` into it. No directory is
renamed, which object stores do file by file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gpt2_jax.checkpoint_info import read_info, seal
from gpt2_jax.errors import DamagedError, UserError, fixable, one_line
from gpt2_jax.orbax_cleanup import ending_threads


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Reports an error of Orbax as a DamagedError that names the checkpoint.

    Orbax raises a bare Exception for missing or cut files, and errors of many types for damaged ones.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or fixable(error):
            raise
        reason = one_line(error, None).split(" See full TensorStore details")[0][:200]
        raise DamagedError(f"the checkpoint {checkpoint} is damaged ({reason})") from error


class SavedState:
    """Reads parts of one checkpoint, and writes nothing into its directory.

    Args:
        path: DIRECTORY/STEP of a `Checkpoints`.

    Raises:
        DamagedError: it is not a complete checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._checkpoint = path.absolute()
        self._state = self._checkpoint / "state"
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        with _reading(self._checkpoint):
            metadata = self._reader.metadata(self._state).item_metadata
            if metadata is None:
                raise ValueError(f"no tree of arrays in {self._state}")
            self._tree = metadata.tree

    def read(self, *path: str) -> Any:
        """Reads the tree of NumPy arrays below the keys of `path`.

        Raises:
            KeyError: the checkpoint has no such keys.
            DamagedError: the checkpoint cannot be read.
        """
        part = functools.reduce(lambda tree, key: tree[key], path, self._tree)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)

        def nested(tree: Any) -> Any:
            return functools.reduce(lambda inner, key: {key: inner}, reversed(path), tree)

        args = ocp.args.PyTreeRestore(nested(shapes), restore_args=nested(as_numpy), partial_restore=True)
        with _reading(self._checkpoint):
            state = self._reader.restore(self._state, args=args)
        return functools.reduce(lambda tree, key: tree[key], path, state)


class Checkpoints:
    """The checkpoints of one run, in DIRECTORY/STEP. A context manager, because saves run in the background.

    Args:
        directory: created if missing. Leftovers of interrupted saves are removed.
        keep: number of newest checkpoints to keep, besides the best one.
        best: the metric that ranks them. Those without it are not ranked.
        highest: True if a higher value is better.
    """

    def __init__(self, directory: Path, keep: int, best: str = "val_loss", highest: bool = False) -> None:
        self.directory = directory

        def rank(metrics: dict[str, float]) -> float:
            """Lower is better."""
            return math.inf if best not in metrics else -metrics[best] if highest else metrics[best]

        self._rank = rank
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            # Compression reduces a state to 92% of its size and takes four times the processor time.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "info": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
                cleanup_tmp_directories=True,
                # The policy below decides what to keep. best_fn is set because Orbax stores metrics only with it, and a
                # resumed run needs them to know the best checkpoint.
                best_fn=rank,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(keep),
                        checkpoint_managers.BestN(
                            get_metric_fn=rank,
                            reverse=True,  # Orbax sorts and keeps the last, so the lowest has to come last
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # otherwise the first error counts
                raise

    def close(self) -> None:
        """Waits for background saves and releases the directory.

        Raises:
            OSError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def wait(self) -> None:
        """Waits until all saves are on disk.

        Raises:
            OSError: one could not be written. So does `save`, for the saves before.
        """
        with ending_threads():
            self._manager.wait_until_finished()

    def is_saving(self) -> bool:
        """True while a save runs in the background."""
        return self._manager.is_saving_in_progress()

    def latest(self) -> int | None:
        """The newest restorable step; None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The best restorable step; None if none is ranked."""
        step: int | None = self._manager.best_step()
        return step if step is not None and math.isfinite(self._rank(self._manager.metrics(step))) else None

    def steps(self) -> list[int]:
        """All restorable steps, in order."""
        return sorted(self._manager.all_steps())

    def reload(self) -> None:
        """Reads the directory again, after checkpoints were renamed or a save failed."""
        self._manager.reload()

    def save(self, step: int, state: Any, info: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Copies `state` off the devices, then writes it in the background.

        Args:
            state: tree of arrays.
            info: a JSON-serializable dict.
            metrics: the evaluations at this step by name. One of them ranks the checkpoint.
        """
        sealed = seal(step, metrics or {}, info)
        with ending_threads():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), info=ocp.args.JsonSave(sealed)),
                metrics=metrics or None,
            )

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restores the state of `step` with the shapes, dtypes and shardings of `abstract_state`.

        Raises:
            DamagedError: the checkpoint cannot be read.
        """
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract_state, restore_args=restore_args))
        with _reading(self.directory / str(step)):
            return self._manager.restore(step, args=args)["state"]

    def info(self, step: int) -> dict[str, Any]:
        """The `info` that was saved with the state of `step`, with "step" and "metrics".

        Raises:
            DamagedError: it cannot be read.
        """
        return read_info(self.directory / str(step))
