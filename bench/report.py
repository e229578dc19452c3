"""Writes docs/performance.md and its plots from the files in bench/results: what was measured beside what was aimed at.

    python bench/report.py

It measures nothing. A goal without its file is "not measured".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS

DOCUMENTS = Path(__file__).parents[1] / "docs"
NOT_MEASURED = "not measured"

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One figure of a file, and what it was made of."""

    value: float
    raw: str


@dataclasses.dataclass(frozen=True)
class Goal:
    """A row of the table.

    Attributes:
        file: of bench/results, without its ending.
        read: what the file says of it, None if that is not in there.
        bound: of the value; `at_least` says of which side.
        form: how the bound and the value are written.
    """

    work: str
    against: str
    file: str
    read: Callable[[Figures], Measured | None]
    bound: float
    at_least: bool
    form: Callable[[float], str]

    def met(self, value: float) -> bool:
        """Whether the goal is reached."""
        return value >= self.bound if self.at_least else value <= self.bound


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def beside(*sides: str, speed: bool = False) -> Callable[[Figures], Measured | None]:
    """Our time per update over that of the fastest of these trainers, all of which have to be there; as a speed the
    inverse."""

    def read(figures: Figures) -> Measured | None:
        trainers = figures["trainers"]
        if not trainers.keys() >= set(sides):
            return None
        peers = {name: trainers[name]["median_s"] for name in sides}
        peer = min(peers, key=peers.__getitem__)
        ours = trainers["ours"]["median_s"]
        if speed:
            rates = [figures["tokens_per_update"] / seconds for seconds in (ours, peers[peer])]
            return Measured(rates[0] / rates[1], f"{rates[0]:,.0f} and {rates[1]:,.0f} tokens/s ({peer})")
        return Measured(ours / peers[peer], f"{milliseconds(ours)} and {milliseconds(peers[peer])} ({peer})")

    return read


def best_mfu(figures: Figures) -> Measured | None:
    """The largest MFU of the variants that ran."""
    cases = [case for case in figures["cases"] if case.get("mfu")]
    if not cases:
        return None
    case = max(cases, key=lambda case: case["mfu"])
    change = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in case["change"].items()) or "as configured"
    return Measured(case["mfu"], f"{case['tokens_per_second']:,.0f} tokens/s, {gib(case['peak_bytes'])} GiB ({change})")


def decoding(figures: Figures) -> Measured | None:
    """The least of the ratios for one prompt and for eight."""
    cases = [case for case in figures["cases"] if case["batch"] in (1, 8)]
    if {case["batch"] for case in cases} != {1, 8}:
        return None
    raw = ", ".join(f"{case['speed_ratio']:.2f} ({case['batch']} × {case['prompt']})" for case in cases)
    return Measured(min(case["speed_ratio"] for case in cases), f"by prompts × their tokens: {raw}")


def start_up(figures: Figures) -> Measured:
    """Filled cache over empty cache."""
    median = figures["median_s"]
    return Measured(figures["ratio"], f"{median['filled']:.2f} s and {median['empty']:.2f} s")


def saving(figures: Figures) -> Measured:
    """Updates that one save costs."""
    return Measured(
        figures["stall"],
        f"the call {figures['blocked']:.2f}, the updates after it {figures['slower']:.2f}; an update "
        f"{milliseconds(figures['update_s'])}, {figures['bytes'] / 1e9:.2f} GB",
    )


def gib(n_bytes: float) -> str:
    """Bytes as GiB."""
    return f"{n_bytes / 2**30:.1f}"


def share(value: float) -> str:
    """As per cent."""
    return f"{value:.1%}".replace(".0%", "%")


def times(value: float) -> str:
    """As a multiple."""
    return f"{value:.3g} ×"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


EAGER_OR_COMPILED = ("nanogpt", "nanogpt compiled")
HF = ("transformers", "transformers compiled")
GOALS = (
    Goal("character model (4 × 128), CPU: time of an update", "nanoGPT, the faster of eager and compiled",
         "peers-char-cpu", beside(*EAGER_OR_COMPILED), 0.8, False, number),
    Goal("6 layers × 384, 256 tokens, 16 sequences, CPU: time of an update", "the same",
         "peers-char-gpu-cpu", beside(*EAGER_OR_COMPILED), 0.9, False, number),
    Goal("124M, 1,024 tokens, 2 sequences, float32, CPU: time of an update", "transformers on torch, the faster",
         "peers-124m-cpu", beside(*HF), 0.9, False, number),
    Goal("124M, one H200: tokens/s", "nanoGPT with torch.compile",
         "peers-124m-nvidia-h200", beside("nanogpt compiled", speed=True), 1.25, True, times),
    Goal("124M, one H200, the best micro-batch: MFU", "989 TFLOP/s",
         "train_step-gpt2-124m-nvidia-h200", best_mfu, 0.5, True, share),
    Goal("1558M, one H200: MFU", "989 TFLOP/s",
         "train_step-gpt2-1558m-nvidia-h200", best_mfu, 0.55, True, share),
    Goal("generation, 124M, 1 and 8 prompts, CPU: tokens/s", "transformers' generate",
         "decode-cpu", decoding, 2.0, True, times),
    Goal("generation, 124M, 1 and 8 prompts, one H200: tokens/s", "transformers' generate",
         "decode-nvidia-h200", decoding, 4.0, True, times),
    Goal("quickstart, CPU: start to first update, compiled programs on disk", "none on disk",
         "startup-cpu", start_up, 0.4, False, number),
    Goal("asynchronous save, CPU: updates that it costs", "training without it",
         "checkpoint-cpu", saving, 1.0, False, number),
    Goal("124M compiled for v5e:2x4: estimated cycles outside the kernels", "the same without attention",
         "tpu-step", lambda figures: Measured(figures["ratio"], figures.get("raw", "")), 1.1, False, number),
)  # fmt: skip

HEADER = """# Performance: goals and measurements

Generated by `python bench/report.py` from [bench/results](../bench/results); every file there has its machine,
versions, commit, command and all repetitions. Figures are medians. Trainers that are compared run in one go on one
machine, in processes of their own, taking turns; what compiles or warms up comes before
([bench/trainers.py](../bench/trainers.py)).

| work | against | goal | measured | reached |
| --- | --- | --- | --- | --- |
"""
MFU = """MFU is (6 N + 12 L C T) × tokens/s over the chip's dense bfloat16 peak (989 TFLOP/s for an H200), N without the
position embeddings."""


def load(results: Path, name: str) -> Figures | None:
    """A file of results, None if there is none."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def command(figures: Figures) -> str:
    """What was typed, without the directories of the one who did."""
    script, *words = figures["command"]
    shown: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--results", "--directory"):
            next(rest, None)
            continue
        shown.append(word)
        if word in ("--nanogpt", "--llmc"):
            next(rest, None)
            shown.append("DIR")
    return shlex.join(["python", f"bench/{script}", *shown])


def rows(results: Path) -> Iterator[str]:
    """The table of goals."""
    for goal in GOALS:
        figures = load(results, goal.file)
        measured = goal.read(figures) if figures else None
        bound = f"{'≥' if goal.at_least else '≤'} {goal.form(goal.bound)}"
        if measured:
            reached = "yes" if goal.met(measured.value) else "**no**"
            yield f"| {goal.work} | {goal.against} | {bound} | {goal.form(measured.value)} | {reached} |"
        else:
            yield f"| {goal.work} | {goal.against} | {bound} | {NOT_MEASURED} | |"


def sources(results: Path) -> Iterator[str]:
    """What each measured row was made of."""
    for goal in GOALS:
        figures = load(results, goal.file)
        measured = goal.read(figures) if figures else None
        if not figures or not measured:
            continue
        where = figures["device"] if figures["device"] != "cpu" else f"{figures['cpu']}, {figures['cores']} cores"
        changed = ", with uncommitted changes" if figures["uncommitted"] else ""
        yield (
            f"- **{goal.work}**: {measured.raw or goal.form(measured.value)}. {figures['date']}, {where}, commit "
            f"{figures['commit'][:7]}{changed}; `{command(figures)}` "
            f"([{goal.file}.json](../bench/results/{goal.file}.json))"
        )


def variant_tables(results: Path) -> Iterator[str]:
    """A table for each file of bench/train_step.py."""
    for path in sorted([*results.glob("train_step-*.json"), *results.glob("variants-*.json")]):
        figures = json.loads(path.read_text())
        flags = f"`{shlex.join(figures['flags_of_training'])}`"
        environment = "".join(f", `{name}={value}`" for name, value in figures["flags"].items())
        yield f"### {path.stem}\n\n{flags}{environment}, {figures['device']}, {figures['date']}:\n"
        yield "| variant | tokens/s | MFU | peak GiB | first update, s |\n| --- | --- | --- | --- | --- |"
        for case in figures["cases"]:
            change = ", ".join(f"{key} {value}" for key, value in case["change"].items()) or "as it is"
            if "error" in case:
                yield f"| {change} | {case['error'].splitlines()[-1][:80]} | | | |"
                continue
            mfu = share(case["mfu"]) if case["mfu"] else "–"
            speed, first = f"{case['tokens_per_second']:,.0f}", f"{case['first_update_s']:.1f}"
            yield f"| {change} | {speed} | {mfu} | {gib(case['peak_bytes'])} | {first} |"
        yield ""


def kernel_tables(results: Path) -> Iterator[str]:
    """A table for each file of bench/kernels.py."""
    for path in sorted(results.glob("kernels-*.json")):
        figures = json.loads(path.read_text())
        shape = f"{figures['batch']} × {figures['time']:,} tokens, {figures['dtype']}"
        device = figures["cpu"] if figures["device"] == "cpu" else figures["device"]
        versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
        yield f"{shape}, {device}, {versions}, {figures['date']}, `{command(figures)}`:\n"
        yield "| part | candidate | time | error |\n| --- | --- | --- | --- |"
        for part in ("attention", "loss"):
            for name, case in figures.get(part, {}).items():
                error = case.get("error")
                cells = (
                    f"{error} | "
                    if error
                    else f"{milliseconds(case['median_ms'] / 1000)} | {case['error_of_values']:.1e}"
                )
                yield f"| {part} | {name} | {cells} |"
        yield ""


def plot_peers(results: Path, image: Path) -> bool:
    """Draws the time of an update of every trainer in every comparison; False if there is none."""
    from matplotlib.figure import Figure

    titles = {goal.file: goal.work.split(":")[0] for goal in GOALS if goal.file.startswith("peers-")}
    cases = [(title, figures) for name, title in titles.items() if (figures := load(results, name))]
    if not cases:
        return False
    counts = [len(figures["trainers"]) for _, figures in cases]
    figure = Figure(figsize=(8, 0.75 * len(cases) + 0.36 * sum(counts)), dpi=120, layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (title, figures) in zip(panels, cases, strict=True):
        trainers = sorted(figures["trainers"].items(), key=lambda item: -item[1]["median_s"])
        names = ["gpt2_jax" if name == "ours" else name for name, _ in trainers]
        seconds = [trainer["median_s"] for _, trainer in trainers]
        colors = ["tab:blue" if name == "gpt2_jax" else "0.7" for name in names]
        bars = axes.barh(names, seconds, color=colors, height=0.65)
        axes.bar_label(bars, list(map(milliseconds, seconds)), padding=4, fontsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlim(0, 1.15 * max(seconds))
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False)
    figure.suptitle("Time of an update, shorter is better", fontsize=11, x=0.01, ha="left")
    figure.savefig(image, format="png")
    return True


def plot_micro_batches(results: Path, image: Path) -> bool:
    """Draws speed over micro-batch size on the H200; False without at least two sizes."""
    from matplotlib.figure import Figure

    lines = {}
    for size in ("124m", "355m", "774m", "1558m"):
        figures = load(results, f"train_step-gpt2-{size}-nvidia-h200") or {"cases": [], "flags_of_training": []}
        base = figures["flags_of_training"]
        default = int(base[base.index("--micro_batch_size") + 1]) if "--micro_batch_size" in base else None
        points: dict[str, dict[int, float]] = {}
        for case in figures["cases"]:
            micro = int(case["change"].get("micro_batch_size", default or 0))
            if case.get("mfu") and micro:
                remat = case["change"].get("model.remat")
                label = f"{size.upper()}" + (f", remat {remat}" if remat else "")
                points.setdefault(label, {})[micro] = case["mfu"]
        lines |= {label: line for label, line in points.items() if len(line) > 1}
    if not lines:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for label, line in lines.items():
        axes.plot(*zip(*sorted(line.items()), strict=True), marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    top = max(max(line.values()) for line in lines.values())
    axes.set_ylim(0, math.ceil(10 * top + 0.5) / 10)
    axes.set(xlabel="sequences of 1,024 tokens at a time", ylabel="MFU", title="Training on one H200, bfloat16")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(image, format="png")
    return True


def document(results: Path, images: Sequence[str]) -> str:
    """The whole of docs/performance.md."""
    parts = [HEADER + "\n".join(rows(results)), MFU]
    parts += [f"![{name}]({name}.png)" for name in images]
    parts += ["## What each row was made of", "\n".join(sources(results)) or "Nothing was measured."]
    if tables := "\n".join(variant_tables(results)):
        parts += ["## The training step by its settings", tables.rstrip()]
    if tables := "\n".join(kernel_tables(results)):
        parts += ["## Attention and the loss alone, forward and backward", tables.rstrip()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes the document and its plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="of the files read")
    parser.add_argument("--out", type=Path, default=DOCUMENTS, metavar="DIR", help="of what is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plots = {"performance": plot_peers, "performance-h200": plot_micro_batches}
    images = []
    for name, plot in plots.items():
        image = args.out / f"{name}.png"
        if plot(args.results, image):
            images.append(name)
        else:
            image.unlink(missing_ok=True)  # nothing stays that no file says any more
    path = args.out / "performance.md"
    path.write_text(document(args.results, images))
    print(path)


if __name__ == "__main__":
    main()
