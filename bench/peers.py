"""One update, alone or beside nanoGPT, transformers and llm.c: the same model, batch and tokens on the same machine.

    python bench/peers.py --case char --nanogpt DIR
    python bench/peers.py --case 124m --transformers
    python bench/peers.py --case llmc --llmc PROGRAM
    python bench/peers.py --config gpt2-124m --name peers-sweep --sweep micro_batch_size=8,16 model.loss_chunk=1024,0

Cases: `char` (nanoGPT's character model for CPUs), `char-gpu` (its model for GPUs, 16 sequences), `124m` (GPT-2 small,
2 sequences of 1,024 tokens), `llmc` (GPT-2 small, 4 sequences of 64 tokens, as llm.c's train_gpt2.c has them). Other
flags are those of training. nanoGPT and transformers run eagerly and compiled; llm.c is its built train_gpt2 for CPUs.
Each trainer has a process of its own (bench/trainers.py), and all take turns. The ratio is to the fastest.

--sweep changes one key at a time; --grid takes all combinations. A variant that does not fit is recorded as such, and
the file is written anew after each variant. MFU is (6 N + 12 L C T) × tokens/s over the dense bfloat16 peak of the chip
(gpt2_jax/metrics.py, gpt2_jax/hardware.py), and null if the peak is unknown or the dtype is another.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from record import Figures, Rows, arguments, duration, write
from trainers import TrainerError, measure, training_config

from gpt2_jax.errors import UserError

CASES = {
    "char": ["--config", "shakespeare-char-cpu"],
    "char-gpu": ["--config", "shakespeare-char", "--batch_size", "16", "--micro_batch_size", "0"],
    "124m": ["--config", "gpt2-124m", "--batch_size", "2", "--micro_batch_size", "0"],
    "llmc": ["--config", "gpt2-124m", "--batch_size", "4", "--micro_batch_size", "0", "--model.block_size", "64"],
}


def variants(sweeps: Mapping[str, Sequence[str]], grid: bool) -> list[dict[str, str]]:
    """The changes of each variant: none, then one key at a time; with `grid` all combinations."""
    if grid:
        return [dict(zip(sweeps, values, strict=True)) for values in itertools.product(*sweeps.values())]
    return [{}, *({key: value} for key, values in sweeps.items() for value in values)]


def describe(case: Figures) -> str:
    """A variant in words, with our figures."""
    name = " ".join(f"{key}={value}" for key, value in case["change"].items()) or "as configured"
    if "error" in case:
        return f"{name}: {case['error']}"
    ours = case["trainers"]["ours"]
    return (
        f"{name}: {ours['tokens_per_second']:,.0f} tokens/s, {duration(ours['median_s'])}, "
        f"{ours['peak_bytes'] / 2**30:.1f} GiB, first update {duration(ours['first_update_s'])}"
    )


def rows(figures: Figures) -> Rows:
    """The largest MFU of the variants; our time over that of each peer, run in its fastest way, and the reverse."""
    cases = [case for case in figures.get("cases", [figures]) if "trainers" in case]
    best = max(cases, key=lambda case: case["trainers"]["ours"].get("mfu") or 0.0)
    results: Rows = {}
    if mfu := best["trainers"]["ours"].get("mfu"):
        results["best MFU"] = mfu, describe(best)
    trainers = cases[0]["trainers"]
    for peer in ("nanogpt", "transformers", "llmc"):
        if ways := [name for name in trainers if name.startswith(peer)]:
            times = {name: trainers[name]["median_s"] for name in ("ours", *ways)}
            ratio, name = times["ours"] / min(times[way] for way in ways), " or ".join(ways)
            results[f"time over {name}"] = ratio, ", ".join(f"{way} {duration(times[way])}" for way in times)
            speeds = [f"{way} {trainers[way]['tokens_per_second']:,.0f} tokens/s" for way in times]
            results[f"tokens/s over {name}"] = 1 / ratio, ", ".join(speeds)
    return results


def main() -> None:
    """Measures, prints each variant and writes the file."""
    parser = arguments(__doc__, repeat=7)
    parser.add_argument("--case", choices=CASES, help="or --config, with --name")
    parser.add_argument("--nanogpt", metavar="DIR", help="checkout of nanoGPT")
    parser.add_argument("--transformers", action="store_true", help="GPT2LMHeadModel of transformers")
    parser.add_argument("--llmc", metavar="PROGRAM", help="llm.c's train_gpt2")
    parser.add_argument("--compile", choices=["both", "yes", "no"], default="both", help="whether torch compiles")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block of updates, at least")
    parser.add_argument("--updates", type=int, default=5, help="of a block, at least")
    parser.add_argument("--devices", type=int, default=1, help="of ours (1); 0 for all; a peer has one")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--grid", action="store_true", help="all combinations of the sweeps")
    parser.add_argument("--name", help="of the file: NAME-DEVICE; by default peers-CASE")
    args, extra = parser.parse_known_args()
    flags = CASES.get(args.case, []) + extra
    if "--config" not in flags or not (args.case or args.name):
        parser.error("type --case, or --config and --name")
    ways = {"both": ["", " compiled"], "yes": [" compiled"], "no": [""]}[args.compile]
    peers = ["nanogpt"] * bool(args.nanogpt) + ["transformers"] * args.transformers
    names = ["ours", *(peer + way for peer in peers for way in ways), *["llmc"] * bool(args.llmc)]
    sweeps = {key: values.split(",") for key, _, values in (word.partition("=") for word in args.sweep)}
    wanted = [
        (change, [*flags, *(f"--{key}={value}" for key, value in change.items())])
        for change in variants(sweeps, args.grid)
    ]
    try:
        for _, variant in wanted:
            training_config(variant)
    except UserError as error:
        parser.error(str(error))
    cases: list[Figures] = []
    device = ""
    for change, variant in wanted:
        try:
            cases.append({"change": change, "trainers": measure(names, variant, args, args.nanogpt, args.llmc)})
            device = cases[-1]["trainers"]["ours"]["device"]
        except TrainerError as error:
            cases.append({"change": change, "error": str(error)})
        print(describe(cases[-1]), flush=True)
        if device:
            figures = {"flags_of_training": flags, "complete": len(cases) == len(wanted), "cases": cases}
            write(args.name or f"peers-{args.case}", figures, rows(figures), args.results, device)
    if not device:
        raise SystemExit("error: nothing ran")


if __name__ == "__main__":
    main()
