"""Our training step: tokens per second, MFU, memory and compile time, and how they change with the settings.

    python bench/train_step.py --config gpt2-124m --batch_size 128 --sweep micro_batch_size=8,16,32 loss_chunk=1024,0
    python bench/train_step.py --config quickstart --sweep attention=xla scan_layers=false,true --grid

Flags that are not this program's are those of training. --sweep changes one key at a time, --grid takes all
combinations; keys may go without their section. Each variant has a process of its own (bench/trainers.py), so that its
memory is its own, and what does not fit is written down as such. MFU is (6 N + 12 L C T) × tokens/s over the chip's
dense bfloat16 peak (gpt2_jax/metrics.py, gpt2_jax/chips.py), null where that is unknown or not the dtype.
"""

from __future__ import annotations

import itertools
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from record import arguments, slug, write
from trainers import Trainer, TrainerError, updates_for

from gpt2_jax.config import TrainConfig, flatten
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def full_key(key: str) -> str:
    """A key of the training config: "attention" is model.attention.

    Raises:
        UserError: there is none, or several.
    """
    config = TrainConfig(out="", steps=1, batch_size=1)
    known = list(flatten(config))
    found = [name for name in known if name == key] or [name for name in known if name.endswith("." + key)]
    if len(found) != 1:
        raise UserError(f"--sweep {key}: expected one key of a training config, found {found or 'none'}")
    return found[0]


def variants(sweeps: Mapping[str, Sequence[str]], grid: bool) -> Iterator[dict[str, str]]:
    """What to change: nothing, then one key at a time; as a grid all combinations."""
    if grid:
        for values in itertools.product(*sweeps.values()):
            yield dict(zip(sweeps, values, strict=True))
        return
    yield {}
    for key, values in sweeps.items():
        for value in values:
            yield {key: value}


def measure(flags: Sequence[str], repeat: int, seconds: float, least: int) -> dict[str, Any]:
    """Figures of one variant, or what went wrong."""
    try:
        with Trainer("ours", flags) as trainer:
            about = trainer.about
            updates = updates_for(trainer, seconds, least)
            runs = [trainer.run(updates) for _ in range(repeat)]
            program = trainer.program()
    except TrainerError as error:
        return {"error": str(error)}
    times = [run["seconds"] / updates for run in runs]
    speed = about["tokens"] / statistics.median(times)
    peak = about["peak_flops"]
    return {
        **about,
        "median_s": statistics.median(times),
        "tokens_per_second": speed,
        "mfu": peak and speed * about["flops_per_token"] / peak,
        "peak_bytes": runs[-1]["peak_bytes"],
        "loss": runs[-1]["loss"],
        "program": program,
        "updates_per_block": updates,
        "seconds_per_update": times,
    }


def main() -> None:
    """Measures, and writes the table and the file."""
    parser = arguments(__doc__)
    parser.add_argument("--config", required=True, help="preset or TOML file")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--grid", action="store_true", help="all combinations of the sweeps")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block, at least")
    parser.add_argument("--updates", type=int, default=5, help="of a block, at least")
    parser.add_argument("--name", help="of the file: NAME-DEVICE; by default train_step-CONFIG")
    args, extra = parser.parse_known_args()
    try:
        read_config(args.config)
        sweeps = {}
        for sweep in args.sweep:
            key, equals, values = sweep.partition("=")
            if not equals:
                raise UserError(f"--sweep {sweep}: expected KEY=VALUE,VALUE")
            sweeps[full_key(key)] = values.split(",")
    except UserError as error:
        parser.error(str(error))

    cases: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was measured until then is written
    print(f"{'tokens/s':>12} {'ms':>9} {'MFU':>6} {'peak MiB':>9} {'first, s':>8}  variant")
    wanted = list(variants(sweeps, args.grid))
    try:
        for change in wanted:
            flags = [word for key, value in change.items() for word in (f"--{key}", value)]
            figures = measure(["--config", args.config, *extra, *flags], args.repeat, args.seconds, args.updates)
            cases.append({"change": change, **figures})
            print(line(cases[-1]), flush=True)
    finally:
        devices = [case["device"] for case in cases if "device" in case]
        if devices:
            name = f"{args.name or 'train_step-' + args.config}-{slug(devices[0])}"
            figures = {
                "flags_of_training": ["--config", args.config, *extra],
                "complete": len(cases) == len(wanted),
                "cases": cases,
            }
            print(write(name, PACKAGES, figures, results=args.results, device=devices[0]))
    if not devices:
        raise SystemExit("no variant ran")


def line(case: Mapping[str, Any]) -> str:
    """A line of the table."""
    name = " ".join(f"{key}={value}" for key, value in case["change"].items()) or "as configured"
    if "error" in case:
        return f"{'-':>12} {'-':>9} {'-':>6} {'-':>9} {'-':>8}  {name}: {case['error']}"
    mfu = "-" if case["mfu"] is None else f"{case['mfu']:.1%}"
    return (
        f"{case['tokens_per_second']:12,.0f} {1000 * case['median_s']:9.1f} {mfu:>6} "
        f"{case['peak_bytes'] / 2**20:9.0f} {case['first_update_s']:8.1f}  {name}"
    )


if __name__ == "__main__":
    main()
