"""The validation losses of published runs, to draw a run of the same recipe over them."""

from __future__ import annotations

import dataclasses
from pathlib import PurePath

from gpt2_jax.config import TrainConfig

TOKENS_PER_UPDATE = 524_288
_LOGS = "github.com/KellerJordan/modded-nanogpt, records"


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceRun:
    """A published run of GPT-2 on FineWeb.

    Attributes:
        name: who trained what.
        source: where its log is.
        losses: nats per token on 10,485,760 tokens of FineWeb's validation file, after so many updates.
    """

    name: str
    source: str
    losses: dict[int, float]


# By n_layer and n_embd. llm.c's scripts/run_gpt2_124M.sh and run_gpt2_350M.sh, 524,288 tokens an update.
_RUNS = {
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


def reference_run(config: TrainConfig) -> ReferenceRun | None:
    """The published run with the model and the validation data of a config; None if there is none.

    FineWeb's validation file is recognized by its name, which llm.c and `fineweb-10b-tokenized` share.
    """
    if not PurePath(config.data.val).name.startswith("fineweb_val") or config.data.tokenizer != "gpt2":
        return None
    return _RUNS.get((config.model.n_layer, config.model.n_embd))
