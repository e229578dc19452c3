"""Checkpoints on disk: asynchronous, atomic and sharded. Keeps the newest ones and the best.

Only this file uses Orbax. It saves and restores trees of arrays and knows nothing of the model. Orbax writes a
checkpoint under a temporary name and renames it at the end, so every checkpoint that is listed is complete.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gpt2_jax.errors import UserError, one_line


def _val_loss(metrics: dict[str, float]) -> float:
    return metrics["val_loss"]


@contextmanager
def _reading(checkpoint: Path, advice: str) -> Iterator[None]:
    """Reports an error of Orbax as a UserError that names the checkpoint and ends with `advice`."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"the checkpoint {checkpoint} cannot be read ({one_line(error)}); {advice}") from error


class SavedState:
    """Reads parts of one checkpoint, and writes nothing into its directory.

    Args:
        path: DIRECTORY/STEP of a `Checkpoints`.

    Raises:
        UserError: it is not a complete checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute() / "state"
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        with _reading(self._path.parent, "use another one"):
            metadata = self._reader.metadata(self._path).item_metadata
        if metadata is None:
            raise UserError(f"the checkpoint {path} is incomplete: no tree of arrays in {self._path}; use another one")
        self._tree = metadata.tree

    def read(self, *path: str) -> Any:
        """Reads the tree of NumPy arrays below the keys of `path`.

        Raises:
            KeyError: the checkpoint has no such keys.
            UserError: the checkpoint cannot be read.
        """
        part = functools.reduce(lambda tree, key: tree[key], path, self._tree)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)

        def nested(tree: Any) -> Any:
            return functools.reduce(lambda inner, key: {key: inner}, reversed(path), tree)

        args = ocp.args.PyTreeRestore(nested(shapes), restore_args=nested(as_numpy), partial_restore=True)
        with _reading(self._path.parent, "use another one"):
            state = self._reader.restore(self._path, args=args)
        return functools.reduce(lambda tree, key: tree[key], path, state)


class Checkpoints:
    """The checkpoints of one run, in DIRECTORY/STEP. A context manager, because saves run in the background.

    Args:
        directory: created if missing. Leftovers of interrupted saves are removed.
        keep: number of newest checkpoints to keep, besides the one with the lowest validation loss.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            # Compression reduces a state to 92% of its size and takes four times the processor time.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "info": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                # The policy below decides what to keep. best_fn is set because Orbax stores metrics only with it, and a
                # resumed run needs them to know the best checkpoint.
                best_fn=_val_loss,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(keep),
                        checkpoint_managers.BestN(
                            get_metric_fn=_val_loss,
                            reverse=True,  # Orbax sorts and keeps the last, so the lowest loss has to come last
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
        self.close()

    def close(self) -> None:
        """Waits for background saves and releases the directory."""
        self._manager.close()

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest restorable step; None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The restorable step with the lowest validation loss; None if no step has one."""
        return self._manager.best_step()

    def steps(self) -> list[int]:
        """All restorable steps, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, info: dict[str, Any], val_loss: float | None = None) -> None:
        """Copies `state` off the devices, then writes it in the background.

        Args:
            state: tree of arrays.
            info: a JSON-serializable dict.
            val_loss: the validation loss at this step, if known; ranks the checkpoint.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), info=ocp.args.JsonSave(info)),
            metrics=None if val_loss is None else {"val_loss": val_loss},
        )

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restores the state of `step` with the shapes, dtypes and shardings of `abstract_state`.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        return self._read(step, state=ocp.args.PyTreeRestore(abstract_state, restore_args=restore_args))

    def info(self, step: int) -> dict[str, Any]:
        """The `info` that was saved with the state of `step`.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        return self._read(step, info=ocp.args.JsonRestore())

    def _read(self, step: int, **item: Any) -> Any:
        advice = "if it is damaged, move it away to resume from an older one"
        with _reading(self.directory.absolute() / str(step), advice):
            return self._manager.restore(step, args=ocp.args.Composite(**item))[next(iter(item))]
