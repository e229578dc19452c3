"""Generation beside `transformers`' `generate` with its KV cache: tokens per second and time to the first token.

    python bench/decode.py [--model DIR_OR_HUB_NAME]

Both have the same weights (random ones by default), take the same prompts, write greedily, and have to write the same
tokens. They alternate in one process; what is compiled or allocated at first is not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from record import arguments, median_ratio, slug, write
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_jax import load
from gpt2_jax.generation.decode import stream
from gpt2_jax.generation.sampling import GREEDY

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")


def ours(model, params, prompts, n_tokens):
    """Seconds to the first token and to the last, and the tokens."""
    start = time.perf_counter()
    chunks = stream(model, params, prompts, n_tokens, sampling=GREEDY)
    first = next(chunks)
    to_first = time.perf_counter() - start
    tokens = np.concatenate([first, *chunks], axis=1)
    return to_first, time.perf_counter() - start, tokens


def theirs(model, prompts, n_tokens):
    """The same. `generate` says nothing on the way: the first token is timed by a call that asks for one."""
    ids = torch.tensor(prompts, device=model.device)

    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def call(n):
        start = time.perf_counter()
        tokens = model.generate(ids, max_new_tokens=n, min_new_tokens=n, **settings)[:, ids.shape[1] :].cpu().numpy()
        return time.perf_counter() - start, tokens

    to_first, _ = call(1)
    total, tokens = call(n_tokens)
    return to_first, total, tokens


def main():
    """Measures and writes the table and the file."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--model", default="", help="directory or hub name; by default random weights of the 124M shape"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 100], help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--name", default="decode", help="of the file in bench/results")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        source = args.model
        if not source:
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
            source = directory
        torch_model = GPT2LMHeadModel.from_pretrained(source, dtype=getattr(torch, args.dtype)).eval()
        model, params = load(source, dtype=jnp.dtype(args.dtype))
    if torch.cuda.is_available():
        torch_model = torch_model.cuda()

    cases = []
    print(
        f"{'batch':>5} {'prompt':>6} {'ours':>10} {'transformers':>13} {'ratio':>6} {'first: ours':>12} {'theirs':>8}"
    )
    for batch in args.batch:
        for length in args.prompt:
            prompts = np.random.default_rng(length).integers(0, 50257, (batch, length)).tolist()
            runs = {"ours": [], "transformers": []}
            for repetition in range(args.repeat + 1):  # the first warms up
                results = {
                    "ours": ours(model, params, prompts, args.new),
                    "transformers": theirs(torch_model, prompts, args.new),
                }
                if args.dtype == "float32" and not np.array_equal(results["ours"][2], results["transformers"][2]):
                    raise SystemExit("the two do not write the same tokens: the comparison is worth nothing")
                if repetition:
                    for name, (to_first, total, _) in results.items():
                        runs[name].append({"first_s": to_first, "tokens_per_second": batch * args.new / total})
            speeds = [[run["tokens_per_second"] for run in runs[name]] for name in ("ours", "transformers")]
            firsts = [[run["first_s"] for run in runs[name]] for name in ("ours", "transformers")]
            case = {
                "batch": batch,
                "prompt": length,
                "new": args.new,
                "speed_ratio": median_ratio(*speeds),
                "first_token_ratio": median_ratio(*firsts),
                "runs": runs,
            }
            cases.append(case)
            ours_speed, their_speed = map(statistics.median, speeds)
            ours_first, their_first = (1000 * statistics.median(values) for values in firsts)
            print(
                f"{batch:5} {length:6} {ours_speed:8.1f}/s {their_speed:11.1f}/s {case['speed_ratio']:6.2f} "
                f"{ours_first:9.0f} ms {their_first:5.0f} ms",
                flush=True,
            )
    figures = {
        "model": args.model or "124M, random weights",
        "dtype": args.dtype,
        "torch_threads": torch.get_num_threads(),
        "cases": cases,
    }
    name = f"{args.name}-{slug(jax.devices()[0].device_kind)}"
    print(write(name, PACKAGES, figures, results=args.results))


if __name__ == "__main__":
    main()
