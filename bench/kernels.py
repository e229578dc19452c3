"""Attention, the loss and a large matmul alone: our attention and loss beside tokamax's, forward and backward.

    python bench/kernels.py [--batch 16 --time 1024 --dtype bfloat16]

tokamax (openxla/tokamax) cannot be installed beside this project: it needs typeguard 2, and our tyro needs typeguard 4.
Install it with `pip install --target DIR tokamax` and set PYTHONPATH=DIR; otherwise it is left out.

Shapes are those of 124M. A tokamax kernel that the device cannot run has its reason instead of figures. Errors are
those of the output and of all gradients against JAX's attention and Optax's cross-entropy in float32, each relative to
its norm; the largest counts. The matmul of two square random matrices is the chip's ceiling.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from record import Figures, Rows, arguments, duration, take_turns, timed, write

from gpt2_jax.attention import BACKENDS, causal_attention
from gpt2_jax.attention.backend import Problem
from gpt2_jax.attention.splash import Tiles, splash_attention
from gpt2_jax.config import GPT2Config
from gpt2_jax.hardware import current_hardware
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import padded_vocab_size

try:
    import tokamax
    from absl import flags
except ImportError:
    tokamax = None
else:
    flags.FLAGS(sys.argv[:1])  # or it would parse our flags

SHAPE = GPT2Config()

Function = Callable[..., jax.Array]


def with_gradients(function: Function, inputs: Sequence[jax.Array], cotangent: jax.Array) -> Callable[[], list[Any]]:
    """A call of the jitted function and its gradients: the output, then the gradient of each input."""

    @jax.jit
    def run(cotangent: jax.Array, *inputs: jax.Array) -> list[jax.Array]:
        output, pullback = jax.vjp(function, *inputs)
        return [output, *pullback(cotangent.astype(output.dtype))]

    return lambda: jax.block_until_ready(run(cotangent, *inputs))


def compare(
    candidates: Mapping[str, Function], exact: Function, inputs: Sequence[jax.Array], cotangent: jax.Array, repeat: int
) -> Figures:
    """Milliseconds and largest relative error of each candidate."""
    with jax.default_matmul_precision("highest"):
        right = with_gradients(exact, [x.astype(jnp.float32) for x in inputs], cotangent)()
    runs = {name: with_gradients(function, inputs, cotangent) for name, function in candidates.items()}
    figures: Figures = {}
    for name, run in runs.items():
        try:
            pairs = zip(run(), right, strict=True)
            errors = [float(jnp.linalg.norm(value - x) / jnp.linalg.norm(x)) for value, x in pairs]
            figures[name] = {"error_of_values": max(errors)}
        except Exception as error:
            if not name.startswith("tokamax"):  # whose kernels do not all support every device and shape
                raise
            figures[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    working = {name: functools.partial(timed, run) for name, run in runs.items() if "error" not in figures[name]}
    for name, seconds in take_turns(working, repeat).items():
        figures[name] |= milliseconds(seconds)
    return figures


def milliseconds(seconds: Sequence[float]) -> Figures:
    """The repetitions and their median."""
    return {"ms": [1000 * one for one in seconds], "median_ms": 1000 * statistics.median(seconds)}


def attention(batch: int, length: int, dtype: jnp.dtype, repeat: int) -> Figures:
    """All our backends that run here, and those of tokamax."""
    head_dim = SHAPE.n_embd // SHAPE.n_head
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, cotangent = (jax.random.normal(key, (batch, length, SHAPE.n_head, head_dim), dtype) for key in keys)
    problem = Problem(current_hardware(), dtype, length, head_dim, 0.0)
    candidates: dict[str, Function] = {
        name: functools.partial(causal_attention, backend=name)
        for name, backend in BACKENDS.items()
        if not backend.unsupported_reason(problem)
    }
    if problem.hardware.platform == "tpu":  # in other tiles than those of `tiles_for`
        for forward, backward, fused in ((512, 512, False), (512, 512, True), (512, 1024, True), (1024, 1024, True)):
            name = f"splash, blocks of {forward} forward and {backward} backward, {'fused' if fused else 'two kernels'}"
            tiles = Tiles(forward, backward, fused)
            candidates[name] = functools.partial(splash_attention, scale=head_dim**-0.5, tiles=tiles)
    if tokamax:
        theirs = functools.partial(tokamax.dot_product_attention, is_causal=True)
        kernels = {"cuda": ("triton", "mosaic_gpu"), "tpu": ("mosaic_tpu",)}.get(problem.hardware.platform, ())
        for name in ("xla", "xla_chunked", *kernels):
            candidates[f"tokamax {name}"] = functools.partial(theirs, implementation=name)
    exact = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    return compare(candidates, exact, inputs, cotangent, repeat)


def loss(batch: int, length: int, dtype: jnp.dtype, repeat: int) -> Figures:
    """Ours by tokens whose logits exist together, and tokamax's, with the embedding in `dtype` and without padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch, length, SHAPE.n_embd), dtype)
    embedding = 0.02 * jax.random.normal(keys[1], (padded_vocab_size(SHAPE), SHAPE.n_embd))
    targets = jax.random.randint(keys[2], (batch, length), 0, SHAPE.vocab_size)

    def ours(chunk: int, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        return cross_entropy(hidden, embedding, targets, SHAPE.vocab_size, chunk)

    def theirs(name: str, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        flat, weights = hidden.reshape(-1, SHAPE.n_embd), embedding[: SHAPE.vocab_size].T.astype(hidden.dtype)
        return tokamax.linear_softmax_cross_entropy_loss(flat, targets.reshape(-1), weights, implementation=name)

    def exact(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        logits = hidden @ embedding[: SHAPE.vocab_size].T
        return jnp.sum(optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets))

    candidates: dict[str, Function] = {
        f"chunks of {chunk or 'all'}": functools.partial(ours, chunk) for chunk in (0, 1024, 4096)
    }
    if tokamax:
        for name in ("xla", "mosaic_tpu") if current_hardware().platform == "tpu" else ("xla",):
            candidates[f"tokamax {name}"] = functools.partial(theirs, name)
    return compare(candidates, exact, [hidden, embedding], jnp.ones(()), repeat)


def matmul(size: int, dtype: jnp.dtype, repeat: int) -> Figures:
    """A matmul of two square matrices, the mean of ten in a row."""
    a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    ten = functools.partial(timed, lambda: jax.block_until_ready([product(a, b) for _ in range(10)]))
    figures = milliseconds([seconds / 10 for seconds in take_turns({"ten": ten}, repeat)["ten"]])
    return {f"{size} × {size}": {**figures, "flops_per_second": 2e3 * size**3 / figures["median_ms"]}}


def rows(figures: Figures) -> Rows:
    """The seconds of each candidate, and its error or the FLOP/s."""
    results: Rows = {}
    for part in ("attention", "loss", "matmul"):
        for name, case in figures.get(part, {}).items():
            if "error" in case:
                results[f"{part}, {name}"] = None, case["error"]
            else:
                seconds, rate = case["median_ms"] / 1000, case.get("flops_per_second", 0) / 1e12
                quality = f"{rate:.3g} TFLOP/s" if rate else f"error {case['error_of_values']:.1e}"
                results[f"{part}, {name}"] = seconds, f"{duration(seconds)}, {quality}"
    return results


def main() -> None:
    """Measures and writes the file."""
    parser = arguments(__doc__, repeat=20)
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--time", type=int, default=SHAPE.block_size, help="tokens of each")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    dtype, size = jnp.dtype(args.dtype), 1024 if current_hardware().platform == "cpu" else 8192
    figures = {
        "batch": args.batch,
        "time": args.time,
        "dtype": args.dtype,
        "attention": attention(args.batch, args.time, dtype, args.repeat),
        "loss": loss(args.batch, args.time, dtype, args.repeat),
        "matmul": matmul(size, dtype, args.repeat),
    }
    write("kernels", figures, rows(figures), args.results)


if __name__ == "__main__":
    main()
