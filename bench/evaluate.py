"""HellaSwag beside lm-eval's `hf` model and a plain loop over transformers: examples per second and peak memory.

    python bench/evaluate.py --data hellaswag_val.jsonl [--limit 100]

All have the same random weights of GPT-2 124M's shape in float32, and get the same examples by lm-eval's protocol. They
must agree on every log-probability. The peers use the fastest of several batch sizes. The loop takes the examples in
the order of the file, or sorted by their lengths. They take turns in one process, with tokenization and without
compilation and first allocations. The peak memory is that of a process for each.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import Figures, Rows, arguments, median_of, python_path, take_turns, timed, write

BATCHES = (4, 8, 16, 32)
Examples = list[tuple[str, tuple[str, ...]]]  # contexts and endings
Score = Callable[[], np.ndarray]  # log-probabilities, float64 [examples, endings]


def ours(directory: Path, examples: Examples) -> Score:
    """Our evaluation."""
    import jax

    from gpt2_jax import load, runtime
    from gpt2_jax.config import MeshConfig
    from gpt2_jax.evaluation.requests import encode_pair
    from gpt2_jax.evaluation.scoring import Scorer
    from gpt2_jax.evaluation.task import Collector, totals
    from gpt2_jax.sharding import make_mesh

    runtime.enable_compilation_cache("")
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    gpt2 = load(str(directory), mesh=mesh)
    scorer = Scorer(gpt2.model, mesh)

    def score() -> np.ndarray:
        collector = Collector()
        for context, endings in examples:
            collector.add([encode_pair(gpt2.tokenizer, context, " " + ending) for ending in endings], "")
        scores = scorer.score(gpt2.params, collector.requests)
        return np.array([totals(row) for row in collector.by_example(scores)])

    return score


def harness(directory: Path, examples: Examples, batch: int) -> Score:
    """The `hf` model of lm-eval."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(directory), batch_size=batch, device="cpu", dtype="float32")
    requests = [
        Instance("loglikelihood", {}, (context, " " + ending), index)
        for context, endings in examples
        for index, ending in enumerate(endings)
    ]

    def score() -> np.ndarray:
        answers = model.loglikelihood(requests, disable_tqdm=True)
        return np.array([log_prob for log_prob, _ in answers]).reshape(len(examples), -1)

    return score


def loop(directory: Path, examples: Examples, batch: int, in_order: bool = True) -> Score:
    """A loop over transformers: batches in the order of the file or of similar lengths, padded on the right."""
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def score() -> np.ndarray:
        texts = [
            (tokenizer.encode(context), tokenizer.encode(" " + ending))
            for context, endings in examples
            for ending in endings
        ]
        order = list(range(len(texts)))
        if not in_order:
            order.sort(key=lambda index: -sum(map(len, texts[index])))
        log_probs = np.zeros(len(texts))
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                part = [texts[index] for index in order[start : start + batch]]
                tokens = torch.zeros(len(part), max(sum(map(len, text)) for text in part), dtype=torch.long)
                for row, (context, ending) in zip(tokens, part, strict=True):
                    row[: len(context) + len(ending)] = torch.tensor(context + ending)
                logits = model(tokens).logits
                for row, (context, ending), index in zip(logits, part, order[start : start + batch], strict=True):
                    wanted = torch.log_softmax(row[len(context) - 1 : len(context) + len(ending) - 1], dim=-1)
                    log_probs[index] = wanted[range(len(ending)), ending].double().sum()
        return log_probs.reshape(len(examples), -1)

    return score


PEERS = {
    "lm-eval": harness,
    "transformers": loop,
    "transformers, sorted by length": functools.partial(loop, in_order=False),
}
PLAIN = ("lm-eval", "transformers")  # what people run


def write_model(directory: Path) -> None:
    """Writes random weights of 124M's shape and GPT-2's tokenizer, as transformers reads them."""
    import jax

    from gpt2_jax.config import GPT2Config
    from gpt2_jax.data.tokenizer import gpt2_encoding
    from gpt2_jax.interop.huggingface import write_huggingface
    from gpt2_jax.interop.stored import StoredModel
    from gpt2_jax.model import GPT2, init_params

    config = GPT2Config(vocab_size=50257)
    params = init_params(GPT2(config), jax.random.key(0))

    def read(name: str) -> np.ndarray:
        array = np.asarray(functools.reduce(lambda tree, key: tree[key], name.split("/"), params))
        return 3 * array[: config.vocab_size] if name == "wte/embedding" else array  # predictions that differ clearly

    write_huggingface(StoredModel("random weights", config, read, gpt2_encoding), directory, "float32")


def read_examples(path: Path, limit: int) -> Examples:
    """The first examples of HellaSwag, with lm-eval's contexts."""
    from gpt2_jax.evaluation import TASKS
    from gpt2_jax.evaluation.examples import load_examples, locate

    task = TASKS["hellaswag"]
    return [(example.context, example.endings) for example in load_examples(task, locate(task, [path]), limit)]


def peak_memory(name: str, batch: int, directory: Path, data: Path, limit: int) -> float:
    """The peak of a process that scores once, in bytes."""
    command = [sys.executable, __file__, "--data", str(data), "--limit", str(limit), "--alone", name]
    command += ["--batch", str(batch), "--model", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": python_path()})
    if done.returncode:
        raise SystemExit(f"error: {name} alone failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def measure(directory: Path, args: Any) -> Figures:
    """Examples per second in turns, and the peak memory of each."""
    examples = read_examples(args.data, args.limit)
    mine = ours(directory, examples)
    first = timed(mine)  # with compilation
    expected = mine()
    best: dict[str, tuple[int, Score]] = {}
    sweep: dict[str, dict[int, float]] = {}
    for name, make in PEERS.items():
        scorers = {batch: make(directory, examples, batch) for batch in args.batch or BATCHES}
        sweep[name] = {}
        for batch, score in scorers.items():
            start = time.perf_counter()
            found = score()
            sweep[name][batch] = time.perf_counter() - start
            if (difference := np.abs(found - expected).max()) > 1e-3:
                raise SystemExit(f"error: {name} with batches of {batch} differs by {difference} nats")
        batch = min(sweep[name], key=sweep[name].__getitem__)
        best[name] = batch, scorers[batch]
    actions = {"ours": mine, **{name: score for name, (_, score) in best.items()}}
    turns = take_turns({name: functools.partial(timed, score) for name, score in actions.items()}, args.repeat)
    speeds = {name: [{"examples_per_second": len(examples) / s} for s in seconds] for name, seconds in turns.items()}
    batches = {"ours": 0, **{name: batch for name, (batch, _) in best.items()}}
    memory = {name: peak_memory(name, batch, directory, args.data, args.limit) for name, batch in batches.items()}
    medians = {name: median_of(runs, "examples_per_second") for name, runs in speeds.items()}
    return {
        "examples": len(examples),
        "batch_of_peers": {name: batch for name, (batch, _) in best.items()},
        "seconds_by_batch": sweep,
        "seconds_with_compilation": first,
        "runs": speeds,
        "medians": medians,
        "over_the_faster_peer": medians["ours"] / max(medians[name] for name in PLAIN),
        "over_the_sorted_loop": medians["ours"] / medians["transformers, sorted by length"],
        "peak_bytes": memory,
    }


def rows(figures: Figures) -> Rows:
    """The ratio to the faster peer."""
    medians, memory = figures["medians"], figures["peak_bytes"]
    speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in medians.items())
    peaks = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in memory.items())
    details = (
        f"{figures['examples']} examples; examples/s: {speeds}; peak memory in GB: {peaks}; the first call, with one "
        f"compilation, took {figures['seconds_with_compilation']:.1f} s"
    )
    return {"HellaSwag examples/s over the faster peer": (figures["over_the_faster_peer"], details)}


def main() -> None:
    """Measures and writes the file."""
    parser = arguments(__doc__, repeat=5)
    parser.add_argument("--data", type=Path, required=True, help="hellaswag_val.jsonl, or its directory")
    parser.add_argument("--limit", type=int, default=100, help="examples (100)")
    parser.add_argument("--batch", type=int, nargs="*", help=f"batch sizes of the peers {BATCHES}")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", choices=["ours", *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        examples = read_examples(args.data, args.limit)
        if args.alone == "ours":
            ours(args.model, examples)()
        else:
            PEERS[args.alone](args.model, examples, args.batch[0])()
        # Not ru_maxrss, which begins with the memory of the parent.
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        figures = measure(Path(directory), args)
    write("evaluate", figures, rows(figures), args.results)


if __name__ == "__main__":
    main()
