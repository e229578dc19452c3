"""The validation losses of published runs, to draw a run of the same recipe over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import PurePath

from gpt2_jax.config import TrainConfig

_LOGS = "github.com/KellerJordan/modded-nanogpt, records"


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceRun:
    """A published run.

    Attributes:
        name: who trained what.
        source: where its losses are published.
        losses: nats per token on validation data, after so many updates.
        tokens_per_update: tokens of an update.
    """

    name: str
    source: str
    losses: dict[int, float]
    tokens_per_update: int = 524_288


# By n_layer and n_embd. llm.c's scripts/run_gpt2_124M.sh and run_gpt2_350M.sh, on 10,485,760 tokens of FineWeb's
# validation file.
_FINEWEB = {
    (12, 768): ReferenceRun(
        "llm.c, 124M",
        f"{_LOGS}/track_1_short/2024-10-13_llmc/main.log",
        {250: 6.1710, 500: 5.3743, 750: 4.7097, 1000: 4.3170, 1500: 4.0060, 2000: 3.8585, 3000: 3.6973, 4000: 3.6176,
         5000: 3.5535, 7500: 3.4566, 10000: 3.3924, 12500: 3.3408, 15000: 3.3003, 17500: 3.2770, 19560: 3.2722},
    ),
    (24, 1024): ReferenceRun(
        "llm.c, 350M",
        f"{_LOGS}/track_2_medium/2025-01-18/main.log",
        {1000: 4.3734, 2500: 3.6737, 5000: 3.4190, 10000: 3.2461, 20000: 3.1129, 30000: 3.0387, 40000: 2.9812,
         50000: 2.9405, 60000: 2.9282},
    ),
}  # fmt: skip


# nanoGPT's config/train_shakespeare_char.py, on a GPU and on a CPU. It estimates losses on random windows.
_SHAKESPEARE = {
    (6, 384): ReferenceRun("nanoGPT, best", "github.com/karpathy/nanoGPT, README.md", {5000: 1.4697}, 64 * 256),
    (4, 128): ReferenceRun("nanoGPT", "github.com/karpathy/nanoGPT, README.md", {2000: 1.88}, 12 * 64),
}


def reference_run(config: TrainConfig) -> ReferenceRun | None:
    """The published run with the model and the validation data of a config; None if there is none.

    FineWeb's validation file is recognized by its name, which llm.c and `fineweb-10b-tokenized` share. Shakespeare's
    plays are recognized by the name of the file, their 65 characters and the share that is held out.
    """
    model, data = config.model, config.data
    size = model.n_layer, model.n_embd
    if data.tokenizer == "gpt2" and PurePath(data.val).name.startswith("fineweb_val"):
        return _FINEWEB.get(size)
    if "shakespeare" in PurePath(data.text).name and (model.vocab_size, data.val_fraction) == (65, 0.1):
        return _SHAKESPEARE.get(size)
    return None


def reference_runs(configs: Iterable[TrainConfig]) -> list[ReferenceRun]:
    """The published runs of some configs, each once."""
    return [run for run in dict.fromkeys(map(reference_run, configs)) if run]
