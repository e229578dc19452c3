"""Writes docs/performance.md and its plot from the files in bench/results. It measures nothing.

python bench/report.py
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from record import RESULTS

DOCUMENTS = Path(__file__).parents[1] / "docs"

SHOWN = ("jax", "jaxlib", "tokamax")  # versions in the kernel tables

Figures = dict[str, Any]


class Measured(NamedTuple):
    """A value of the table, and the figures behind it."""

    value: float
    details: str


class Goal(NamedTuple):
    """A row of the table. `read` takes its value from the file, and returns None if the file lacks it."""

    work: str
    against: str
    script: str
    file: str
    read: Callable[[Figures], Measured | None]
    unit: str = ""  # "%" stands for a share
    at_least: float | None = None
    at_most: float | None = None

    def format(self, value: float) -> str:
        """The value with its unit, three digits."""
        return f"{100 * value:.3g}%" if self.unit == "%" else f"{value:.3g} {self.unit}".strip()

    def cells(self, figures: Figures | None) -> str:
        """The last three cells: goal, measured, reached."""
        low, high = self.at_least, self.at_most
        bound = f"≥ {self.format(low)}" if low is not None else f"≤ {self.format(high)}" if high is not None else "–"
        measured = self.read(figures) if figures else None
        if not measured:
            return f"{bound} | not measured | "
        met = (low is None or measured.value >= low) and (high is None or measured.value <= high)
        return f"{bound} | {self.format(measured.value)} | {'–' if bound == '–' else 'yes' if met else '**no**'}"


def duration(seconds: float) -> str:
    """Milliseconds or seconds, three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def update_ratio(*peers: str, speed: bool = False) -> Callable[[Figures], Measured | None]:
    """Our time per update over that of the fastest of `peers`, all of which must be there; with `speed` the inverse."""

    def read(figures: Figures) -> Measured | None:
        seconds = {name: trainer["median_s"] for name, trainer in figures["trainers"].items()}
        if not seconds.keys() >= set(peers):
            return None
        ours, peer = seconds["ours"], min(peers, key=seconds.__getitem__)
        if not speed:
            return Measured(ours / seconds[peer], f"{duration(ours)} and {duration(seconds[peer])} ({peer})")
        rates = [figures["tokens_per_update"] / one for one in (ours, seconds[peer])]
        return Measured(rates[0] / rates[1], f"{rates[0]:,.0f} and {rates[1]:,.0f} tokens/s ({peer})")

    return read


def best_mfu(figures: Figures) -> Measured | None:
    """The largest MFU of the variants that ran."""
    case = max((case for case in figures["cases"] if case.get("mfu")), key=lambda case: case["mfu"], default=None)
    if not case:
        return None
    change = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in case["change"].items()) or "as configured"
    memory = f"{case['peak_bytes'] / 2**30:.1f} GiB"
    return Measured(case["mfu"], f"{case['tokens_per_second']:,.0f} tokens/s, {memory} ({change})")


def generation(figures: Figures) -> Measured | None:
    """The smallest ratio for one prompt and for eight."""
    cases = [case for case in figures["cases"] if case["batch"] in (1, 8)]
    if {case["batch"] for case in cases} != {1, 8}:
        return None
    ratios = ", ".join(f"{case['speed_ratio']:.2f} ({case['batch']} × {case['prompt']})" for case in cases)
    first = ", ".join(f"{case['first_token_ratio']:.2f}" for case in cases)
    details = f"by prompts × their tokens {ratios}; time to the first token over that of transformers {first}"
    return Measured(min(case["speed_ratio"] for case in cases), details)


def start_up(figures: Figures) -> Measured:
    """Full cache over empty cache."""
    return Measured(figures["ratio"], "{filled:.2f} s and {empty:.2f} s".format(**figures["median_s"]))


def saving(figures: Figures) -> Measured:
    """The updates that one save costs."""
    update, restored = duration(figures["update_s"]), duration(figures["restore_s"])
    return Measured(
        figures["stall"],
        f"the call {figures['blocked']:.2f}, the updates after it {figures['slower']:.2f}; an update takes {update}; "
        f"{figures['bytes'] / 1e9:.2f} GB, restored in {restored}",
    )


def pipeline(figures: Figures) -> Measured:
    """Our tokens per second over nanoGPT's."""
    ours, theirs = (statistics.median(figures["pipeline"]["tokens_per_second"][name]) for name in ("ours", "nanogpt"))
    restored = duration(statistics.median(figures["restore"]["seconds"]))
    rates = f"{ours / 1e6:.0f} M and {theirs / 1e6:.0f} M tokens/s"
    return Measured(ours / theirs, f"{rates}; the batch of update 100,000 is restored in {restored}")


def first_batch(figures: Figures) -> Measured:
    """Seconds to the first batch."""
    runs = figures["start"]["runs"]
    first, ahead = (statistics.median(run[f"first_batch{name}_s"] for run in runs) for name in ("", "_read_ahead"))
    grown = max(run["resident_growth_mb"] for run in runs)
    return Measured(first, f"{ahead:.2f} s through Grain's thread; memory grows by {grown:.0f} MB in 200 batches")


def preparing(engine: str, ratio: str) -> Callable[[Figures], Measured]:
    """One of the ratios of bench/prepare.py, and the speeds of an engine."""

    def read(figures: Figures) -> Measured:
        runs = [figures["text"]["runs"][f"{engine}, {workers}"] for workers in ("1 worker", "2 workers")]
        one, two = (statistics.median(run["mb_per_second"] for run in case) for case in runs)
        peak = max(figures[name]["peak_mb"] for name in ("2 GB in one text", "2 GB of lines"))
        memory = f"; at most {peak:.0f} MB of memory for a text of 2 GB" if engine == "gigatoken" else ""
        return Measured(figures["text"][ratio], f"{one:.0f} MB/s, with two workers {two:.0f} MB/s{memory}")

    return read


NANOGPT, HF = ("nanogpt", "nanogpt compiled"), ("transformers", "transformers compiled")
GOALS = (
    Goal("character model (4 × 128), CPU: time of an update", "nanoGPT, the faster of eager and compiled",
         "peers", "peers-char-cpu", update_ratio(*NANOGPT), at_most=0.8),
    Goal("6 layers × 384, 256 tokens, 16 sequences, CPU: time of an update", "the same",
         "peers", "peers-char-gpu-cpu", update_ratio(*NANOGPT), at_most=0.9),
    Goal("124M, 1,024 tokens, 2 sequences, float32, CPU: time of an update", "transformers on torch, the faster",
         "peers", "peers-124m-cpu", update_ratio(*HF), at_most=0.9),
    Goal("124M, one H200: tokens/s", "nanoGPT with torch.compile",
         "peers", "peers-124m-nvidia-h200", update_ratio("nanogpt compiled", speed=True), "×", at_least=1.25),
    Goal("124M, one H200, the best micro-batch: MFU", "989 TFLOP/s",
         "train_step", "train_step-gpt2-124m-nvidia-h200", best_mfu, "%", at_least=0.5),
    Goal("1558M, one H200: MFU", "989 TFLOP/s",
         "train_step", "train_step-gpt2-1558m-nvidia-h200", best_mfu, "%", at_least=0.55),
    Goal("generation, 124M, 1 and 8 prompts, CPU: tokens/s", "transformers' generate",
         "decode", "decode-cpu", generation, "×", at_least=2.0),
    Goal("generation, 124M, 1 and 8 prompts, one H200: tokens/s", "transformers' generate",
         "decode", "decode-nvidia-h200", generation, "×", at_least=4.0),
    Goal("quickstart, CPU: start to first update, compiled programs on disk", "none on disk",
         "startup", "startup-cpu", start_up, at_most=0.4),
    Goal("asynchronous save, CPU: updates that it costs", "training without it",
         "checkpoint", "checkpoint-cpu", saving, at_most=1.0),
    Goal("batches of 512 × 1,024 tokens, CPU: tokens/s", "nanoGPT's get_batch", "data", "data-cpu", pipeline, "×"),
    Goal("10 B tokens, CPU: start of the process to the first batch", "–", "data", "data-cpu", first_batch, "s"),
    Goal("prepare with tiktoken, one worker, CPU: MB/s", "a loop of tiktoken's encode_ordinary",
         "prepare", "prepare-cpu", preparing("tiktoken", "tiktoken, 1 worker over encode_ordinary"), "×"),
    Goal("prepare with gigatoken, one worker, CPU: MB/s", "prepare with tiktoken",
         "prepare", "prepare-cpu", preparing("gigatoken", "gigatoken, 1 worker over tiktoken's"), "×"),
)  # fmt: skip

HEADER = """# Performance: goals and measurements

`python bench/report.py` generates this page from [bench/results](../bench/results). Each file there holds the machine,
the versions, the commit, the command and every repetition. Figures are medians. Trainers that are compared take turns
on one machine, each in a process of its own, after compiling and warming up
([bench/trainers.py](../bench/trainers.py)).

| work | against | goal | measured | reached |
| --- | --- | --- | --- | --- |
"""

MFU = """MFU is (6 N + 12 L C T) × tokens/s over the dense bfloat16 peak of the chip, 989 TFLOP/s for an H200. N leaves
out the position embeddings."""

AGAIN = """## Measure again

Each command below reruns its measurement. On one NVIDIA GPU, `bash bench/gpu.sh OUT` measures everything there is for
it, and the same command resumes ([bench/gpu.sh](../bench/gpu.sh)).

To see where the time of an update goes, add `--log.profile_steps 5` to a training command and open the trace with XProf
(`xprof --logdir OUT/profile`)."""


def load(results: Path, name: str) -> Figures | None:
    """A file of results, None if it does not exist."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def command(script: str, figures: Figures) -> str:
    """The command that reruns a measurement, without the directories of whoever ran it."""
    shown: list[str] = []
    rest = iter(figures["command"][1:])
    for word in rest:
        if word in ("--results", "--directory"):
            next(rest, None)
        elif word in ("--nanogpt", "--llmc"):
            next(rest, None)
            shown += [word, "DIR"]
        else:
            shown.append(word)
    return f"`{shlex.join(['python', f'bench/{script}.py', *shown])}`"


def details(results: Path) -> Iterator[str]:
    """The figures behind each measured row, and the command that reruns it."""
    for goal in GOALS:
        figures = load(results, goal.file)
        measured = goal.read(figures) if figures else None
        if figures and measured:
            where = figures["device"] if figures["device"] != "cpu" else f"{figures['cpu']}, {figures['cores']} cores"
            changed = ", with uncommitted changes" if figures["uncommitted"] else ""
            yield (
                f"- **{goal.work}**: {measured.details}. {figures['date']}, {where}, commit "
                f"{figures['commit'][:7]}{changed}; {command(goal.script, figures)} "
                f"([script](../bench/{goal.script}.py), [figures](../bench/results/{goal.file}.json))"
            )


def kernel_tables(results: Path) -> Iterator[str]:
    """A table for each file of bench/kernels.py."""
    for path in sorted(results.glob("kernels-*.json")):
        figures = json.loads(path.read_text())
        device = figures["cpu"] if figures["device"] == "cpu" else figures["device"]
        versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items() if name in SHOWN)
        yield (
            f"{figures['batch']} × {figures['time']:,} tokens, {figures['dtype']}, {device}, {versions}, "
            f"{figures['date']}, {command('kernels', figures)}:\n\n"
            "| part | candidate | time | error |\n| --- | --- | --- | --- |"
        )
        for part in ("attention", "loss", "matmul"):
            for name, case in figures.get(part, {}).items():
                milliseconds = case.get("median_ms", 0) / 1000
                error = f"{case['error_of_values']:.1e}" if "error_of_values" in case else ""
                yield f"| {part} | {name} | {case.get('error') or duration(milliseconds)} | {error} |"
        yield ""


def plot_peers(results: Path, image: Path) -> bool:
    """Draws the time of an update of every trainer in every comparison. Returns False if there is none."""
    from matplotlib.figure import Figure

    files = {goal.file: goal.work.split(":")[0] for goal in GOALS if goal.script == "peers"}
    cases = [(title, figures["trainers"]) for name, title in files.items() if (figures := load(results, name))]
    if not cases:
        return False
    counts = [len(trainers) for _, trainers in cases]
    figure = Figure(figsize=(8, 0.75 * len(cases) + 0.36 * sum(counts)), dpi=120, layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (title, trainers) in zip(panels, cases, strict=True):
        seconds = {name.replace("ours", "gpt2_jax"): trainer["median_s"] for name, trainer in trainers.items()}
        names = sorted(seconds, key=seconds.__getitem__, reverse=True)
        values = [seconds[name] for name in names]
        bars = axes.barh(
            names, values, color=["tab:blue" if name == "gpt2_jax" else "0.7" for name in names], height=0.65
        )
        axes.bar_label(bars, list(map(duration, values)), padding=4, fontsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlim(0, 1.15 * max(values))
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False)
    figure.suptitle("Time of an update, shorter is better", fontsize=11, x=0.01, ha="left")
    figure.savefig(image, format="png")
    return True


def document(results: Path, images: Sequence[str]) -> str:
    """The text of docs/performance.md."""
    rows = [f"| {goal.work} | {goal.against} | {goal.cells(load(results, goal.file))} |" for goal in GOALS]
    parts = [HEADER + "\n".join(rows), MFU, *(f"![{name}]({name}.png)" for name in images)]
    parts += [AGAIN, "\n".join(details(results)) or "Nothing was measured."]
    if tables := "\n".join(kernel_tables(results)):
        parts += ["## Attention and the loss alone, forward and backward", tables.rstrip()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes the document and its plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="directory of the files to read")
    parser.add_argument("--out", type=Path, default=DOCUMENTS, metavar="DIR", help="directory to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plotted = plot_peers(args.results, args.out / "performance.png")
    path = args.out / "performance.md"
    path.write_text(document(args.results, ["performance"] if plotted else []))
    print(path)


if __name__ == "__main__":
    main()
