"""One update beside nanoGPT's, `transformers`' and llm.c's: the same model, batch and tokens on the same machine.

    python bench/peers.py --case char --nanogpt DIR
    python bench/peers.py --case 124m --transformers

Cases: `char` (nanoGPT's character model for CPUs), `char-gpu` (its one for GPUs, 16 sequences), `124m` (GPT-2 small,
1,024 tokens; on CPUs 2 sequences). nanoGPT and `transformers` run eagerly and compiled, each trainer in its process
(bench/trainers.py), all alternating in blocks; the fastest is what the ratio is to. With several --micro-batch each
trainer runs with the one that is fastest for it. llm.c is not one of them: its program runs from start to end, before
the others, and reports its own times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from record import arguments, gpu, slug, write
from sides import training_config
from trainers import Trainer, TrainerError, alternate, median_time, updates_for

from gpt2_jax.config import TrainConfig
from gpt2_jax.data.shards import header_bytes

CASES = {
    "char": ["--config", "shakespeare-char-cpu"],
    "char-gpu": ["--config", "shakespeare-char", "--model.dropout", "0.0", "--batch_size", "16"],
    "124m": ["--config", "gpt2-124m"],
}
LLMC_UPDATES = 30


def flags_of(case: str, batch: int | None, micro_batch: int | None, extra: list[str]) -> list[str]:
    """The flags of a training config; by default the batch of the case, on CPUs 2 sequences of 124M."""
    if case == "124m" and not batch:
        batch = max(micro_batch or 16, 16) if gpu() else 2
    sizes = {"--batch_size": batch, "--micro_batch_size": micro_batch or batch}
    return CASES[case] + [word for flag, size in sizes.items() if size for word in (flag, str(size))] + extra


def fastest(side: str, choices: list[list[str]], tried: list[dict[str, Any]], **settings: Any) -> list[str]:
    """The flags with which a side is fastest, each tried alone; what was tried is added to `tried`."""
    if len(choices) == 1:
        return choices[0]
    times: list[float] = []
    for flags in choices:
        name = side + (" compiled" if settings.get("compile") else "")
        try:
            with Trainer(side, flags, **settings) as trainer:
                trainer.run(2)
                times.append(trainer.run(5)["seconds"] / 5)
                tried.append({"trainer": name, "flags": flags, **trainer.about, "seconds_per_update": times[-1]})
        except TrainerError as error:
            print(f"{name}, {' '.join(flags)}: {error}", flush=True)
            tried.append({"trainer": name, "flags": flags, "error": str(error)})
            times.append(float("inf"))
    return choices[int(np.argmin(times))]


def write_shard(path: Path, n_tokens: int, vocab_size: int) -> Path:
    """Random tokens in a file as llm.c reads it."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, n_tokens, dtype=np.uint16)
    path.write_bytes(header_bytes(n_tokens) + tokens.astype("<u2").tobytes())
    return path


def read_llmc(output: str) -> list[float]:
    """Seconds of each update that llm.c's trainer printed, without the first, which warms up."""
    return [float(ms) / 1000 for ms in re.findall(r"^step +\d+/\d+ .*?\| ([\d.]+) ms \|", output, re.MULTILINE)][1:]


def llmc(directory: Path, config: TrainConfig) -> dict[str, Any]:
    """llm.c's `train_gpt2cu`, built by the user, over random tokens: seconds per update as it prints them."""
    shape, batch = config.model, config.batch_size
    micro = config.micro_batch_size or batch
    with tempfile.TemporaryDirectory() as temporary:
        shard = write_shard(Path(temporary) / "random_000.bin", (batch * shape.block_size + 1) * 8, shape.vocab_size)
        command = [str(directory / "train_gpt2cu"), "-i", str(shard), "-j", str(shard), "-e", f"d{shape.n_layer}",
                   "-b", str(micro), "-t", str(shape.block_size), "-d", str(batch * shape.block_size), "-r", "0",
                   "-x", str(LLMC_UPDATES), "-v", "1000000", "-s", "1000000", "-m", "1"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    seconds = read_llmc(done.stdout)
    if done.returncode or not seconds:
        return {"command": command[1:], "error": (done.stderr or done.stdout)[-500:]}
    return {"command": command[1:], "seconds_per_update": seconds,
            "tokens_per_second": batch * shape.block_size / statistics.median(seconds)}  # fmt: skip


def main() -> None:
    """Measures, and writes the table and the file."""
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--nanogpt", metavar="DIR", default="", help="checkout of nanoGPT")
    parser.add_argument("--transformers", action="store_true", help="also transformers' GPT2LMHeadModel")
    parser.add_argument("--llmc", type=Path, metavar="DIR", help="checkout of llm.c with a built train_gpt2cu")
    parser.add_argument("--batch", type=int, help="sequences per update")
    parser.add_argument(
        "--micro-batch", type=int, nargs="+", default=[None], help="sequences at a time; several: the best"
    )
    parser.add_argument("--compile", choices=["both", "yes", "no"], default="both", help="whether torch does")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block, at least")
    parser.add_argument("--updates", type=int, default=5, help="of a block, at least")
    parser.add_argument("--name", default="peers", help="of the file: NAME-CASE-DEVICE")
    args, extra = parser.parse_known_args()

    choices = [flags_of(args.case, args.batch, micro, extra) for micro in args.micro_batch]
    compiles = {"both": [False, True], "yes": [True], "no": [False]}[args.compile]
    sides: list[tuple[str, dict[str, Any]]] = [("ours", {})]
    if args.nanogpt:
        sides += [("nanogpt", {"nanogpt": args.nanogpt, "compile": compile}) for compile in compiles]
    if args.transformers:
        sides += [("transformers", {"compile": compile}) for compile in compiles]
    if len(sides) == 1 and not args.llmc:
        parser.error("nobody to compare with; give --nanogpt DIR, --transformers or --llmc DIR")

    outside = {}
    if args.llmc:
        parsed = [training_config(flags) for flags in choices]
        measured = [llmc(args.llmc, config) for config in parsed]
        outside["llm.c"] = max(measured, key=lambda figures: figures.get("tokens_per_second", 0.0))

    tried: list[dict[str, Any]] = []
    about: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        trainers = []
        try:
            for side, settings in sides:
                flags = fastest(side, choices, tried, **settings)
                trainers.append(stack.enter_context(Trainer(side, flags, **settings)))
                about[trainers[-1].name] = {"flags_of_training": flags, **trainers[-1].about}
            blocks = [updates_for(trainer, args.seconds, args.updates) for trainer in trainers]
            runs = alternate(trainers, blocks, args.repeat)
            last = {trainer.name: trainer.run(1) for trainer in trainers}
        except TrainerError as error:
            raise SystemExit(f"{error.trainer}: {error}") from error

    ours = median_time(runs, "ours")
    tokens = about["ours"]["tokens"]
    times = {name: median_time(runs, name) for name in runs}
    times |= {name: statistics.median(figures["seconds_per_update"]) for name, figures in outside.items()
              if "error" not in figures}  # fmt: skip
    print(f"{'':24} {'ms/update':>10} {'tokens/s':>12} {'peak MiB':>9} {'first, s':>9} {'ours/it':>8}")
    for name, seconds in times.items():
        peak = f"{last[name]['peak_bytes'] / 2**20:9.0f}" if name in last else f"{'':9}"
        first = f"{about[name]['first_update_s']:9.1f}" if name in about else f"{'':9}"
        print(f"{name:24} {1000 * seconds:10.1f} {tokens / seconds:12,.0f} {peak} {first} {ours / seconds:8.3f}")
    others = {name: seconds for name, seconds in times.items() if name != "ours"}
    peer = min(others, key=others.__getitem__) if others else None
    packages = [name for name in ("jax", "jaxlib", "flax", "torch", "transformers", "numpy") if installed(name)]
    figures = {
        "case": args.case,
        "tokens_per_update": tokens,
        "fastest_peer": peer,
        "ratio": ours / others[peer] if peer else None,
        "updates_per_block": {trainer.name: block for trainer, block in zip(trainers, blocks, strict=True)},
        "trainers": {
            name: {
                **about[name],
                "loss": last[name]["loss"],
                "peak_bytes": last[name]["peak_bytes"],
                "median_s": times[name],
                "tokens_per_second": tokens / times[name],
                "ours_over_it": ours / times[name],
                "seconds_per_update": runs[name],
            }
            for name in runs
        },
        "not_alternating": outside,
        "tried": tried,
    }
    device = about["ours"]["device"]
    print(write(f"{args.name}-{args.case}-{slug(device)}", packages, figures, results=args.results, device=device))


def installed(name: str) -> bool:
    """Whether a package is."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
