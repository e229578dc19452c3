"""Experiment trackers of others: TensorBoard, Weights & Biases, Trackio. Each is given the rows of a run, in order.

A tracker says which updates it has, so that a run that is resumed, or sent again, repeats none.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gpt2_jax.config import TrainConfig, flatten
from gpt2_jax.config.toml import to_toml
from gpt2_jax.errors import UserError, one_line
from gpt2_jax.parsing import parse_json, read_text
from gpt2_jax.reports.tables import code_block

PROJECT = "gpt2_jax"
STATE = "trackers.json"  # in the run directory
MAX_STATE_BYTES = 1 << 16
FINISH_SECONDS = 60.0  # until wandb gives up the upload of the last rows; by default it waits forever

Values = Mapping[str, float | str]
Texts = Sequence[tuple[str, str]]


class Tracker(Protocol):
    """An experiment that the rows of a run are sent to."""

    after: int
    """The last update that it has, 0 for none. Rows up to it are not sent."""

    def log(self, step: int, values: Values, texts: Texts) -> None:
        """Sends the values of all rows of an update, and the prompts of its samples with what the model wrote."""

    def close(self) -> None:
        """Waits until everything is stored."""


class TensorBoard:
    """Event files in RUN/tensorboard. They are written anew from the first row, so they never repeat one."""

    after = 0

    def __init__(self, run: Path, config: TrainConfig) -> None:
        writers = importlib.import_module("tensorboardX")
        directory = run / "tensorboard"
        shutil.rmtree(directory, ignore_errors=True)
        self._writer = writers.SummaryWriter(str(directory))
        self._writer.add_text("config", code_block(to_toml(config)), 0)

    def log(self, step: int, values: Values, texts: Texts) -> None:
        """As `Tracker.log`."""
        for key, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(key, value, step)
            else:
                self._writer.add_scalar(key, value, step)
        for name, text in _samples(texts).items():
            self._writer.add_text(name, code_block(text), step)
        self._writer.flush()

    def close(self) -> None:
        """As `Tracker.close`."""
        self._writer.close()


def _samples(texts: Texts) -> dict[str, str]:
    return {f"samples/{number}": prompt + text for number, (prompt, text) in enumerate(texts)}


class _Experiment:
    """What identifies the run at a service, and the last update that was sent there, in RUN/trackers.json."""

    def __init__(self, run: Path, service: str) -> None:
        self._path, self._service = run / STATE, service
        known = self._read().get(service, {})
        self.id: str = known.get("id") or secrets.token_hex(4)
        self.after: int = known.get("after", 0)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            return dict(parse_json(read_text(self._path, MAX_STATE_BYTES)))
        except (OSError, ValueError, TypeError):
            return {}

    def mark_sent(self, step: int) -> None:
        """Takes note of an update that was sent."""
        self.after = step
        content = {**self._read(), self._service: {"id": self.id, "after": step}}
        partial = self._path.with_name(f"{self._path.name}.{self._service}")
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8", newline="\n")
        partial.replace(self._path)  # without waiting for the disk: there may be ten a second


class WeightsAndBiases:
    """A run of Weights & Biases, resumed under its id.

    `WANDB_MODE=offline` needs no account, and `wandb sync` uploads later. What a killed process wrote there may lack
    its last rows, so it is deleted, and written anew from the first row.
    """

    def __init__(self, run: Path, config: TrainConfig) -> None:
        wandb = importlib.import_module("wandb")
        offline = os.environ.get("WANDB_MODE") == "offline"
        if not offline and not os.environ.get("WANDB_MODE") and not wandb.api.api_key:
            raise UserError("wandb has no API key; type wandb login, or set WANDB_MODE=offline")
        experiment = _Experiment(run, "wandb")
        for written in (run / "wandb").glob(f"offline-run-*-{experiment.id}") if offline else ():
            shutil.rmtree(written)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.absolute().name,
            id=experiment.id,
            resume=None if offline else "allow",
            dir=str(run),
            config=flatten(config),
            settings=wandb.Settings(
                console="off",
                silent=True,
                finish_timeout=FINISH_SECONDS,
                stop_fn=lambda: None,  # its page has a button that sends SIGINT
            ),
        )
        experiment.mark_sent(0)
        self.after = 0 if offline else self._run.starting_step - 1  # that of the server

    def log(self, step: int, values: Values, texts: Texts) -> None:
        """As `Tracker.log`."""
        self._run.log({**values, **_samples(texts)}, step=step)

    def close(self) -> None:
        """As `Tracker.close`."""
        self._run.finish()


class Trackio:
    """A run in Trackio's local database, or in the Space that its environment variables name."""

    def __init__(self, run: Path, config: TrainConfig) -> None:
        trackio = importlib.import_module("trackio")
        self._experiment = _Experiment(run, "trackio")
        name = f"{run.absolute().name}-{self._experiment.id}"
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        stored = storage.get_max_step_for_run(PROJECT, name)  # None also if the database is on another host
        self.after = self._experiment.after if stored is None else stored
        self._run = trackio.init(
            project=PROJECT,
            name=name,
            config=flatten(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Values, texts: Texts) -> None:
        """As `Tracker.log`."""
        self._run.log({**values, **_samples(texts)}, step=step)
        self._experiment.mark_sent(step)

    def close(self) -> None:
        """As `Tracker.close`."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, TrainConfig], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
_MODULES = {
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb", "wandb.apis.public"),
    "trackio": ("trackio", "trackio.sqlite_storage", "matplotlib.figure"),
}


def import_trackers(names: Sequence[str]) -> None:
    """Imports the packages of trackers.

    In the main thread, because imports in several threads disturb one another. Two that parse Python code at the same
    time fail with a SystemError before Python 3.11.8 (CPython issue 106905), and Trackio drops values while another
    thread imports matplotlib.

    Raises:
        UserError: one cannot be imported.
    """
    for name in names:
        for module in _MODULES[name]:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"{name} needs {error.name}, which is not installed; type pip install 'gpt2_jax[{name}]'"
                ) from error
            except Exception as error:  # importing runs the package's code, which may raise anything
                raise UserError(f"{module} cannot be imported: {one_line(error)}; leave {name} out") from error
