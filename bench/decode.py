"""Generation beside `generate` of transformers with its KV cache: tokens per second and time to the first token.

    python bench/decode.py [--model DIR_OR_HUB_NAME]

Both have the same weights (random ones by default), get the same prompts and write greedily. In float32 they must write
the same tokens. They take turns in one process; compilation and first allocations are not counted.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from record import Figures, Rows, arguments, median_of, take_turns, write
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_jax import load
from gpt2_jax.generation import LanguageModel, Sampling, stream

Timed = tuple[float, float, np.ndarray]  # seconds to the first token and to the last, and the tokens
GREEDY = Sampling(temperature=0.0)


def ours(gpt2: LanguageModel, prompts: list[list[int]], n_tokens: int) -> Timed:
    """Times our generation."""
    start = time.perf_counter()
    chunks = stream(gpt2.model, gpt2.params, prompts, n_tokens, GREEDY)
    first = next(chunks)
    to_first = time.perf_counter() - start
    tokens = np.concatenate([first, *chunks], axis=1)
    return to_first, time.perf_counter() - start, tokens


def theirs(model: Any, prompts: list[list[int]], n_tokens: int) -> Timed:
    """Times transformers. `generate` returns only at the end, so a call for one token times the first."""
    ids = torch.tensor(prompts, device=model.device)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def call(n: int) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        tokens = model.generate(ids, max_new_tokens=n, min_new_tokens=n, **settings)[:, ids.shape[1] :].cpu().numpy()
        return time.perf_counter() - start, tokens

    return call(1)[0], *call(n_tokens)


def rows(figures: Figures) -> Rows:
    """The smallest ratio for up to eight prompts."""
    cases = [case for case in figures["cases"] if case["batch"] <= 8]
    ratios = ", ".join(f"{case['speed_ratio']:.2f} ({case['batch']} × {case['prompt']})" for case in cases)
    first = ", ".join(f"{case['first_token_ratio']:.2f}" for case in cases)
    details = f"by prompts × their tokens {ratios}; time to the first token over that of transformers {first}"
    return {"tokens/s over transformers": (min(case["speed_ratio"] for case in cases), details)}


def main() -> None:
    """Measures and writes the file."""
    parser = arguments(__doc__, repeat=5)
    parser.add_argument("--model", default="", help="directory or hub name; by default random weights of 124M's shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts")
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 100], help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if not args.model:
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
        source = args.model or directory
        peer = GPT2LMHeadModel.from_pretrained(source, dtype=getattr(torch, args.dtype)).eval()
        gpt2 = load(source, dtype=jnp.dtype(args.dtype))
    if torch.cuda.is_available():
        peer = peer.cuda()

    cases: list[Figures] = []
    for batch, length in itertools.product(args.batch, args.prompt):
        prompts = np.random.default_rng(length).integers(0, 50257, (batch, length)).tolist()
        actions = {
            "ours": functools.partial(ours, gpt2, prompts, args.new),
            "transformers": functools.partial(theirs, peer, prompts, args.new),
        }
        turns = take_turns(actions, args.repeat)
        if args.dtype == "float32" and not np.array_equal(turns["ours"][0][2], turns["transformers"][0][2]):
            raise SystemExit("error: the two wrote different tokens, so their speeds cannot be compared")
        runs = {
            name: [{"first_s": first, "tokens_per_second": batch * args.new / total} for first, total, _ in results]
            for name, results in turns.items()
        }
        speed, first = (
            median_of(runs["ours"], key) / median_of(runs["transformers"], key)
            for key in ("tokens_per_second", "first_s")
        )
        shape = {"batch": batch, "prompt": length, "new": args.new}
        cases.append({**shape, "speed_ratio": speed, "first_token_ratio": first, "runs": runs})
    model, threads = args.model or "124M, random weights", torch.get_num_threads()
    figures = {"model": model, "dtype": args.dtype, "torch_threads": threads, "cases": cases}
    write("decode", figures, rows(figures), args.results)


if __name__ == "__main__":
    main()
