"""One update beside those of nanoGPT and transformers: the same model, batch and tokens on the same machine.

    python bench/peers.py --case char --nanogpt DIR
    python bench/peers.py --case 124m --transformers

Cases: `char` (nanoGPT's character model for CPUs), `char-gpu` (its model for GPUs, 16 sequences), `124m` (GPT-2 small,
2 sequences of 1,024 tokens). nanoGPT and transformers run eagerly and compiled. Each trainer has a process of its own
(bench/trainers.py), and all take turns. The ratio is to the fastest. Other flags are those of training.
"""

from __future__ import annotations

from record import Figures, Rows, duration, write
from trainers import TrainerError, block_arguments, measure

CASES = {
    "char": ["--config", "shakespeare-char-cpu"],
    "char-gpu": ["--config", "shakespeare-char", "--batch_size", "16", "--micro_batch_size", "0"],
    "124m": ["--config", "gpt2-124m", "--batch_size", "2", "--micro_batch_size", "0"],
}


def rows(figures: Figures) -> Rows:
    """Our time over that of each peer, run in its fastest way, and our speed over its speed."""
    times = {name: trainer["median_s"] for name, trainer in figures["trainers"].items()}
    tokens = figures["tokens_per_update"]
    results: Rows = {}
    for peer in ("nanogpt", "transformers"):
        if ways := [name for name in times if name.startswith(peer)]:
            ratio, name = times["ours"] / min(times[way] for way in ways), " or ".join(ways)
            seconds = ", ".join(f"{way} {duration(times[way])}" for way in ("ours", *ways))
            speeds = ", ".join(f"{way} {tokens / times[way]:,.0f} tokens/s" for way in ("ours", *ways))
            results[f"time over {name}"] = (ratio, seconds)
            results[f"tokens/s over {name}"] = (1 / ratio, speeds)
    return results


def main() -> None:
    """Measures and writes the file."""
    parser = block_arguments(__doc__, repeat=7)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--nanogpt", metavar="DIR", help="checkout of nanoGPT")
    parser.add_argument("--transformers", action="store_true", help="GPT2LMHeadModel of transformers")
    parser.add_argument("--compile", choices=["both", "yes", "no"], default="both", help="whether torch compiles")
    args, extra = parser.parse_known_args()
    peers = ["nanogpt"] * bool(args.nanogpt) + ["transformers"] * args.transformers
    if not peers:
        parser.error("no peer; type --nanogpt DIR or --transformers")
    ways = {"both": ["", " compiled"], "yes": [" compiled"], "no": [""]}[args.compile]
    flags = CASES[args.case] + extra
    names = ["ours", *(peer + way for peer in peers for way in ways)]
    try:
        measured = measure(names, flags, args, args.nanogpt)
    except TrainerError as error:
        raise SystemExit(str(error)) from error
    tokens, device = measured["ours"]["tokens"], measured["ours"]["device"]
    figures = {"case": args.case, "flags_of_training": flags, "tokens_per_update": tokens, "trainers": measured}
    write(f"peers-{args.case}", figures, rows(figures), args.results, device)


if __name__ == "__main__":
    main()
