"""Generation beside other programs: tokens per second and time to the first token.

    python bench/decode.py [--model DIR_OR_HUB_NAME]
    python bench/decode.py --peers

The first compares with `generate` of transformers, for one prompt and for eight. --peers compares with all of
transformers, CTranslate2 (float32 and int8) and llama.cpp (float32 and q8_0) that is installed, for one prompt, and
shows our own bfloat16. All have the same weights (random ones by default), get the same prompts and write greedily. In
float32 they must write the same tokens. Each has a process of its own (bench/decoders.py), and all take turns;
compilation and first allocations are not counted.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import tempfile

import numpy as np
from decoders import DecoderError, cores, installed, start_all
from record import Figures, Rows, arguments, median_of, output, take_turns, write

from gpt2_jax.convert import convert

SPEED, FIRST = "tokens_per_second", "first_s"


def rows(figures: Figures) -> Rows:
    """Beside transformers, the smallest ratio for up to eight prompts. With --peers, a ratio for each of them."""
    cases = [case for case in figures["cases"] if case["batch"] <= 8]
    if "peers" in figures:
        return peer_rows(cases[0]["runs"])
    ratios = ", ".join(f"{case['speed_ratio']:.2f} ({case['batch']} × {case['prompt']})" for case in cases)
    first = ", ".join(f"{case['first_token_ratio']:.2f}" for case in cases)
    details = f"by prompts × their tokens {ratios}; time to the first token over that of transformers {first}"
    return {"tokens/s over transformers": (min(case["speed_ratio"] for case in cases), details)}


def peer_rows(runs: dict[str, list[dict[str, float]]]) -> Rows:
    """Our float32 tokens/s over those of each, with the median and the range of the repetitions."""
    results: Rows = {}
    (ours, *peers), speeds = runs, {name: [run[SPEED] for run in of] for name, of in runs.items()}
    for peer in peers:
        ratio = statistics.median(speeds[ours]) / statistics.median(speeds[peer])
        shown = [
            f"{name} {statistics.median(speeds[name]):.1f} ({min(speeds[name]):.1f} to {max(speeds[name]):.1f})"
            for name in (ours, peer)
        ]
        results[f"tokens/s over {peer}"] = ratio, f"tokens/s: {', '.join(shown)}"
    return results


def main() -> None:
    """Measures and writes the file."""
    parser = arguments(__doc__, repeat=5)
    parser.add_argument("--model", default="", help="directory or hub name; by default random weights of 124M's shape")
    parser.add_argument("--peers", action="store_true", help="all peers that are installed, not only transformers")
    parser.add_argument("--batch", type=int, nargs="+", help="prompts (1 and 8; with --peers 1)")
    parser.add_argument("--prompt", type=int, nargs="+", help="tokens in each prompt (64 and 100; with --peers 64)")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="without --peers")
    args = parser.parse_args()
    names = [f"{name} {args.dtype}" for name in ("ours", "transformers")]
    if args.peers:
        names = ["ours float32", "ours bfloat16", *installed()]
    batches, lengths = args.batch or ([1] if args.peers else [1, 8]), args.prompt or ([64] if args.peers else [64, 100])
    cases: list[Figures] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.model or random_model(scratch)
        if args.peers:  # they need a directory with the tokenizer
            directory = str(convert(directory, "huggingface", f"{scratch}/model"))
        with start_all(names, directory) as decoders:
            for batch, length in itertools.product(batches, lengths):
                prompts = np.random.default_rng(length).integers(0, 50257, (batch, length)).tolist()
                actions = {name: functools.partial(decode, prompts, args.new) for name, decode in decoders.items()}
                turns = take_turns(actions, args.repeat)
                exact = [name for name in names if name.endswith("float32")]
                texts = {name: turns[name][0][2] for name in exact}
                if wrong := [name for name in exact[1:] if not np.array_equal(texts[name], texts[exact[0]])]:
                    raise SystemExit(f"error: {', '.join(wrong)} wrote other tokens, so the speeds cannot be compared")
                runs = {
                    name.removesuffix("" if args.peers else f" {args.dtype}"): [
                        {FIRST: first, SPEED: batch * args.new / total} for first, total, _ in results
                    ]
                    for name, results in turns.items()
                }
                case: Figures = {"batch": batch, "prompt": length, "new": args.new, "runs": runs}
                if not args.peers:
                    ours, peer = runs["ours"], runs["transformers"]
                    case["speed_ratio"] = median_of(ours, SPEED) / median_of(peer, SPEED)
                    case["first_token_ratio"] = median_of(ours, FIRST) / median_of(peer, FIRST)
                cases.append(case)
    figures: Figures = {"model": args.model or "124M, random weights", "threads": cores(), "cases": cases}
    figures |= {"peers": names[1:], "llama.cpp": llama_cpp_build()} if args.peers else {"dtype": args.dtype}
    write("decode-peers" if args.peers else "decode", figures, rows(figures), args.results)


def llama_cpp_build() -> str:
    """The instructions that llama.cpp was compiled with and uses; "" if it is not installed."""
    code = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    return output(sys.executable, "-c", code)


def random_model(directory: str) -> str:
    """Writes random weights of 124M's shape, as transformers makes them. Their tokenizer is GPT-2's."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(f"{directory}/random")
    return f"{directory}/random"


if __name__ == "__main__":
    try:
        main()
    except DecoderError as error:
        raise SystemExit(f"error: {error}") from error
