"""A tiny run to disturb: its config, how it is started, and what it leaves."""

import json

import jax

from gpt2_jax import train as training
from gpt2_jax.config.flags import parse_args
from gpt2_jax.metrics import read_rows

CONFIG = """
out = "unset"
steps = 10
batch_size = 8

[model]
vocab_size = 0
block_size = 8
n_layer = 1
n_head = 1
n_embd = 8
dropout = 0.1

[data]
text = "unset"
tokenizer = "bytes"

[optimizer]
learning_rate = 1e-2
warmup_steps = 2
decay_steps = 10

[checkpoint]
every = 2
keep = 9

[eval]
every = 4
tokens = 64

[log]
every = 1
"""
TEXT = "".join(f"{number} squared is {number * number}\n" for number in range(100))
SPEEDS = ("tokens_per_second", "mfu")


def run(flags, out, *more, devices=1):
    """Trains in this process, on this many devices, and returns the exit code."""
    config = parse_args("train", "", [*flags, "--out", str(out), *map(str, more)])
    return training.train(config, jax.devices()[:devices])


def command(flags, out, *more):
    """The command without a process of its own, on all eight devices: the exit code."""
    return training.main([*flags, "--out", str(out), *map(str, more)])


def rows(out):
    """The rows of a run without its speeds. Each line has to be JSON: without NaN and infinity."""

    def refuse(constant):
        raise ValueError(constant)

    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    return [{key: row[key] for key in row if key not in SPEEDS} for row in read_rows(out / "metrics.jsonl")]


def names(out):
    """The checkpoints of a run, and what was set aside."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())
