"""Plans training: `python -m gpt2_jax.plan --config NAME|FILE.toml --topology v5e:4x4`.

Compiles the training step for chips that need not be attached, and prints its memory, collectives and estimated time.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from gpt2_jax.cli import run_command
from gpt2_jax.config.flags import parse_args, parse_flags, take_flags
from gpt2_jax.display import count, duration, si
from gpt2_jax.errors import UserError, strip_controls
from gpt2_jax.files import user_path
from gpt2_jax.hardware import GIB, chip_of
from gpt2_jax.planning.estimate import Estimate, Plan, TooLargeError, make_plan
from gpt2_jax.planning.fit import fastest_change, smallest_change
from gpt2_jax.planning.micro_batch import Change, fit, is_open
from gpt2_jax.planning.topologies import devices_of
from gpt2_jax.reports.records import read_run
from gpt2_jax.run.noise_scale import describe_ramp

PROG = "python -m gpt2_jax.plan"
DESCRIPTION = """Plan training: compile the training step for chips that need not be attached, and print its memory,
collectives, FLOPs and estimated time. --topology names the chips: v5e:4x4, v5p:2x2x4, 2xv6e:2x4 for two slices, t4:1,
rtx-4090:1, h100:8 or cpu:8 (an unknown name prints all); without it, the devices of this machine. --find searches for
the micro-batch size and the rematerialization that fit and take the least estimated time. --json prints everything as
JSON. --ramp RUN compiles nothing: it proposes a batch_ramp from the gradient noise scale of a run."""


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """Flags of the command besides those of the config."""

    topology: str = ""
    """Chips to compile for; by default the devices of this machine."""
    find: bool = False
    """Search for the micro-batch size and the rematerialization that fit and take the least estimated time."""
    json: bool = False
    """Print everything as JSON."""
    ramp: str = ""
    """Run directory. Compile nothing: print the batch_ramp that its gradient noise scale proposes."""


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    plan_args, config_args = take_flags(PlanFlags, args)
    flags = parse_flags(PlanFlags, plan_args, prog=PROG, description=DESCRIPTION)
    if flags.ramp:
        if config_args or flags.topology or flags.find or flags.json:
            raise UserError("--ramp goes without other flags: it reads the config of the run")
        run = user_path(flags.ramp, "--ramp")
        record = read_run(run, run.name)
        for line in describe_ramp(record.noise_scale(), run, record.config.batch_size):
            print(strip_controls(line))
        return 0
    config = parse_args(PROG, DESCRIPTION, config_args, lambda line: print(line, file=sys.stderr), PlanFlags)
    devices = devices_of(flags.topology) if flags.topology else jax.devices()
    where = flags.topology or f"this machine's {len(devices)} × {devices[0].device_kind}"
    best: Change | None = None
    try:
        if flags.find:
            best, plan = fastest_change(config, devices, where)
        else:
            if is_open(config):
                chip = chip_of(devices[0])
                memory = int(chip.memory) if chip else None
                config = fit(config, devices, memory, lambda line: print(line, file=sys.stderr)).apply(config)
            plan = make_plan(config, devices, where)
    except TooLargeError as error:
        change = smallest_change(config, devices, error.memory)
        excess = error.memory.required - (error.memory.available or 0)
        raise UserError(
            f"{config.out} needs {error.memory} on {where}, {excess / GIB:.1f} GiB too much; "
            + (f"type {change}" if change else "no smaller setting fits; take more chips")
        ) from error
    if flags.json:
        print(json.dumps(to_json(plan) | ({"found": str(best)} if best else {}), indent=2))
    else:
        print(format_plan(plan))
        if best:
            print(f"{'best':12}{best}")
    return 0


def to_json(plan: Plan) -> dict[str, Any]:
    """The JSON of `--json`. Programs read its keys, so they stay when attributes are renamed."""
    table: dict[str, Any] = {
        "config": dataclasses.asdict(plan.config),
        "where": plan.where,
        "kind": plan.kind,
        "devices": plan.devices,
        "hosts": plan.hosts,
        "mesh": plan.mesh,
        "n_params": plan.n_params,
        "attention": {"backend": plan.attention.backend, "against": plan.attention.rejected},
        "attention_kernels": plan.attention_kernels,
        "attention_copies": plan.attention_copies,
        "parameters": plan.parameters,
        "micro_batches": plan.micro_batches,
        "memory": {"needed": plan.memory.required, "available": plan.memory.available},
        "model_flops": plan.model_flops,
        "hardware_flops": plan.hardware_flops,
        "traffic": plan.hbm_bytes,
        "cycles": plan.cycles,
        "collectives": [{**dataclasses.asdict(each), "sent": each.sent()} for each in plan.collectives],
        "estimate": None,
        "tokens": plan.tokens,
    }
    if estimate := plan.estimate:
        table["estimate"] = {
            "compute": estimate.compute,
            "memory": estimate.memory,
            "links": estimate.communication,
            "compiled": estimate.compiler_estimate,
            "least": estimate.lower_bound,
            "most": estimate.upper_bound,
            "mfu": [plan.mfu(estimate.upper_bound), plan.mfu(estimate.lower_bound)],
        }
    return table


def format_plan(plan: Plan) -> str:
    """The plan as text."""
    config, model = plan.config, plan.config.model
    per_device = config.batch_size // plan.devices // plan.micro_batches
    lines = [
        ("on", f"{plan.where}: {plan.devices} × {plan.kind}, {count(plan.hosts, 'host')}; mesh data "
               f"{plan.mesh['data']} × fsdp {plan.mesh['fsdp']}; {config.dtype}"),
        ("model", f"{plan.n_params:,} parameters: {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide"
                  f"{', scanned' * model.scan_layers}; remat {model.remat}"),
        ("attention", f"{plan.attention}; {plan.attention_kernels} kernel calls per update, "
                      f"{plan.attention_copies} copies around them"),
        ("batch", f"{config.batch_size} sequences = {plan.tokens:,} tokens per update ({plan.devices} devices × "
                  f"{plan.micro_batches} micro-batches × {per_device} sequences)"),
        ("memory", f"{plan.memory} per device"),
        ("FLOPs", f"{plan.model_flops:.3g} per update by 6 N + 12 L C T, {plan.hardware_flops:.3g} in the program"),
    ]  # fmt: skip
    collectives: list[str] = []
    for each in plan.collectives:
        beside_other_work = each.overlapped_bytes - each.matmul_overlapped_bytes
        collectives += [
            f"{each.kind} over {' and '.join(each.axes)}: {si(each.n_bytes)}B per update in "
            f"{count(each.times, 'call')} among {each.devices} devices"
            f"{f' of {each.slices} slices' * (each.slices > 1)}; each sends {si(int(each.sent()))}B,",
            f"{each.matmul_overlapped_bytes / each.n_bytes:.0%} of it beside matmuls, "
            f"{beside_other_work / each.n_bytes:.0%} beside other work only",
        ]
    lines += _labeled("collectives", collectives or ["none"])
    lines += _labeled("parameters", _grouped(plan.parameters))
    if plan.estimate:
        lines += _labeled("estimate", _estimate_lines(plan, plan.estimate))
    return "\n".join(f"{name:12}{text}" for name, text in lines)


def _labeled(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of label and line; only the first line has the label."""
    return [("" if index else label, text) for index, text in enumerate(texts)]


def _grouped(parameters: Sequence[tuple[str, tuple[int, ...], str]]) -> list[str]:
    """One line for the same parameter in all layers with the same placement."""
    counts = Counter(
        (f"{re.sub(r'h_[0-9]+/', 'h_*/', name)} {list(shape)} ", placement) for name, shape, placement in parameters
    )
    return [f"{name:36}{placement}{f'  × {times}' if times > 1 else ''}" for (name, placement), times in counts.items()]


def _estimate_lines(plan: Plan, estimate: Estimate) -> list[str]:
    steps, lower, upper = plan.config.steps, estimate.lower_bound, estimate.upper_bound
    parts = {
        "matmuls at the peak": estimate.compute,
        "memory": estimate.memory,
        "communication": estimate.communication,
        "compiler's estimate": estimate.compiler_estimate,
    }
    mfu = dict.fromkeys(f"{plan.mfu(seconds):.0%}" for seconds in (upper, lower))
    return [
        f"an update takes {estimate}, MFU {' to '.join(mfu)}",
        f"{si(int(plan.tokens / upper))} to {si(int(plan.tokens / lower))} tokens/s; {steps:,} updates = "
        f"{si(steps * plan.tokens)} tokens: {duration(steps * lower)} to {duration(steps * upper)}",
        ", ".join(f"{name} {1000 * part:.1f} ms" for name, part in parts.items() if part is not None),
        "at data-sheet speeds, if everything overlaps (least) or nothing (most); without evaluation and checkpoints",
    ]


def command() -> None:
    """Entry point of `gpt2-plan`."""
    run_command(main)


if __name__ == "__main__":
    command()
