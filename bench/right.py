"""Whether an accelerator computes what the CPU does: before any of its speeds counts.

    JAX_PLATFORMS=cuda,cpu python bench/right.py

Three checks, each with a bound; what would compare a thing with itself is left out. If one fails, the file is called
wrong-DEVICE.json instead of right-DEVICE.json, and the exit code is 1:

    attention  forward and gradients in bfloat16, of the kernel that training chooses and of plain XLA, against XLA in
               float32: the kernel's error is at most twice plain XLA's, whose rounding is the same
    updates    ten of a small model in float32, on the accelerator and on the CPU: losses differ by at most 1e-4
    text       300 updates of the quickstart, as a user runs them: the validation loss falls below 0.6 of the first
               update's (bytes that are guessed have ln 257 = 5.55, their frequencies alone give 3.25)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import arguments, python_path, slug, write
from sides import Ours, training_config

from gpt2_jax.attention import causal_attention, choose
from gpt2_jax.hardware import hardware_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SMALL = ["--config", "shakespeare-char-cpu", "--dtype", "float32"]
UPDATES = 10


def attention(device: jax.Device, batch: int, time: int) -> dict[str, Any]:
    """Errors of the output and of the gradients for q, k and v, relative to their norms; 12 heads of 64."""
    shape = (batch, time, 12, 64)
    choice = choose(
        "auto", hardware=hardware_of(device), dtype=jnp.dtype(jnp.bfloat16), time=time, head_dim=64, dropout=0.0
    )
    if choice.backend == "xla":
        return {"kernel": "xla", "right": None}
    # Rounded to bfloat16 beforehand, so that all start from the same numbers.
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(4)]

    def run(backend: Any, dtype: Any) -> list[np.ndarray]:
        def function(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return causal_attention(q, k, v, backend=backend)

        q, k, v, cotangent = (jax.device_put(x.astype(dtype), device) for x in inputs)
        output, pullback = jax.vjp(jax.jit(function), q, k, v)
        return [np.asarray(x, np.float32) for x in (output, *pullback(cotangent))]

    with jax.default_matmul_precision("highest"):
        exact = run("xla", jnp.float32)
    names = ("output", "dq", "dk", "dv")

    def errors(backend: Any) -> dict[str, float]:
        values = run(backend, jnp.bfloat16)
        return {name: float(np.linalg.norm(value - right) / np.linalg.norm(right))
                for name, value, right in zip(names, values, exact, strict=True)}  # fmt: skip

    plain, kernel = errors("xla"), errors(choice.backend)
    right = all(kernel[name] <= 2 * plain[name] for name in names)
    return {"kernel": choice.backend, "xla_errors": plain, "kernel_errors": kernel, "right": right}


def updates(device: jax.Device) -> dict[str, Any]:
    """Losses of the same updates on the device and on the CPU."""
    if device.platform == "cpu":
        return {"right": None}
    config = training_config(SMALL)
    losses = {}
    for name, where in (("here", device), ("cpu", jax.devices("cpu")[0])):
        with jax.default_device(where):
            ours = Ours(config, where)
            losses[name] = [ours.updates(1) for _ in range(UPDATES)]
    most = float(np.max(np.abs(np.subtract(losses["here"], losses["cpu"]))))
    return {"losses": losses, "largest_difference": most, "right": most <= 1e-4}


def text(steps: int) -> dict[str, Any]:
    """What the quickstart reaches."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        command = [sys.executable, "-m", "gpt2_jax.train", "--config", "quickstart", "--steps", str(steps),
                   "--optimizer.warmup_steps", str(steps // 10), "--log.every", "1", "--eval.sample_tokens", "0",
                   "--out", str(out)]  # fmt: skip
        # This process holds the device too.
        environment = {**os.environ, "PYTHONPATH": python_path(), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            return {"error": done.stderr[-2000:], "right": False}
        rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(row["loss"] for row in rows if "loss" in row)
    last = next(row["val_loss"] for row in reversed(rows) if "val_loss" in row)
    return {"first_loss": first, "val_loss": last, "right": last < 0.6 * first}


def checked(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a check found; one that breaks is wrong, and the others are done all the same."""
    try:
        return check()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000], "right": False}


def main() -> None:
    """Checks, and writes the file."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the quickstart")
    parser.add_argument("--time", type=int, default=1024, help="tokens of a sequence, for attention")
    args = parser.parse_args()
    device = jax.devices()[0]
    checks = {
        "attention": checked(lambda: attention(device, 4, args.time)),
        "updates": checked(lambda: updates(device)),
        "text": checked(lambda: text(args.steps)),
    }
    for name, check in checks.items():
        verdict = {True: "right", False: "WRONG", None: "nothing to compare"}[check["right"]]
        print(f"{name:10} {verdict}  {json.dumps(check)}")
    right = all(check["right"] is not False for check in checks.values())
    name = f"{'right' if right else 'wrong'}-{slug(device.device_kind)}"
    print(write(name, PACKAGES, {"right": right, **checks}, results=args.results, device=device.device_kind))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
