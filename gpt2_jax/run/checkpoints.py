"""The checkpoints of a run: restores or creates the training state, and saves it with one entry per layer."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import TrainConfig
from gpt2_jax.data import Data
from gpt2_jax.data.contents import Contents
from gpt2_jax.display import si
from gpt2_jax.distributed.agreement import broadcast_from_primary, is_primary
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import StoredModel
from gpt2_jax.layers import stack_layers, unstack_layers
from gpt2_jax.model import GPT2
from gpt2_jax.run.provenance import describe_changes, made_by
from gpt2_jax.step import TrainState, abstract_state, init_state, state_shardings

LAYOUT = 2  # of the saved state; 1, up to version 0.1.0, had the gradient norm in the optimizer state


class RunCheckpoints:
    """The checkpoints of one run. All processes call the same methods in the same order; each saves its shards.

    Args:
        checkpoints: the checkpoints in the run directory.
        config: resolved.
        model: the model that is trained.
        mesh: the devices.
        data: the data. A checkpoint is only resumed with the data that it was trained on.
    """

    def __init__(self, checkpoints: Checkpoints, config: TrainConfig, model: GPT2, mesh: Mesh, data: Data) -> None:
        self._checkpoints, self._fingerprint = checkpoints, data.fingerprint
        self._config, self._model, self._mesh, self._made_by = config, model, mesh, made_by(mesh)
        self._contents = Contents(data.files, checkpoints.directory.parent, jax.process_index())
        self._trained_on: list[str | None] = []  # the SHA-256 of each file, if it was ever known
        self._unrolled = model.clone(config=model.config.unrolled())
        self.newest = 0  # the newest step that this process saved or restored

    def restore_or_init(self, initial: StoredModel | None) -> tuple[TrainState, int]:
        """The state of the newest checkpoint and its step, or a new state and 0.

        Args:
            initial: the model that a new run starts from; None for random parameters.

        Raises:
            UserError: the newest checkpoint is past `config.steps`, was trained on other data, or cannot be read.
        """
        config, model, mesh = self._config, self._model, self._mesh
        step = int(broadcast_from_primary("start", str(self._checkpoints.latest() or 0)))
        if step:
            self._check(step)
        self._open_contents()
        if not step:
            params = initial.place(abstract_state(model, config.optimizer, mesh).params) if initial else None
            return init_state(model, config.optimizer, mesh, config.seed, params), 0
        state: TrainState = self._checkpoints.restore(step, abstract_state(self._unrolled, config.optimizer, mesh))
        if model.config.scan_layers:
            state = jax.jit(stack_layers, out_shardings=state_shardings(model, config.optimizer, mesh))(state)
        self.newest = step
        return state, step

    def _check(self, step: int) -> None:
        path = self._checkpoints.directory / str(step)
        out = path.parents[1]
        if step > self._config.steps:
            raise UserError(
                f"{out} is already at update {step}, past steps = {self._config.steps}; type --steps {step}"
            )
        info = self._checkpoints.info(step)
        if info["data"] != self._fingerprint:
            raise UserError(
                f"the data of {out} has changed ({info['data']} -> {self._fingerprint}); restore the old data, or type "
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

    def save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        """Saves the state in the background, unless the newest checkpoint is of this step.

        Args:
            val_loss: the validation loss at this step, if it was evaluated; ranks the checkpoint.

        Raises:
            UserError: a token file is not the one that the run was trained on. Nothing is saved.
        """
        if step == self.newest:
            return
        self._compare_contents()
        self.newest = step
        if self._model.config.scan_layers:
            state = self._unstack(state)
        info = {
            "data": self._fingerprint,
            "layout": LAYOUT,
            "sha256": self._trained_on,
            "made_by": self._made_by,
        }
        self._checkpoints.save(step, state, info, val_loss)

    def _unstack(self, state: TrainState) -> TrainState:
        if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(state)):
            # On the host: the device may have no room for a second copy of a large state.
            return unstack_layers(jax.device_get(state))
        # Sharded over hosts: no process holds all of it, and the second copy is sharded too.
        shardings = state_shardings(self._unrolled, self._config.optimizer, self._mesh)
        return jax.jit(unstack_layers, out_shardings=shardings)(state)
