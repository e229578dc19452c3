"""One update beside those of nanoGPT, transformers and llm.c: the same model, batch and tokens on the same machine.

    python bench/peers.py --case char --nanogpt DIR
    python bench/peers.py --case 124m --transformers

Cases: `char` (nanoGPT's character model for CPUs), `char-gpu` (its model for GPUs, 16 sequences), `124m` (GPT-2 small,
1,024 tokens; 2 sequences on CPUs). nanoGPT and transformers run eagerly and compiled. Each trainer has a process of its
own (bench/trainers.py), and all take turns. The ratio is to the fastest peer. llm.c takes no turns: its program runs
first, from start to end, and prints its own times. Other flags are those of training.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from record import arguments, gpu, slug, write
from trainers import Trainer, TrainerError, alternate, training_config, updates_for

from gpt2_jax.config import TrainConfig
from gpt2_jax.data.shards import header_bytes

CASES = {
    "char": ["--config", "shakespeare-char-cpu"],
    "char-gpu": ["--config", "shakespeare-char", "--model.dropout", "0.0", "--batch_size", "16"],
    "124m": ["--config", "gpt2-124m"],
}
LLMC_UPDATES = 30


def flags_of(case: str, batch: int | None, micro_batch: int | None, extra: list[str]) -> list[str]:
    """The flags of a training config. The batch is by default that of the case, for 124M on CPUs 2 sequences."""
    if case == "124m" and not batch:
        batch = max(micro_batch or 16, 16) if gpu() else 2
    sizes = {"--batch_size": batch, "--micro_batch_size": micro_batch or batch}
    return CASES[case] + [word for flag, size in sizes.items() if size for word in (flag, str(size))] + extra


def write_shard(path: Path, n_tokens: int, vocab_size: int) -> Path:
    """Writes random tokens in llm.c's format."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, n_tokens, dtype=np.uint16)
    path.write_bytes(header_bytes(n_tokens) + tokens.astype("<u2").tobytes())
    return path


def llmc(directory: Path, config: TrainConfig) -> dict[str, Any]:
    """Runs llm.c's `train_gpt2cu`, which the user has built, over random tokens: seconds per update as it prints them.

    The first update, which warms up, is not counted.
    """
    shape, batch = config.model, config.batch_size
    with tempfile.TemporaryDirectory() as temporary:
        shard = write_shard(Path(temporary) / "random_000.bin", (batch * shape.block_size + 1) * 8, shape.vocab_size)
        command = [str(directory / "train_gpt2cu"), "-i", str(shard), "-j", str(shard), "-e", f"d{shape.n_layer}",
                   "-b", str(config.micro_batch_size or batch), "-t", str(shape.block_size),
                   "-d", str(batch * shape.block_size), "-r", "0", "-x", str(LLMC_UPDATES), "-v", "1000000",
                   "-s", "1000000", "-m", "1"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    printed = re.findall(r"^step +\d+/\d+ .*?\| ([\d.]+) ms \|", done.stdout, re.MULTILINE)
    seconds = [float(ms) / 1000 for ms in printed][1:]
    if done.returncode or not seconds:
        return {"command": command[1:], "error": (done.stderr or done.stdout)[-500:]}
    return {"command": command[1:], "seconds_per_update": seconds,
            "tokens_per_second": batch * shape.block_size / statistics.median(seconds)}  # fmt: skip


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = arguments(__doc__)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--nanogpt", metavar="DIR", default="", help="checkout of nanoGPT")
    parser.add_argument("--transformers", action="store_true", help="also GPT2LMHeadModel of transformers")
    parser.add_argument("--llmc", type=Path, metavar="DIR", help="checkout of llm.c with a built train_gpt2cu")
    parser.add_argument("--batch", type=int, help="sequences per update")
    parser.add_argument("--micro-batch", type=int, help="sequences at a time; by default all")
    parser.add_argument("--compile", choices=["both", "yes", "no"], default="both", help="whether torch compiles")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block, at least")
    parser.add_argument("--updates", type=int, default=5, help="of a block, at least")
    args, extra = parser.parse_known_args()

    flags = flags_of(args.case, args.batch, args.micro_batch, extra)
    compiles = {"both": [False, True], "yes": [True], "no": [False]}[args.compile]
    sides: list[tuple[str, dict[str, Any]]] = [("ours", {})]
    if args.nanogpt:
        sides += [("nanogpt", {"nanogpt": args.nanogpt, "compile": compile}) for compile in compiles]
    if args.transformers:
        sides += [("transformers", {"compile": compile}) for compile in compiles]
    if len(sides) == 1 and not args.llmc:
        parser.error("no peer; type --nanogpt DIR, --transformers or --llmc DIR")

    outside = {"llm.c": llmc(args.llmc, training_config(flags))} if args.llmc else {}
    with ExitStack() as stack:
        try:
            trainers = [stack.enter_context(Trainer(side, flags, **settings)) for side, settings in sides]
            blocks = [updates_for(trainer, args.seconds, args.updates) for trainer in trainers]
            runs = alternate(trainers, blocks, args.repeat)
            last = {trainer.name: trainer.run(1) for trainer in trainers}
        except TrainerError as error:
            raise SystemExit(str(error)) from error

    about = {trainer.name: trainer.about for trainer in trainers}
    tokens, device = about["ours"]["tokens"], about["ours"]["device"]
    times = {name: statistics.median(seconds) for name, seconds in runs.items()}
    times |= {name: statistics.median(one["seconds_per_update"]) for name, one in outside.items() if "error" not in one}
    ours = times["ours"]
    print(f"{'':24} {'ms/update':>10} {'tokens/s':>12} {'peak MiB':>9} {'first, s':>9} {'ours/it':>8}")
    for name, seconds in times.items():
        peak = f"{last[name]['peak_bytes'] / 2**20:9.0f}" if name in last else f"{'':9}"
        first = f"{about[name]['first_update_s']:9.1f}" if name in about else f"{'':9}"
        print(f"{name:24} {1000 * seconds:10.1f} {tokens / seconds:12,.0f} {peak} {first} {ours / seconds:8.3f}")
    for name, one in outside.items():
        if "error" in one:
            print(f"{name}: {one['error']}")
    peer = min((name for name in times if name != "ours"), key=times.__getitem__, default=None)
    figures = {
        "case": args.case,
        "flags_of_training": flags,
        "tokens_per_update": tokens,
        "fastest_peer": peer,
        "ratio": ours / times[peer] if peer else None,
        "updates_per_block": dict(zip(about, blocks, strict=True)),
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
    }
    print(write(f"peers-{args.case}-{slug(device)}", figures, results=args.results, device=device))


if __name__ == "__main__":
    main()
