"""Generation beside `generate` of transformers with its KV cache: tokens per second and time to the first token.

    python bench/decode.py [--model DIR_OR_HUB_NAME]

Both have the same weights (random ones by default), get the same prompts and write greedily. In float32 they must write
the same tokens. They take turns in one process; compilation and first allocations are not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from record import arguments, median_ratio, slug, write
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


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="", help="directory or hub name; by default random weights of 124M's shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts")
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 100], help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--repeat", type=int, default=5)
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

    cases = []
    print("batch prompt       ours  transformers  ratio  first: ours   theirs")
    for batch in args.batch:
        for length in args.prompt:
            prompts = np.random.default_rng(length).integers(0, 50257, (batch, length)).tolist()
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
            for repetition in range(args.repeat + 1):  # the first warms up
                results = {"ours": ours(gpt2, prompts, args.new), "transformers": theirs(peer, prompts, args.new)}
                if args.dtype == "float32" and not np.array_equal(results["ours"][2], results["transformers"][2]):
                    raise SystemExit("error: the two wrote different tokens, so their speeds cannot be compared")
                for name, (to_first, total, _) in results.items():
                    if repetition:
                        runs[name].append({"first_s": to_first, "tokens_per_second": batch * args.new / total})
            speeds, firsts = (
                [[run[key] for run in runs[name]] for name in runs] for key in ("tokens_per_second", "first_s")
            )
            case = {"batch": batch, "prompt": length, "new": args.new, "speed_ratio": median_ratio(*speeds),
                    "first_token_ratio": median_ratio(*firsts), "runs": runs}  # fmt: skip
            cases.append(case)
            (one, two), (first, second) = map(statistics.median, speeds), map(statistics.median, firsts)
            print(f"{batch:5} {length:6} {one:8.1f}/s {two:11.1f}/s {case['speed_ratio']:6.2f} {1000 * first:9.0f} ms "
                  f"{1000 * second:5.0f} ms", flush=True)  # fmt: skip
    figures = {
        "model": args.model or "124M, random weights",
        "dtype": args.dtype,
        "torch_threads": torch.get_num_threads(),
        "cases": cases,
    }
    print(write(f"decode-{slug(jax.devices()[0].device_kind)}", figures, results=args.results))


if __name__ == "__main__":
    main()
