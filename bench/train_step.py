"""Our training step: tokens per second, MFU, memory and compile time, and how they change with the settings.

    python bench/train_step.py --config gpt2-124m --batch_size 128 --sweep micro_batch_size=8,16,32 loss_chunk=1024,0
    python bench/train_step.py --config quickstart --sweep attention=xla scan_layers=false,true --grid

Other flags are those of training. --sweep changes one key at a time; --grid takes all combinations. Keys may omit their
section. Each variant runs in a process of its own (bench/trainers.py), so that its memory is its own. A variant that
does not fit is recorded as such, and the file is written anew after each variant. MFU is (6 N + 12 L C T) × tokens/s
over the dense bfloat16 peak of the chip (gpt2_jax/metrics.py, gpt2_jax/hardware.py), and null if the peak is unknown or
the dtype is another.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from record import arguments, slug, write
from trainers import Trainer, TrainerError, updates_for

from gpt2_jax.config.toml import all_keys, read_config
from gpt2_jax.errors import UserError


def parse_sweeps(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key, with its section: "attention=xla" becomes {"model.attention": ["xla"]}.

    Raises:
        UserError: a word is not KEY=VALUE,VALUE, or no key or several keys match.
    """
    sweeps = {}
    for word in words:
        key, equals, values = word.partition("=")
        found = [name for name in all_keys() if name == key] or [
            name for name in all_keys() if name.endswith("." + key)
        ]
        if not equals or len(found) != 1:
            names = found or "no such key"
            raise UserError(
                f"--sweep {word}: found {names}; expected KEY=VALUE,VALUE with one key of a training config"
            )
        sweeps[found[0]] = values.split(",")
    return sweeps


def variants(sweeps: Mapping[str, Sequence[str]], grid: bool) -> Iterator[dict[str, str]]:
    """The changes of each variant: none, then one key at a time; with `grid` all combinations."""
    if grid:
        for values in itertools.product(*sweeps.values()):
            yield dict(zip(sweeps, values, strict=True))
        return
    yield {}
    for key, values in sweeps.items():
        for value in values:
            yield {key: value}


def measure(flags: Sequence[str], repeat: int, seconds: float, least: int) -> dict[str, Any]:
    """The figures of one variant, or its error."""
    try:
        with Trainer("ours", flags) as trainer:
            about = trainer.about
            updates = updates_for(trainer, seconds, least)
            runs = [trainer.run(updates) for _ in range(repeat)]
    except TrainerError as error:
        return {"error": str(error)}
    times = [run["seconds"] / updates for run in runs]
    speed, peak = about["tokens"] / statistics.median(times), about["peak_flops"]
    return {
        **about,
        "median_s": statistics.median(times),
        "tokens_per_second": speed,
        "mfu": peak and speed * about["flops_per_token"] / peak,
        "peak_bytes": runs[-1]["peak_bytes"],
        "loss": runs[-1]["loss"],
        "updates_per_block": updates,
        "seconds_per_update": times,
    }


def line(case: Mapping[str, Any]) -> str:
    """A row of the printed table."""
    name = " ".join(f"{key}={value}" for key, value in case["change"].items()) or "as configured"
    if "error" in case:
        return f"{'-':>12} {'-':>9} {'-':>6} {'-':>9} {'-':>8}  {name}: {case['error']}"
    mfu = "-" if case["mfu"] is None else f"{case['mfu']:.1%}"
    return (
        f"{case['tokens_per_second']:12,.0f} {1000 * case['median_s']:9.1f} {mfu:>6} "
        f"{case['peak_bytes'] / 2**20:9.0f} {case['first_update_s']:8.1f}  {name}"
    )


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = arguments(__doc__)
    parser.add_argument("--config", required=True, help="preset or TOML file")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--grid", action="store_true", help="all combinations of the sweeps")
    parser.add_argument("--repeat", type=int, default=5, help="blocks of each variant")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block, at least")
    parser.add_argument("--updates", type=int, default=5, help="of a block, at least")
    parser.add_argument("--name", help="of the file: NAME-DEVICE; by default train_step-CONFIG")
    args, extra = parser.parse_known_args()
    try:
        read_config(args.config)
        wanted = list(variants(parse_sweeps(args.sweep), args.grid))
    except UserError as error:
        parser.error(str(error))

    flags = ["--config", args.config, *extra]
    cases: list[dict[str, Any]] = []
    path = device = None
    print(f"{'tokens/s':>12} {'ms':>9} {'MFU':>6} {'peak MiB':>9} {'first, s':>8}  variant")
    for change in wanted:
        changed = [word for key, value in change.items() for word in (f"--{key}", value)]
        cases.append({"change": change, **measure([*flags, *changed], args.repeat, args.seconds, args.updates)})
        print(line(cases[-1]), flush=True)
        device = device or cases[-1].get("device")
        if device:
            figures = {"flags_of_training": flags, "complete": len(cases) == len(wanted), "cases": cases}
            name = f"{args.name or 'train_step-' + args.config}-{slug(device)}"
            path = write(name, figures, results=args.results, device=device)
    if not path:
        raise SystemExit("error: no variant ran")
    print(path)


if __name__ == "__main__":
    main()
