"""Directories of runs, as training leaves them."""

import json

import pytest

from gpt2_jax.config import EvalConfig, GPT2Config, TrainConfig
from gpt2_jax.config.toml import to_toml

STEPS = 40
SECONDS = {"starting": 4.0, "training": 20.0}  # of each of two processes
TRICKY = '<script>alert(1)</script> | "quoted" & `code`'


def write_run(directory, seed=1, **model):
    """The directory of a run: 40 updates, 4 evaluations on a task, samples, times of two processes."""
    directory.mkdir(parents=True)
    sizes = {"n_layer": 12, "n_embd": 768, "n_head": 12, "block_size": 1024, **model}
    config = TrainConfig(
        out=str(directory), steps=STEPS, batch_size=4, seed=seed, model=GPT2Config(**sizes),
        eval=EvalConfig(tasks=("hellaswag",), tasks_limit=0),
    )  # fmt: skip
    (directory / "config.toml").write_text(to_toml(config))
    rows = []
    for step in range(1, STEPS + 1):
        base = {"step": step, "tokens": 4096 * step}
        if step == 33:
            rows.append({**base, "skipped": "outlier: loss 99"})
            continue
        rows.append({**base, "loss": 8.0 / step + seed, "grad_norm": 1.0 + 1 / step, "param_norm": 20.0,
                     "learning_rate": 1e-3 * step / STEPS, "tokens_per_second": 1000.0 + step, "mfu": 0.5})  # fmt: skip
        if step % 10 == 0:
            accuracy = {"hellaswag/acc": 0.25 + step / 1000}
            rows.append({**base, "val_loss": 8.5 / step + seed, **accuracy, "fingerprint": "0a"})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"step": step, "tokens": 4096 * step, "prompt": "Hello", "text": f" {TRICKY} {step}"}
               for step in (10, 40)]  # fmt: skip
    (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    times = [{"started": 100.0, "resumed_after": 0, "step": 20, "seconds": SECONDS},
             {"started": 130.0, "resumed_after": 20, "step": 40, "seconds": SECONDS}]  # fmt: skip
    (directory / "time.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    return directory


@pytest.fixture
def make_run(tmp_path):
    """Writes the directory of a run below the test's own: `make_run("name", seed=2, n_layer=3)`."""
    return lambda name, **keys: write_run(tmp_path / name, **keys)


@pytest.fixture
def runs(make_run):
    """Two runs of the same name, with different seeds."""
    return make_run("one/run"), make_run("two/run", seed=2)
