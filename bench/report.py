"""Fills the tables of docs/performance.md and docs/reliability.md from the files in bench/results. It measures nothing.

python bench/report.py
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import NamedTuple

from record import RESULTS, Figures, replace_rows

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
RELIABILITY = DOCUMENT.with_name("reliability.md")


class Goal(NamedTuple):
    """A row of the table: `row` of `file`, which `at_least` or `at_most` is to be reached."""

    work: str
    against: str
    file: str
    row: str
    unit: str = ""  # "%" stands for a share
    at_least: float | None = None
    at_most: float | None = None


SHOWN = ("jax", "jaxlib", "tokamax")  # versions beside the kernels
CHAR = "time over nanogpt or nanogpt compiled"
ONE_PROMPT = "generation, 124M, 1 prompt, float32, CPU: tokens/s"
GOALS = (
    Goal("character model (4 × 128), CPU: time of an update", "nanoGPT, the faster of eager and compiled",
         "peers-char-cpu", CHAR, at_most=0.8),
    Goal("6 layers × 384, 256 tokens, 16 sequences, CPU: time of an update", "the same",
         "peers-char-gpu-cpu", CHAR, at_most=0.9),
    Goal("124M, 1,024 tokens, 2 sequences, float32, CPU: time of an update", "transformers on torch, the faster",
         "peers-124m-cpu", "time over transformers or transformers compiled", at_most=0.9),
    Goal("124M, 4 sequences of 64 tokens, float32, CPU: time of an update", "llm.c's train_gpt2",
         "peers-llmc-cpu", "time over llmc", at_most=0.9),
    Goal("quickstart, CPU: share of an update for the bar, rows, times and the plot", "updates without them",
         "display-cpu", "share of an update", "%", at_most=0.01),
    Goal("124M, one H200: tokens/s", "nanoGPT with torch.compile",
         "peers-124m-nvidia-h200", "tokens/s over nanogpt compiled", "×", at_least=1.25),
    Goal("124M, one H200, the best micro-batch: MFU", "989 TFLOP/s",
         "peers-sweep-124m-nvidia-h200", "best MFU", "%", at_least=0.5),
    Goal("1558M, one H200: MFU", "989 TFLOP/s",
         "peers-sweep-1558m-nvidia-h200", "best MFU", "%", at_least=0.55),
    Goal("generation, 124M, 1 and 8 prompts, CPU: tokens/s", "transformers' generate",
         "decode-cpu", "tokens/s over transformers", "×", at_least=2.0),
    Goal(ONE_PROMPT, "transformers' generate in float32",
         "decode-peers-cpu", "tokens/s over transformers float32", "×"),
    Goal(ONE_PROMPT, "CTranslate2 in float32",
         "decode-peers-cpu", "tokens/s over ctranslate2 float32", "×"),
    Goal(ONE_PROMPT, "CTranslate2 in int8",
         "decode-peers-cpu", "tokens/s over ctranslate2 int8", "×"),
    Goal(ONE_PROMPT, "llama.cpp in float32",
         "decode-peers-cpu", "tokens/s over llama.cpp float32", "×"),
    Goal(ONE_PROMPT, "llama.cpp in q8_0",
         "decode-peers-cpu", "tokens/s over llama.cpp q8_0", "×"),
    Goal(ONE_PROMPT, "ours in bfloat16",
         "decode-peers-cpu", "tokens/s over ours bfloat16", "×"),
    Goal("generation, 124M, 1 and 8 prompts, one H200: tokens/s", "transformers' generate",
         "decode-nvidia-h200", "tokens/s over transformers", "×", at_least=4.0),
    Goal("HellaSwag, 124M in float32, CPU: examples/s", "the faster of lm-eval's `hf` and a loop over transformers",
         "evaluate-cpu", "HellaSwag examples/s over the faster peer", "×", at_least=2.5),
    Goal("quickstart, CPU: start to first update, compiled programs on disk", "none on disk",
         "startup-cpu", "full cache over empty", at_most=0.4),
    Goal("asynchronous save, CPU: updates that it costs", "training without it",
         "checkpoint-cpu", "updates that a save costs", at_most=1.0),
    Goal("batches of 512 × 1,024 tokens, CPU: tokens/s", "nanoGPT's get_batch",
         "data-cpu", "tokens/s over nanoGPT's", "×"),
    Goal("10 B tokens, CPU: start of the process to the first batch", "–",
         "data-cpu", "seconds to the first batch", "s"),
    Goal("prepare with tiktoken, one worker, CPU: MB/s", "a loop of tiktoken's encode_ordinary",
         "prepare-cpu", "tiktoken, 1 worker over encode_ordinary", "×"),
    Goal("prepare with gigatoken, one worker, CPU: MB/s", "prepare with tiktoken",
         "prepare-cpu", "gigatoken, 1 worker over tiktoken's", "×"),
)  # fmt: skip


def text(value: float | None, unit: str) -> str:
    """A value with its unit, three digits."""
    if value is None:
        return "–"
    return f"{100 * value:.3g}%" if unit == "%" else f"{value:.3g} {unit}".strip()


def processor(figures: Figures) -> str:
    """The name of the CPU or of the accelerator that was measured."""
    name: str = figures["cpu"] if figures["device"] == "cpu" else figures["device"]
    return name


def summary(goal: Goal, figures: Figures | None) -> str:
    """The goal, what was measured and on what, and whether it reaches the goal."""
    low, high = goal.at_least, goal.at_most
    sign = "≥ " if low is not None else "≤ " if high is not None else ""
    cells = f"| {goal.work} | {goal.against} | {sign}{text(low if high is None else high, goal.unit)}"
    if figures is None or goal.row not in figures["rows"]:
        return f"{cells} | not measured |  |  |"
    value = figures["rows"][goal.row]["value"]
    met = (low is None or value >= low) and (high is None or value <= high)
    reached = "–" if not sign else "yes" if met else "**no**"
    return f"{cells} | {text(value, goal.unit)} | {processor(figures)} | {reached} |"


def source(name: str, figures: Figures) -> str:
    """When and where a file was measured, and the command that does it again, without directories of whoever ran it."""
    words = ["python", f"bench/{name.split('-')[0]}.py", *figures["command"][1:]]
    for flag in {"--results", "--nanogpt", "--data", "--llmc"} & set(words):
        at = words.index(flag)
        words[at : at + 2] = [] if flag == "--results" else [flag, "DIR"]
    where = processor(figures) + (f", {figures['cores']} cores" if figures["device"] == "cpu" else "")
    changed = ", with uncommitted changes" if figures["uncommitted"] else ""
    when = f"{figures['date']}, {where}, commit {figures['commit'][:7]}{changed}"
    return f"{when} ([figures](../bench/results/{name}.json)) | `{shlex.join(words)}`"


def document(page: str, results: Path) -> str:
    """docs/performance.md with these results in its tables."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*-*.json"))}
    rows = [(goal, files.get(goal.file, {"rows": {}})["rows"].get(goal.row)) for goal in GOALS]
    details = [
        f"| {goal.work} | {row['details']} | {source(goal.file, files[goal.file])} |" for goal, row in rows if row
    ]
    kernels = []
    for name, figures in files.items():
        if name.startswith("kernels"):
            versions = [
                f"{package} {figures['versions'][package]}" for package in SHOWN if package in figures["versions"]
            ]
            shape = f"{figures['batch']} × {figures['time']:,} tokens, {figures['dtype']}"
            details.append(
                f"| attention and the loss alone | {shape}, {', '.join(versions)} | {source(name, figures)} |"
            )
            kernels += [
                f"| {row} | {result['details']} | {figures['device']} |" for row, result in figures["rows"].items()
            ]
    page = replace_rows(page, "| work | against |", [summary(goal, files.get(goal.file)) for goal in GOALS])
    page = replace_rows(page, "| work | figures |", details)
    return replace_rows(page, "| candidate |", kernels)


def fault_result(name: str, value: float) -> str:
    """A count or a size; for a fault of the storage, which happens once, whether all was well in the end."""
    if name.startswith("storage: "):
        return "recovered" if value else "**not recovered**"
    return text(value, "")


def reliability(page: str, results: Path) -> str:
    """docs/reliability.md with the results of bench/faults.py in its table."""
    rows = json.loads((results / "faults-cpu.json").read_text())["rows"]
    lines = [f"| {name} | {fault_result(name, row['value'])} | {row['details']} |" for name, row in rows.items()]
    return replace_rows(page, "| fault |", lines)


def main() -> None:
    """Writes the documents."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    DOCUMENT.write_text(document(DOCUMENT.read_text(), RESULTS))
    RELIABILITY.write_text(reliability(RELIABILITY.read_text(), RESULTS))


if __name__ == "__main__":
    main()
