"""The training step of 124M for eight v5e chips, compiled: what attention costs beside its kernels.

    python bench/tpu_step.py

Twice, with attention and without (each block takes q · k · v, element by element, so that all else stays), on 16
sequences per chip.
XLA's own estimates of cycles have none for Pallas kernels, so the sums leave the kernels out: their ratio says what
copying, splitting and transposing around the kernels costs. Needs the extra `plan`; nothing runs.
"""

from __future__ import annotations

import dataclasses
import os

os.environ["JAX_PLATFORMS"] = "cpu"

from record import write

from gpt2_jax import attention
from gpt2_jax.config.toml import read_config
from gpt2_jax.planning.estimate import make_plan
from gpt2_jax.planning.topologies import devices_of

TOPOLOGY = "v5e:2x4"


def cycles():
    """Estimated cycles of one update outside the kernels, copies of layout around them, and the memory it needs."""
    devices = devices_of(TOPOLOGY)
    config = dataclasses.replace(read_config("gpt2-124m"), batch_size=16 * len(devices))
    plan = make_plan(config, devices, TOPOLOGY)
    return {
        "cycles": plan.cycles,
        "attention_kernels": plan.attention_kernels,
        "attention_copies": plan.attention_copies,
        "memory": plan.memory.needed,
    }


def main():
    """Compiles both and writes the file."""
    with_attention = cycles()
    attention.splash_attention = lambda q, k, v, scale: q * k * v
    without = cycles()
    ratio = with_attention["cycles"] / without["cycles"]
    print(f"cycles outside the kernels: {with_attention['cycles']:,} with attention, {without['cycles']:,} without")
    copies, kernels = with_attention["attention_copies"], with_attention["attention_kernels"]
    print(f"ratio {ratio:.3f}; {copies} copies around {kernels} kernels")
    figures = {"topology": TOPOLOGY, "with": with_attention, "without": without, "ratio": ratio}
    print(write("tpu-step", ("jax", "jaxlib", "libtpu"), figures))


if __name__ == "__main__":
    main()
