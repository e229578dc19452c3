"""The checkpoints of a run: restores or creates the training state, and saves it with one entry per layer.

What is saved is what is restored: each checkpoint has the fingerprint of its arrays, which is compared after restoring
them. A damaged checkpoint is renamed to STEP.damaged, and the one before it is used.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.checkpoint_info import DAMAGED, complete_checkpoints, read_info, set_aside
from gpt2_jax.config import CheckpointConfig, TrainConfig
from gpt2_jax.data import Data
from gpt2_jax.data.contents import Contents
from gpt2_jax.display import si
from gpt2_jax.distributed.agreement import barrier, broadcast_from_primary, first_problem, is_primary
from gpt2_jax.errors import (
    DamagedError,
    ReplicaError,
    RewindError,
    SaveError,
    UserError,
    fixable,
    one_line,
    storage_problem,
)
from gpt2_jax.evaluation.metrics import higher_is_better
from gpt2_jax.fingerprint import StateFingerprint, make_state_fingerprint
from gpt2_jax.interop.stored import StoredModel
from gpt2_jax.layers import stack_layers, unstack_layers
from gpt2_jax.model import GPT2
from gpt2_jax.run.provenance import describe_changes, made_by
from gpt2_jax.step import TrainState, abstract_state, init_state, state_shardings

RETRY_SECONDS = 1.0  # until the last save of a run is tried again
LAYOUT = 2  # of the saved state; 1, up to version 0.1.0, had the gradient norm in the optimizer state


def open_checkpoints(directory: Path, config: CheckpointConfig) -> Checkpoints:
    """Opens the checkpoints of a run, after setting aside those whose small files are damaged.

    All processes call it together.

    Raises:
        DamagedError: one is damaged and `strict` is set, or all are damaged.
    """
    if is_primary() and directory.exists():
        steps = complete_checkpoints(directory)
        damaged: dict[Path, DamagedError] = {}
        for path in steps:
            try:
                read_info(path)
            except DamagedError as error:
                damaged[path] = error
        if damaged:
            _set_aside(damaged, config, intact=len(steps) - len(damaged))
    barrier("checked")
    highest = higher_is_better(config.best.partition("/")[2])
    return Checkpoints(directory, config.keep, config.best, highest)


def _set_aside(damaged: dict[Path, DamagedError], config: CheckpointConfig, intact: int) -> None:
    """Renames damaged checkpoints and says so. If no other is left, they keep their names: a run must not start anew.

    Raises:
        DamagedError: nothing may be renamed.
    """
    _, error = max(damaged.items(), key=lambda item: int(item[0].name))
    if config.strict:
        raise DamagedError(f"{error}; leave out --checkpoint.strict to resume from an older one")
    if not intact:
        raise DamagedError(f"{error}, and no older one is intact; restore a copy of it, or type another --out")
    for path, error in damaged.items() if is_primary() else ():
        print(f"{'damaged':10}{error}; now {set_aside(path).name}", flush=True)


class RunCheckpoints:
    """The checkpoints of one run. All processes call the same methods in the same order; each saves its shards.

    Attributes:
        newest: the newest step that this process saved or restored.
        print_line: prints a line about a save that failed.
        before_save: is called before each save. An OSError of it counts as a failure of the save.

    Args:
        checkpoints: the checkpoints in the run directory.
        config: resolved.
        model: the model that is trained.
        mesh: the devices.
        data: the data. A checkpoint is only resumed with the data that it was trained on.
    """

    def __init__(self, checkpoints: Checkpoints, config: TrainConfig, model: GPT2, mesh: Mesh, data: Data) -> None:
        self._checkpoints, self._data = checkpoints, data.fingerprint
        self._config, self._model, self._mesh, self._made_by = config, model, mesh, made_by(mesh)
        self._contents = Contents(data.files, checkpoints.directory.parent, jax.process_index())
        self._trained_on: list[str | None] = []  # the SHA-256 of each file, if it was ever known
        self._unrolled = model.clone(config=model.config.unrolled())
        self._fingerprint = make_state_fingerprint(mesh, abstract_state(model, config.optimizer, mesh))
        self._saving, self._failures = False, 0  # in the background; saves in a row that failed
        self.newest = 0
        self.print_line: Callable[[str], None] = print
        self.before_save: Callable[[], None] = lambda: None

    def fingerprint(self, state: TrainState) -> StateFingerprint:
        """The fingerprint of the state. Waits for the state.

        Raises:
            ReplicaError: devices have different copies of the same arrays.
            RewindError: the same, and `log.on_mismatch` is "restore".
        """
        found = self._fingerprint(state)
        if deviating := found.deviating():
            names = ", ".join(str(self._mesh.devices.flat[position]) for position in deviating)
            problem = (
                f"after update {int(state.step)}, the training state on {names} differs from its copies on other "
                "devices: a device computes wrongly, or a kernel is not deterministic"
            )
            if self._config.log.on_mismatch == "restore":
                raise RewindError(problem)
            before = f"checkpoints/{self.newest} is from before" if self.newest else "nothing was saved"
            raise ReplicaError(f"{problem}; {before}")
        return found

    def restore_or_init(self, initial: StoredModel | None) -> tuple[TrainState, int]:
        """The state of the newest intact checkpoint and its step, or a new state and 0.

        Args:
            initial: the model that a new run starts from; None for random parameters.

        Raises:
            UserError: the newest checkpoint is past `config.steps` or was trained on other data.
            DamagedError: it is damaged and `checkpoint.strict` is set, or none is intact.
        """
        config, model, mesh = self._config, self._model, self._mesh
        steps = json.loads(broadcast_from_primary("steps", json.dumps(self._checkpoints.steps())))
        damaged: dict[Path, DamagedError] = {}
        for step in reversed(steps):
            path = self._checkpoints.directory / str(step)
            self._check(path)
            state, problem = self._try_restore(step)
            if not problem:
                break
            damaged[path] = DamagedError(problem)
            if config.checkpoint.strict:
                break
        if damaged:
            _set_aside(damaged, config.checkpoint, intact=len(steps) - len(damaged))
            barrier("set aside")
            self._checkpoints.reload()
        self._open_contents()
        if not steps:
            params = initial.place(abstract_state(model, config.optimizer, mesh).params) if initial else None
            return init_state(model, config.optimizer, mesh, config.seed, params), 0
        self.newest = step
        return state, step

    def room(self, start: int) -> list[str]:
        """The lines that say how much the checkpoints of the run take, with a warning if their disk is too small.

        Args:
            start: the update that the run resumes after.
        """
        config, directory = self._config, self._checkpoints.directory
        every = config.checkpoint.every or config.steps
        saves = -(-config.steps // every) - start // every
        if not saves:
            return []
        leaves = jax.tree.leaves(abstract_state(self._unrolled, config.optimizer, self._mesh))
        n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        # Those to keep, the best one, and the one that is written: an old one is deleted afterwards.
        here = len(self._checkpoints.steps())
        most = max(here, min(config.checkpoint.keep + 2, here + saves))
        needed, free = n_bytes * (most - here), shutil.disk_usage(directory).free
        lines = [f"{'saves':10}{si(n_bytes)}B each, up to {most} at once; {si(free)}B free"]
        if needed > free:
            lines.append(
                f"{'warning':10}{directory} needs {si(needed)}B more, and its disk has {si(free)}B; make room, or "
                "lower checkpoint.keep"
            )
        return lines

    def _try_restore(self, step: int) -> tuple[TrainState, str]:
        """The state of a checkpoint, and what is wrong with it in any process; "" if it is what was saved."""
        config, model, mesh = self._config, self._model, self._mesh
        state: Any = None
        problem = ""
        try:
            state = self._checkpoints.restore(step, abstract_state(self._unrolled, config.optimizer, mesh))
        except DamagedError as error:
            problem = str(error)
        if problem := first_problem(problem):
            return state, problem
        if model.config.scan_layers:
            state = jax.jit(stack_layers, out_shardings=state_shardings(model, config.optimizer, mesh))(state)
        saved = self._checkpoints.info(step).get("fingerprint", {}).get("state")  # missing in older ones
        if saved and (found := self._fingerprint(state).state) != saved:
            path = self._checkpoints.directory / str(step)
            problem = f"the checkpoint {path} is damaged (its arrays have the fingerprint {found}, not {saved})"
        return state, problem

    def _check(self, path: Path) -> None:
        """Checks that the run can resume from a checkpoint, by what it says of itself.

        Raises:
            UserError: it is past the end of the run, of other data, or of another version.
        """
        out, step = path.parents[1], int(path.name)
        if step > self._config.steps:
            raise UserError(
                f"{out} is already at update {step}, past steps = {self._config.steps}; type --steps {step}"
            )
        info = self._checkpoints.info(step)
        if info["data"] != self._data:
            raise UserError(
                f"the data of {out} has changed ({info['data']} -> {self._data}); restore the old data, or type "
                "another --out"
            )
        self._trained_on = info.get("sha256", [])  # missing in older ones
        layout = info.get("layout", 1)
        if layout != LAYOUT:
            raise UserError(
                f"{path} was saved by another version of gpt2_jax (state layout {layout}, expected {LAYOUT}: "
                "CHANGELOG.md says what changed); resume it with that version, or start from its parameters with "
                f"--init_from {path} and another --out"
            )
        before = info.get("made_by", {})  # missing in older ones
        if is_primary() and (line := describe_changes(before, self._made_by)):
            print(f"{'changed':10}{line}", flush=True)

    def _open_contents(self) -> None:
        """Compares the token files whose SHA-256 is known, and starts to hash the others in the background."""
        left = self._contents.hash_rest() if is_primary() else 0
        state = self._compare_contents()
        if not is_primary():
            self._contents.hash_rest()
            self._compare_with(state)
        if left:
            print(
                f"{'checksums':10}{si(left)}B of token files are being hashed in the background, once; until then, "
                "changes in their middle are not noticed",
                flush=True,
            )

    def _compare_contents(self) -> str:
        """Compares token files with those of process 0, of their manifests and of the restored checkpoint.

        All processes call it together.

        Returns:
            The contents on process 0.

        Raises:
            UserError: a file has another content.
        """
        state = broadcast_from_primary("contents", self._contents.state())
        self._compare_with(state)
        return state

    def _compare_with(self, state: str) -> None:
        self._contents.agree(state)
        self._trained_on = self._contents.check(self._trained_on, self._checkpoints.directory.parent)

    def save(self, step: int, state: TrainState, fingerprint: StateFingerprint, metrics: dict[str, float]) -> None:
        """Saves the state in the background, unless the newest checkpoint is of this step.

        Args:
            fingerprint: that of `state`.
            metrics: the evaluations at this step by name, which may rank the checkpoint.

        Raises:
            UserError: a token file is not the one that the run was trained on. Nothing is saved.
            SaveError: this save or those before failed, `checkpoint.max_failures` in a row.
        """
        self.check_saved(wait=True)
        if step == self.newest:
            return
        self._compare_contents()
        if not self._checkpoints.directory.exists():
            raise UserError(f"{self._checkpoints.directory} was deleted while the run trains; start it again")
        if self._model.config.scan_layers:
            state = self._unstack(state)
        info = {
            "data": self._data,
            "layout": LAYOUT,
            "sha256": self._trained_on,
            "made_by": self._made_by,
            "fingerprint": {"state": fingerprint.state, "params": fingerprint.params},
        }
        try:
            self.before_save()
            self._checkpoints.save(step, state, info, metrics)
            self._saving, self.newest = True, step
        except Exception as error:
            self._save_failed(error)

    def save_and_wait(
        self, step: int, state: TrainState, fingerprint: StateFingerprint, metrics: dict[str, float]
    ) -> None:
        """`save`, again until it succeeds. The checkpoint is on disk when this returns.

        Raises:
            UserError, SaveError: as `save`.
        """
        while True:
            self.save(step, state, fingerprint, metrics)
            self.check_saved(wait=True)
            if self.newest == step:
                return
            time.sleep(RETRY_SECONDS)

    def check_saved(self, wait: bool = False) -> None:
        """Takes note of the save in the background: says if it failed. Without `wait`, only if it is over.

        Raises:
            SaveError: as `save`.
        """
        if not self._saving or (not wait and self._checkpoints.is_saving()):
            return
        self._saving = False
        try:
            self._checkpoints.wait()
            self._failures = 0
        except Exception as error:
            self._save_failed(error)

    def _save_failed(self, error: Exception) -> None:
        """Counts a save that failed, and removes what it has written: its disk may be full."""
        if jax.process_count() > 1:  # the others wait for this process in Orbax
            raise error
        self._failures += 1
        directory = self._checkpoints.directory
        if not directory.exists():
            raise UserError(f"{directory} was deleted while the run trains; start it again") from error
        for path in {*directory.iterdir()} - {*complete_checkpoints(directory)}:
            if path.name.split(".")[0].isdigit() and DAMAGED not in path.name:
                shutil.rmtree(path, ignore_errors=True)
        self._checkpoints.reload()
        self.newest = self._checkpoints.latest() or 0
        reason = storage_problem(error) or fixable(error) or one_line(error)
        line = f"a checkpoint could not be saved ({reason}); the newest is {self.newest or 'missing'}"
        if self._failures >= self._config.checkpoint.max_failures:
            raise SaveError(f"{line}; {self._failures} saves in a row failed; fix that, and start the run again")
        self.print_line(f"{line}; training continues, and tries again at the next save")

    def _unstack(self, state: TrainState) -> TrainState:
        if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(state)):
            # On the host: the device may have no room for a second copy of a large state.
            return unstack_layers(jax.device_get(state))
        # Sharded over hosts: no process holds all of it, and the second copy is sharded too.
        shardings = state_shardings(self._unrolled, self._config.optimizer, self._mesh)
        return jax.jit(unstack_layers, out_shardings=shardings)(state)
