"""Our training step: tokens per second, MFU, memory and compile time, and how they change with the settings.

    python bench/train_step.py --config gpt2-124m --batch_size 128 --sweep micro_batch_size=8,16 model.loss_chunk=1024,0
    python bench/train_step.py --config quickstart --sweep model.attention=xla model.scan_layers=false,true --grid

Other flags are those of training. --sweep changes one key at a time; --grid takes all combinations. Each variant runs
in a process of its own (bench/trainers.py), so that its memory is its own. A variant that does not fit is recorded as
such, and the file is written anew after each variant. MFU is (6 N + 12 L C T) × tokens/s over the dense bfloat16 peak
of the chip (gpt2_jax/metrics.py, gpt2_jax/hardware.py), and null if the peak is unknown or the dtype is another.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence

from record import Figures, Rows, duration, write
from trainers import TrainerError, block_arguments, measure, training_config

from gpt2_jax.errors import UserError


def variants(sweeps: Mapping[str, Sequence[str]], grid: bool) -> list[dict[str, str]]:
    """The changes of each variant: none, then one key at a time; with `grid` all combinations."""
    if grid:
        return [dict(zip(sweeps, values, strict=True)) for values in itertools.product(*sweeps.values())]
    return [{}, *({key: value} for key, values in sweeps.items() for value in values)]


def figures_of(flags: Sequence[str], args: argparse.Namespace) -> Figures:
    """The figures of one variant, or its error."""
    try:
        case = measure(["ours"], flags, args)["ours"]
    except TrainerError as error:
        return {"error": str(error)}
    peak = case["peak_flops"]
    return {**case, "mfu": peak and case["tokens_per_second"] * case["flops_per_token"] / peak}


def describe(case: Figures) -> str:
    """A variant and its figures in one line."""
    name = " ".join(f"{key}={value}" for key, value in case["change"].items()) or "as configured"
    if "error" in case:
        return f"{name}: {case['error']}"
    mfu = f"MFU {case['mfu']:.1%}, " if case["mfu"] else ""
    return (
        f"{name}: {mfu}{case['tokens_per_second']:,.0f} tokens/s, {duration(case['median_s'])}, "
        f"{case['peak_bytes'] / 2**30:.1f} GiB, first update {duration(case['first_update_s'])}"
    )


def rows(figures: Figures) -> Rows:
    """The largest MFU of the variants that ran."""
    known = [case for case in figures["cases"] if case.get("mfu")]
    best = max(known, key=lambda case: case["mfu"], default=None)
    return {"best MFU": (best["mfu"], describe(best))} if best else {}


def main() -> None:
    """Measures, prints each variant and writes the file."""
    parser = block_arguments(__doc__, repeat=5)
    parser.add_argument("--config", required=True, help="preset or TOML file")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--grid", action="store_true", help="all combinations of the sweeps")
    parser.add_argument("--name", help="of the file: NAME-DEVICE; by default train_step-CONFIG")
    args, extra = parser.parse_known_args()
    sweeps = {key: values.split(",") for key, _, values in (word.partition("=") for word in args.sweep)}
    flags = ["--config", args.config, *extra]
    wanted = [
        (change, [*flags, *itertools.chain(*((f"--{key}", value) for key, value in change.items()))])
        for change in variants(sweeps, args.grid)
    ]
    try:
        for _, variant in wanted:
            training_config(variant)
    except UserError as error:
        parser.error(str(error))
    cases: list[Figures] = []
    device = ""
    for change, variant in wanted:
        cases.append({"change": change, **figures_of(variant, args)})
        print(describe(cases[-1]), flush=True)
        device = device or cases[-1].get("device", "")
        if device:
            figures = {"flags_of_training": flags, "complete": len(cases) == len(wanted), "cases": cases}
            write(args.name or f"train_step-{args.config}", figures, rows(figures), args.results, device)
    if not device:
        raise SystemExit("error: no variant ran")


if __name__ == "__main__":
    main()
