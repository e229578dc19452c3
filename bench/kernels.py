"""Attention and the loss alone, forward and backward: what training has beside tokamax's, where that can be imported.

    python bench/kernels.py [--batch 16 --time 1024 --dtype bfloat16]

tokamax (openxla/tokamax) is no package of this project: it wants typeguard 2, and tyro, which reads our command lines,
wants 4. So it goes to a place of its own: `pip install --target DIR tokamax`, then PYTHONPATH=DIR.

Shapes are of 124M. The candidates take turns; one of tokamax's that the device cannot run has its reason instead of
figures. Errors are of the output and of all gradients, against JAX's attention and Optax's cross-entropy in float32,
each relative to its norm; the largest counts.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from record import arguments, slug, write

from gpt2_jax.attention import PREFERENCE, causal_attention, unsupported_reason
from gpt2_jax.config import GPT2Config
from gpt2_jax.hardware import hardware_of
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import padded_vocab_size

try:
    import tokamax
    from absl import flags
except ImportError:
    tokamax = None
else:
    flags.FLAGS(sys.argv[:1])  # or it would read our flags as its own

PACKAGES = ("jax", "jaxlib", "optax")
CHUNKS = (0, 1024, 4096)  # of our loss: tokens whose logits exist together
SHAPE = GPT2Config()

Function = Callable[..., jax.Array]


def with_gradients(function: Function) -> Callable[..., tuple[jax.Array, ...]]:
    """The jitted (cotangent, *inputs) -> (output, *gradients)."""

    @jax.jit
    def run(cotangent: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        output, pullback = jax.vjp(function, *inputs)
        return output, *pullback(cotangent.astype(output.dtype))

    return run


def compare(
    candidates: Mapping[str, Function], exact: Function, inputs: list[jax.Array], cotangent: jax.Array, repeat: int
) -> dict[str, Any]:
    """Milliseconds and largest relative error of each candidate."""
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in inputs]
        right = [np.asarray(x) for x in with_gradients(exact)(cotangent, *wide)]
    runs: dict[str, Callable[..., tuple[jax.Array, ...]]] = {}
    figures: dict[str, Any] = {}
    for name, function in candidates.items():
        run = with_gradients(function)
        try:
            values = [np.asarray(x, np.float32) for x in jax.block_until_ready(run(cotangent, *inputs))]
        except Exception as error:  # whatever one of tokamax's kernels has against a device or a shape
            if not name.startswith("tokamax"):
                raise
            figures[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        errors = [float(np.linalg.norm(value - x) / np.linalg.norm(x)) for value, x in zip(values, right, strict=True)]
        runs[name], figures[name] = run, {"error_of_values": max(errors), "ms": []}
    for _ in range(repeat):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(cotangent, *inputs))
            figures[name]["ms"].append(1000 * (time.perf_counter() - start))
    for name in runs:
        figures[name]["median_ms"] = statistics.median(figures[name]["ms"])
    return figures


def attention(batch: int, length: int, dtype: Any, repeat: int) -> dict[str, Any]:
    """Of all our backends that run here, and tokamax's."""
    head_dim = SHAPE.n_embd // SHAPE.n_head
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, cotangent = (jax.random.normal(key, (batch, length, SHAPE.n_head, head_dim), dtype) for key in keys)
    hardware = hardware_of(jax.local_devices()[0])

    def ours(backend: Any) -> Function:
        return lambda q, k, v: causal_attention(q, k, v, backend=backend)

    candidates = {
        backend: ours(backend)
        for backend in PREFERENCE
        if not unsupported_reason(backend, hardware=hardware, dtype=dtype, time=length, head_dim=head_dim, dropout=0.0)
    }
    if tokamax:
        kernels = {"cuda": ("triton", "mosaic_gpu"), "tpu": ("mosaic_tpu",)}.get(hardware.platform, ())
        for name in ("xla", "xla_chunked", *kernels):
            candidates[f"tokamax {name}"] = lambda q, k, v, name=name: tokamax.dot_product_attention(
                q, k, v, is_causal=True, implementation=name
            )
    exact = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    return compare(candidates, exact, inputs, cotangent, repeat)


def loss(batch: int, length: int, dtype: Any, repeat: int) -> dict[str, Any]:
    """Of ours by chunks, and tokamax's, which gets the embedding transposed, in `dtype` and without padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch, length, SHAPE.n_embd), dtype)
    embedding = 0.02 * jax.random.normal(keys[1], (padded_vocab_size(SHAPE), SHAPE.n_embd))
    targets = jax.random.randint(keys[2], (batch, length), 0, SHAPE.vocab_size)
    vocabulary = SHAPE.vocab_size

    def ours(chunk: int) -> Function:
        return lambda hidden, embedding: cross_entropy(hidden, embedding, targets, vocabulary, chunk)

    def theirs(hidden: jax.Array, embedding: jax.Array, implementation: str) -> jax.Array:
        flat, weights = hidden.reshape(-1, SHAPE.n_embd), embedding[:vocabulary].T.astype(hidden.dtype)
        total: jax.Array = tokamax.linear_softmax_cross_entropy_loss(
            flat, targets.reshape(-1), weights, implementation=implementation
        )
        return total

    candidates: dict[str, Function] = {f"chunks of {chunk or 'all'}": ours(chunk) for chunk in CHUNKS}
    if tokamax:
        platform = hardware_of(jax.local_devices()[0]).platform
        for name in ("xla", "mosaic_tpu") if platform == "tpu" else ("xla",):
            candidates[f"tokamax {name}"] = lambda hidden, embedding, name=name: theirs(hidden, embedding, name)

    def exact(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        logits = hidden @ embedding[:vocabulary].T
        return jnp.sum(optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets))

    return compare(candidates, exact, [hidden, embedding], jnp.ones(()), repeat)


def main() -> None:
    """Measures, and writes the table and the file."""
    parts = {"attention": attention, "loss": loss}
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--time", type=int, default=SHAPE.block_size, help="tokens of each")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    figures = {name: parts[name](args.batch, args.time, jnp.dtype(args.dtype), args.repeat) for name in args.parts}
    for name, candidates in figures.items():
        for candidate, figure in candidates.items():
            said = figure.get("error") or f"{figure['median_ms']:9.2f} ms   error {figure['error_of_values']:.1e}"
            print(f"{name:10}{candidate:22}{said}")
    packages = (*PACKAGES, *(["tokamax"] if tokamax else []))
    shape = {"batch": args.batch, "time": args.time, "dtype": args.dtype}
    print(write(f"kernels-{slug(jax.devices()[0].device_kind)}", packages, {**shape, **figures}, results=args.results))


if __name__ == "__main__":
    main()
