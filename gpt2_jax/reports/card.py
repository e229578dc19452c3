"""The model card of an export for transformers: README.md, with metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gpt2_jax.display import si
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import StoredModel, architecture_summary, parameter_shapes
from gpt2_jax.reports.markdown import table
from gpt2_jax.reports.records import RunRecord, read_run
from gpt2_jax.reports.tables import PUBLISHED, code_block

CARD = "README.md"


def run_of(source: str) -> RunRecord | None:
    """The run that a MODEL comes from: a run directory, or one of its checkpoints; None for any other model."""
    path = Path(source).expanduser().absolute()
    run = path.parents[1] if path.name.isdigit() and path.parent.name == "checkpoints" else path
    try:
        return read_run(run, run.name)
    except UserError:
        return None


def model_card(model: StoredModel, name: str, run: RunRecord | None) -> str:
    """The card of a model.

    Args:
        model: as it was read, with its fingerprint.
        name: of the export.
        run: the run that trained it, if it is known.
    """
    results: dict[str, float] = {}
    for key in run.curves if run else ():
        if run and (value := _at(run, key, model.step)) is not None:
            results[key] = value
    tasks = {key: value for key, value in results.items() if "/" in key}
    n_params = sum(map(math.prod, parameter_shapes(model.config).values()))
    trained = f", trained for {model.step:,} updates" if model.step else ""
    parts = [
        f"---\n{_metadata(name, tasks)}---\n",
        f"# {name}\n",
        f"A GPT-2 with {n_params:,} parameters: {architecture_summary(model.config)}. From gpt2_jax{trained}.\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n```\n',
    ]
    if run is not None:
        parts.append("## Training\n\n" + table(["", ""], _training(run, model.step, results)))
    if tasks and run is not None:
        rows = [[key, f"{value:.4f}", run.published(key)] for key, value in tasks.items()]
        parts.append("## Evaluations\n\n" + table(["metric", "value", PUBLISHED], rows))
    if run is not None and (texts := [row for row in run.samples if row["step"] == model.step]):
        blocks = [code_block(f"{row['prompt']}{row['text']}") + "\n" for row in texts]
        parts.append("## Samples\n\n" + "\n".join(blocks))
    parts.append(
        f"Fingerprint of the parameters: `{model.fingerprint}`. Before you publish the model, add `license`, "
        "`language` and `datasets` to the metadata above.\n"
    )
    return "\n".join(parts)


def _at(run: RunRecord, key: str, step: int) -> float | None:
    """The value of a curve at an update; None without one."""
    curve = run.curves[key]
    found = curve.value[curve.step == step]
    return float(found[-1]) if len(found) else None


def _metadata(name: str, tasks: dict[str, float]) -> str:
    """The metadata as YAML. Its values are JSON, which YAML holds."""
    entries: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "gpt2_jax"],
    }
    by_task: dict[str, list[dict[str, Any]]] = {}
    for key, value in tasks.items():
        task, _, metric = key.partition("/")
        by_task.setdefault(task, []).append({"type": metric, "value": value})
    if by_task:
        results = [
            {"task": {"type": "text-generation"}, "dataset": {"name": task, "type": task}, "metrics": metrics}
            for task, metrics in by_task.items()
        ]
        entries["model-index"] = [{"name": name, "results": results}]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())


def _training(run: RunRecord, step: int, results: dict[str, float]) -> list[list[str]]:
    config = run.config
    optimizer, data = config.optimizer, config.data
    sources = data.text or data.train or ", ".join(source.train for source in data.sources)
    tokens = max((curve.tokens[curve.step <= step].max(initial=0) for curve in run.curves.values()), default=0)
    rows = {
        "data": f"`{sources}` ({data.tokenizer} tokens)",
        "tokens": si(float(tokens)),
        "updates": f"{step:,} of {config.steps:,}",
        "batch": f"{config.batch_size} sequences of {config.model.block_size} tokens",
        "optimizer": f"AdamW, learning rate {optimizer.learning_rate:g}, {optimizer.warmup_steps:,} updates of warmup, "
        f"betas {optimizer.beta1:g} and {optimizer.beta2:g}, weight decay {optimizer.weight_decay:g}",
        "precision": config.dtype,
        "start": config.init_from or f"random, seed {config.seed}",
    }
    if "val_loss" in results:
        rows["validation loss"] = f"{results['val_loss']:.4f} nats per token"
    return [[key, value] for key, value in rows.items()]
