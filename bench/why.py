"""Where the time of an update goes: the profiler's operations, longest first, and the fastest matrix product.

    python bench/why.py --config gpt2-124m --batch_size 32 --micro_batch_size 32

Operations are added up by their names without numbers, over the updates that were traced: on GPUs what ran on the
streams, on CPUs what XLA's threads ran (where some wait for others, so that shares are of busy time there). The matrix
product is a square one of random bfloat16 (float32 on CPUs), the ceiling of what the chip does for anyone.
"""

from __future__ import annotations

import collections
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from record import arguments, slug, write
from sides import Ours, training_config

from gpt2_jax import runtime
from gpt2_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def operations(directory: Path) -> Iterator[tuple[str, float]]:
    """Name and nanoseconds of everything that a trace saw on the device."""
    for path in directory.rglob("*.xplane.pb"):
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        on_device = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        for plane in on_device or planes:
            for line in plane.lines:
                if "Stream" in line.name if on_device else line.name.startswith("tf_XLA"):
                    for event in line.events:
                        if "::" not in event.name:  # the thread pool's own
                            yield event.name, event.duration_ns


def traced(ours: Ours, updates: int, top: int) -> dict[str, Any]:
    """Traces some updates."""
    with tempfile.TemporaryDirectory() as temporary:
        with jax.profiler.trace(temporary):
            start = time.perf_counter()
            ours.updates(updates)
            seconds = time.perf_counter() - start
        times: collections.Counter[str] = collections.Counter()
        counts: collections.Counter[str] = collections.Counter()
        for name, nanoseconds in operations(Path(temporary)):
            name = re.sub(r"[._]\d+\b", "", name)
            times[name] += nanoseconds
            counts[name] += 1
    total = sum(times.values())
    if not total:
        raise SystemExit("the profiler saw no operations on the device")
    return {
        "updates": updates,
        "seconds_per_update": seconds / updates,
        "busy_s_per_update": total / 1e9 / updates,
        "operations": [
            {"name": name, "ms_per_update": spent / 1e6 / updates, "share": spent / total,
             "times_per_update": counts[name] / updates}
            for name, spent in times.most_common(top)
        ],
    }  # fmt: skip


def ceiling(size: int, dtype: Any, repeat: int) -> dict[str, Any]:
    """FLOP/s of a product of two square matrices, ten in a row each time."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    rates = []
    for _ in range(repeat):
        start = time.perf_counter()
        for _ in range(10):
            result = product(a, b)
        result.block_until_ready()
        rates.append(10 * 2 * size**3 / (time.perf_counter() - start))
    return {"size": size, "dtype": jnp.dtype(dtype).name, "flops_per_second": statistics.median(rates), "runs": rates}


def main() -> None:
    """Measures, and writes the table and the file."""
    parser = arguments(__doc__)
    parser.add_argument("--updates", type=int, default=5, help="to trace")
    parser.add_argument("--top", type=int, default=40, help="operations to write down")
    parser.add_argument("--size", type=int, help="of the matrix product; by default 8192, on CPUs 1024")
    args, flags = parser.parse_known_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.use_single_malloc_arena()
    try:
        config = training_config(flags)
    except UserError as error:
        parser.error(str(error))
    cpu = jax.devices()[0].platform == "cpu"
    product = ceiling(args.size or (1024 if cpu else 8192), jnp.float32 if cpu else jnp.bfloat16, 10)
    ours = Ours(config)
    ours.updates(3)
    trace = traced(ours, args.updates, args.top)
    about = ours.about()
    print(f"matrix product {product['flops_per_second'] / 1e12:.3f} TFLOP/s, {product['dtype']}")
    print(f"an update {1000 * trace['seconds_per_update']:.1f} ms, busy {1000 * trace['busy_s_per_update']:.1f} ms")
    for operation in trace["operations"][:25]:
        print(f"{operation['ms_per_update']:10.3f} ms {operation['share']:6.1%} {operation['times_per_update']:7.0f} × "
              f"{operation['name'][:90]}")  # fmt: skip
    figures = {"flags_of_training": flags, **about, "matrix_product": product, "program": ours.program(), **trace}
    device = about["device"]
    print(write(f"why-{slug(device)}", PACKAGES, figures, results=args.results, device=device))


if __name__ == "__main__":
    main()
