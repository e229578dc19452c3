"""Whether two runs of the same updates leave the same bits, as compiled by default and with deterministic kernels.

    python bench/determinism.py --config gpt2-124m --batch_size 16 --micro_batch_size 8

Two processes each, with and without XLA_FLAGS=--xla_gpu_deterministic_ops=true (which CPUs know and need not); all
parameters are hashed after the updates. The last column is what the flag costs.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

from record import arguments, slug, write
from trainers import Trainer, TrainerError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
FLAG = "--xla_gpu_deterministic_ops=true"


def main() -> None:
    """Measures, and writes the table and the file."""
    parser = arguments(__doc__)
    parser.add_argument("--updates", type=int, default=20)
    args, flags = parser.parse_known_args()
    kinds: dict[str, dict[str, Any]] = {}
    for kind, flag in (("default", ""), ("deterministic", FLAG)):
        environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
        digests, seconds = [], []
        for _ in range(2):
            try:
                with Trainer("ours", flags, environment=environment) as trainer:
                    seconds.append(trainer.run(args.updates)["seconds"] / args.updates)
                    digests.append(trainer.digest())
                    device = trainer.about["device"]
            except TrainerError as error:
                raise SystemExit(f"{error.trainer}: {error}") from error
        kinds[kind] = {"same": digests[0] == digests[1], "digests": digests, "seconds_per_update": seconds}
    cost = statistics.median(kinds["deterministic"]["seconds_per_update"]) / statistics.median(
        kinds["default"]["seconds_per_update"]
    )
    for kind, figures in kinds.items():
        print(f"{kind:14} {'the same bits' if figures['same'] else 'other bits'} after {args.updates + 1} updates")
    print(f"deterministic takes {cost:.3f} of the time")
    figures = {"flags_of_training": flags, "updates": args.updates, "cost": cost, **kinds}
    print(write(f"determinism-{slug(device)}", PACKAGES, figures, results=args.results, device=device))


if __name__ == "__main__":
    main()
