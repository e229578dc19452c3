"""Checkpoints on disk: asynchronous, atomic, sharded; the newest and the best are kept.

The only file that knows Orbax, and it knows no model: it saves and restores trees of arrays. A checkpoint is
written beside its final name and renamed, so one that can be listed is whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gpt2_jax.errors import UserError


def _val_loss(metrics: dict[str, float]) -> float:
    return metrics["val_loss"]


class SavedState:
    """One checkpoint, to read parts of: nothing in its directory is touched.

    Args:
        path: DIRECTORY/STEP of a `Checkpoints`.

    Raises:
        UserError: it is not a whole checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute() / "state"
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        metadata = self._safely(lambda: self._reader.metadata(self._path).item_metadata)
        if metadata is None:
            raise UserError(f"the checkpoint {path} is not whole: no tree of arrays in {self._path}; take another one")
        self._tree = metadata.tree

    def read(self, *path: str) -> Any:
        """The tree of NumPy arrays below the keys of `path`.

        Raises:
            KeyError: there is nothing.
            UserError: it cannot be read.
        """
        part = functools.reduce(lambda tree, key: tree[key], path, self._tree)
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)

        def nested(tree: Any) -> Any:
            return functools.reduce(lambda inner, key: {key: inner}, reversed(path), tree)

        args = ocp.args.PyTreeRestore(nested(wanted), restore_args=nested(how), partial_restore=True)
        state = self._safely(lambda: self._reader.restore(self._path, args=args))
        return functools.reduce(lambda tree, key: tree[key], path, state)

    def _safely(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the checkpoint {self._path.parent} cannot be read ({reason}); take another one"
            ) from error


class Checkpoints:
    """The checkpoints of one run, DIRECTORY/STEP each. Close it, or use it in a `with`: saves end in background.

    Args:
        directory: created if missing; left-overs of interrupted saves in it are removed.
        keep: how many of the newest stay, beside the one with the lowest validation loss.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            # Compression leaves 92% of a state, at four times the processor time of a save.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "info": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                # The policy below decides; but only with a best_fn does Orbax write the metrics down, without
                # which a run that is continued would forget which checkpoint was the best.
                best_fn=_val_loss,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(keep),
                        checkpoint_managers.BestN(
                            get_metric_fn=_val_loss,
                            reverse=True,  # Orbax keeps the last of the sorted: the lowest loss
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest step that can be restored."""
        step: int | None = self._manager.latest_step()
        return step

    def best(self) -> int | None:
        """The step with the lowest validation loss, of those that can be restored and have one."""
        step: int | None = self._manager.best_step()
        return step

    def steps(self) -> list[int]:
        """All steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, info: dict[str, Any], val_loss: float | None = None) -> None:
        """Copies `state` off the devices, then writes it in the background.

        Args:
            state: tree of arrays.
            info: what JSON can hold.
            val_loss: at this step, if it is known; ranks the checkpoint.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), info=ocp.args.JsonSave(info)),
            metrics=None if val_loss is None else {"val_loss": val_loss},
        )

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state saved at `step`, into the shapes, dtypes and shardings of `abstract_state`.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        how = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        return self._read(step, state=ocp.args.PyTreeRestore(abstract_state, restore_args=how))

    def info(self, step: int) -> dict[str, Any]:
        """What was saved beside the state at `step`.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        info: dict[str, Any] = self._read(step, info=ocp.args.JsonRestore())
        return info

    def _read(self, step: int, **item: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**item))[next(iter(item))]
        except (OSError, KeyError, ValueError) as error:
            path = self._manager.directory / str(step)
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the checkpoint {path} cannot be read ({reason}); if it is damaged, move it away to go on from an "
                "older one"
            ) from error
