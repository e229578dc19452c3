"""The evaluate command as a user runs it, and tasks while a run trains."""

import json
import math
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from xla_flags import FAST_COMPILE

from gpt2_jax import evaluate as command
from gpt2_jax import train as training
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import DataConfig, GPT2Config, ModelConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.config.toml import to_toml
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.scoring import Scorer
from gpt2_jax.metrics import loss_figure, read_rows
from gpt2_jax.model import GPT2, init_params
from gpt2_jax.planning import shortage

CONFIG = GPT2Config(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Run directories of two models on bytes."""
    paths = []
    for seed, name in enumerate(("first", "second")):
        paths.append(tmp_path_factory.mktemp("runs") / name)
        params = jax.tree.map(lambda leaf: 5 * leaf, init_params(GPT2(CONFIG), jax.random.key(seed)))
        paths[-1].mkdir()
        (paths[-1] / "config.toml").write_text(to_toml(ModelConfig(CONFIG, DataConfig(tokenizer="bytes"))))
        with Checkpoints(paths[-1] / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(5, {"params": params}, {})
    return paths


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with examples under the names of the public files."""
    directory = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def word() -> str:
        return "".join(map(chr, rng.integers(97, 123, rng.integers(1, 8))))

    hellaswag = [
        {"query": f"{word()} {word()}", "endings": [word() for _ in range(4)], "label": int(rng.integers(4))}
        for _ in range(30)
    ]
    lambada = [{"text": f"{word()} {word()} {word()}"} for _ in range(20)]
    for name, rows in (("hellaswag_val_pre.jsonl", hellaswag), ("lambada_test.jsonl", lambada)):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_a_table_a_json_and_every_log_probability(models, data, tmp_path, capsys):
    out, dump = tmp_path / "results.json", tmp_path / "scores.jsonl"
    flags = ["--tasks", "hellaswag,lambada", "--data", str(data), "--json", str(out), "--dump", str(dump)]
    assert command.main(["--model", str(models[0]), *flags]) == 0
    found = json.loads(out.read_text())["models"][str(models[0])]
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.strip()]
    acc = found["hellaswag"]["metrics"]["acc"]
    assert ["hellaswag", "acc", f"{acc['value']:.4f}", f"{acc['stderr']:.4f}", "30"] in table
    assert (acc["higher_is_better"], acc["published"]) == (True, [])  # the tokenizer is not GPT-2's
    assert any(line.startswith("lambada: lm-eval lambada_openai, 0-shot") for line in lines)
    records = [json.loads(line) for line in dump.read_text().splitlines()]
    assert [record["task"] for record in records] == ["hellaswag"] * 120 + ["lambada"] * 20
    words = [sum(record["log_probs"]) for record in records[120:]]
    perplexity = found["lambada"]["metrics"]["perplexity"]["value"]
    assert perplexity == pytest.approx(math.exp(-np.mean(words)), rel=1e-6)


def test_without_memory_the_smallest_number_of_devices_that_fits_is_named(models, data, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def found(work, settings):
        sizes.update({setting.flags["--fsdp"]: setting.required() for setting in settings})
        return naming(work, settings)

    sizes: dict[int, int] = {}
    naming = shortage.naming_a_smaller_setting
    monkeypatch.setattr(command, "naming_a_smaller_setting", found)
    monkeypatch.setattr(shortage, "available_memory", lambda device: sizes[4] / shortage.USABLE)
    monkeypatch.setattr(Scorer, "score", fail)
    with pytest.raises(UserError, match=r"though scoring needs .* GiB: another .* or type --fsdp 4$"):
        command.main(["--model", str(models[0]), "--tasks", "lambada", "--data", str(data)])
    assert list(sizes) == [1, 2, 4, 8]
    assert sizes[1] > sizes[2] > sizes[4] > sizes[8]


def test_differences_are_over_the_same_examples(models, data, tmp_path, capsys):
    out, dump = tmp_path / "results.json", tmp_path / "scores.jsonl"
    flags = ["--tasks", "lambada", "--data", str(data), "--json", str(out), "--dump", str(dump)]
    assert command.main(["--compare", *map(str, models), *flags]) == 0
    content = json.loads(out.read_text())
    difference = content["differences"][str(models[1])]["lambada"]["perplexity"]
    values = [content["models"][str(path)]["lambada"]["metrics"]["perplexity"]["value"] for path in models]
    assert difference["difference"] == pytest.approx(values[1] - values[0])
    nats = np.array([-sum(json.loads(line)["log_probs"]) for line in dump.read_text().splitlines()]).reshape(2, -1)
    linear = values[1] * nats[1] - values[0] * nats[0]  # of exp(mean), to first order
    assert difference["stderr"] == pytest.approx(np.std(linear, ddof=1) / math.sqrt(linear.size), rel=1e-6)
    header = capsys.readouterr().out.split("task", 1)[1].splitlines()[0].split()
    assert header == ["metric", "count", "first", "second", "difference", "stderr"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "hellaswag"], "give --model MODEL, or --compare"),
        (["--model", "a", "--compare", "a", "b", "--tasks", "hellaswag"], "and not both"),
        (["--compare", "a", "--tasks", "hellaswag"], "expected at least two MODELs"),
        (["--compare", "a", "a", "--tasks", "hellaswag"], "expected at least two MODELs, each once"),
        (["--model", "{model}", "--tasks", "helaswag"], "there is no task 'helaswag'; the tasks are hellaswag, "),
        (["--model", "{model}", "--tasks", "ptb", "--data", "{data}"], "has no examples of ptb: download them to"),
        (["--model", "{model}", "--tasks", "lambada", "--data", "{data}", "--limit", "-1"], "--limit -1; expected"),
        (["--model", "{model}", "--tasks", "lambada", "--data", "{data}", "--json", "no/x"], "no is not a directory"),
        (["--model", "./none", "--tasks", "lambada", "--data", "{data}"], "./none does not exist"),
    ],
)
def test_mistakes_have_their_line(models, data, args, message):
    with pytest.raises(UserError) as error:
        command.main([arg.format(model=models[0], data=data) for arg in args])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_processes_and_one_give_identical_results(models, data, tmp_path):
    """Two processes with four devices each, and one with a single device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(devices, out, *flags):
        args = ["--model", str(models[0]), "--tasks", "hellaswag,lambada", "--data", str(data), "--json", str(out)]
        environment = os.environ | {"XLA_FLAGS": FAST_COMPILE, "JAX_NUM_CPU_DEVICES": str(devices)}
        args = [sys.executable, "-m", "gpt2_jax.evaluate", *args, *map(str, flags)]
        return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    several = ["--coordinator", f"localhost:{port}", "--processes", 2]
    processes = [start(4, tmp_path / "two.json", *several, "--process", index) for index in (0, 1)]
    processes.append(start(1, tmp_path / "one.json"))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()


# --- while training ------------------------------------------------------------------------------------

TINY = """
out = "unset"
steps = 12
batch_size = 4

[model]
vocab_size = 0
block_size = 32
n_layer = 1
n_head = 2
n_embd = 16
dropout = 0.1

[data]
text = "unset"
tokenizer = "bytes"

[optimizer]
learning_rate = 1e-2
warmup_steps = 2

[checkpoint]
every = 4
keep = 1

[eval]
every = 6

[log]
every = 1
"""


@pytest.fixture
def train(tmp_path):
    """Trains a tiny model, and returns its rows without speeds."""
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "text.txt").write_text("".join(f"{number} squared is {number * number}\n" for number in range(300)))

    def train(out, *flags):
        args = ["--config", tmp_path / "tiny.toml", "--data.text", tmp_path / "text.txt", "--out", out, *flags]
        assert training.train(parse_args("train", "", list(map(str, args))), jax.devices()[:2]) == 0
        return [{**row, "tokens_per_second": None} for row in read_rows(out / "metrics.jsonl")]

    return train


def test_tasks_do_not_disturb_the_run_and_rank_its_checkpoints(train, data, tmp_path, capsys):
    tasks = ["--eval.tasks", "hellaswag", "lambada", "--eval.tasks_data", data, "--eval.tasks_every", 4]
    rows = train(tmp_path / "a", *tasks, "--steps", 8, "--checkpoint.best", "lambada/perplexity")
    evaluated = {row["step"]: row for row in rows if "lambada/perplexity" in row}
    assert list(evaluated) == [4, 8]
    assert "update 4: hellaswag acc " in capsys.readouterr().out
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 8]
    ranked = {step: row["lambada/perplexity"] for step, row in evaluated.items()}
    with Checkpoints(tmp_path / "a" / "checkpoints", 1, "lambada/perplexity") as checkpoints:
        assert checkpoints.best() == min(ranked, key=ranked.__getitem__)
        metrics = {name: value for name, value in evaluated[8].items() if "/" in name or name == "val_loss"}
        assert checkpoints.info(8)["metrics"] == metrics
    without = train(tmp_path / "b", "--steps", 8)
    assert without == [{key: value for key, value in row.items() if "/" not in key} for row in rows]


@pytest.mark.slow
def test_a_resumed_run_evaluates_as_the_uninterrupted_one(train, data, tmp_path):
    tasks = ["--eval.tasks", "lambada", "--eval.tasks_data", data, "--eval.tasks_limit", 5]
    rows = train(tmp_path / "a", *tasks)
    train(tmp_path / "b", *tasks, "--steps", 6, "--optimizer.decay_steps", 12)
    assert train(tmp_path / "b", *tasks, "--optimizer.decay_steps", 12) == rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval.tasks", "lambda"], "there is no task 'lambda'"),
        (["--checkpoint.best", "lambada/acc"], "eval.tasks = []; expected val_loss, or TASK/METRIC"),
        (["--checkpoint.best", "lambada/accuracy", "--eval.tasks", "lambada"], "expected one of val_loss, lambada/acc"),
    ],
)
def test_impossible_tasks_start_no_run(train, data, tmp_path, flags, message):
    with pytest.raises(UserError) as error:
        train(tmp_path / "a", "--eval.tasks_data", data, *flags)
    assert message in str(error.value)
    assert not (tmp_path / "a").exists()


def test_the_plot_has_a_panel_for_each_metric_with_the_line_of_openais_model():
    rows = [{"step": step, "tokens": 10 * step, "loss": 3.0, "lambada/acc": 0.1 * step} for step in (1, 2)]
    rows[1]["hellaswag/acc_norm"] = 0.26
    figure = loss_figure(rows, "run", {"hellaswag/acc_norm": 0.3114})
    main, *panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["lambada acc", "hellaswag acc_norm"]
    assert [line.get_ydata() for line in panels[0].lines] == [pytest.approx([0.1, 0.2])]
    assert [list(line.get_ydata()) for line in panels[1].lines] == [[0.26], [0.3114, 0.3114]]
    assert main.get_title() == "run"
