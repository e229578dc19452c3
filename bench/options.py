"""Compiles the training step for TPUs with and without options of XLA, and fills a table of docs/scaling.md.

    python bench/options.py [WORD ...]

Nothing runs on a chip. It compiles the rows that bench/results/options.json lacks at this version of JAX, a process and
one to ten minutes each, with WORDs only those whose names contain all of them. It can be stopped and started again. It
needs the extra `plan`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from record import RESULTS, Figures, replace_rows
from scaling import DOCUMENT

from gpt2_jax import compiler_options
from gpt2_jax.attention import splash
from gpt2_jax.compiler_options import Options
from gpt2_jax.config.flags import parse_args
from gpt2_jax.planning.estimate import TooLargeError, make_plan
from gpt2_jax.planning.topologies import devices_of

RECORD = RESULTS / "options.json"

TWO_KERNELS = splash.Tiles(512, 512, fused=False)
COMBINE = "xla_jf_crs_combiner_threshold_in_bytes"
FUSE = "xla_tpu_enable_async_collective_fusion_fuse_all_reduce"
OVERLAP: Options = {COMBINE: 16 << 20, FUSE: True, "xla_enable_async_all_reduce": True}
UNHIDDEN: Options = {"xla_tpu_enable_latency_hiding_scheduler": False}  # true by default
DATA_PARALLEL: Options = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
    "xla_tpu_enable_latency_hiding_scheduler": True,
}


def vmem(kib: int) -> Options:
    """The limit of the memory on the chip that one fusion may take."""
    return {"xla_tpu_scoped_vmem_limit_kib": kib}


class Case(NamedTuple):
    """A program.

    Attributes:
        options: those of XLA, besides the defaults.
        tiles: of the attention kernels; None takes those of the package.
    """

    name: str
    topology: str
    flags: str
    options: Options
    tiles: splash.Tiles | None = None

    @property
    def key(self) -> str:
        """The key in the results file."""
        words = [f"{name}={value}" for name, value in self.options.items()]
        return f"{self.name} {self.topology}: {', '.join(words) or 'none'}{', two kernels' if self.tiles else ''}"


# One layer for options that change every fusion, several for what happens between layers, then whole models.
ONE = ("124M, 1 layer", "--config gpt2-124m --micro_batch_size 16 --model.n_layer 1")
FOUR = ("124M, 4 layers", "v5e:16x16", "--config gpt2-124m --micro_batch_size 16 --model.n_layer 4")
BYTES = (
    "3 layers on bytes", "v5e:2x4", "--config quickstart --model.n_embd 768 --model.n_head 12 --model.n_layer 3 "
    "--model.block_size 1024 --batch_size 16 --micro_batch_size 2",
)  # fmt: skip
SMALL = (
    "1 layer on bytes", "v5e:2x2", "--config quickstart --model.n_embd 768 --model.n_head 12 --model.n_layer 1 "
    "--model.block_size 256 --batch_size 128 --micro_batch_size 32",
)  # fmt: skip
WHOLE = ("124M", "--config gpt2-124m --micro_batch_size 16")
XL = ("1558M", "v5e:4x4", "--config gpt2-1558m --mesh.fsdp 8 --micro_batch_size 4 --model.remat dots")
LIMITS = {"v5e:2x4": 65536, "v6e:2x4": 98304, "v5p:2x2x2": 65472}
CASES = [
    *(
        Case(ONE[0], topology, ONE[1], options, tiles)
        for topology, kib in LIMITS.items()
        for options, tiles in (({}, None), (vmem(kib), None), ({}, TWO_KERNELS))
    ),
    *(Case(*FOUR, options, TWO_KERNELS) for options in ({}, {FUSE: True}, {COMBINE: 32 << 20, FUSE: True})),
    *(Case(*BYTES, options, TWO_KERNELS) for options in ({}, OVERLAP, DATA_PARALLEL)),
    *(Case(*SMALL, options) for options in ({}, vmem(65536))),
    *(Case(WHOLE[0], topology, WHOLE[1], options) for topology in LIMITS for options in ({}, vmem(LIMITS[topology]))),
    *(Case(*XL, options) for options in ({}, vmem(65536))),
    *(Case(WHOLE[0], "v5e:2x4", WHOLE[1], options) for options in (UNHIDDEN, OVERLAP)),
    *(Case(WHOLE[0], "v5e:16x16", "--config gpt2-124m --micro_batch_size 2", options)
      for options in ({}, vmem(65536), UNHIDDEN, OVERLAP)),
    *(Case(XL[0], topology, XL[2].replace("--mesh.fsdp 8", "--mesh.fsdp 16"), options)  # 8 are no part of a v6e:4x4
      for topology, kib in (("v6e:4x4", 98304), ("v5p:2x2x4", 65472)) for options in ({}, vmem(kib))),
]  # fmt: skip


def compile_case(case: Case) -> Figures:
    """What a program takes. Runs in a process of its own: it changes the package."""
    start = time.process_time()
    devices = devices_of(case.topology)
    compiler_options.EXPERIMENTAL[devices[0].device_kind] = case.options
    if case.tiles is not None:
        tiles = case.tiles
        splash.tiles_for = lambda *_: tiles
    try:
        plan = make_plan(
            parse_args("options", "", f"{case.flags} --compiler_options experimental".split()), devices, case.topology
        )
    except TooLargeError as error:
        return {"too_large": str(error.memory)}
    return {
        "memory": plan.memory.required,
        "cycles": plan.cycles,
        "hbm_bytes": plan.hbm_bytes,
        "attention_kernels": plan.attention_kernels,
        "attention_copies": plan.attention_copies,
        "collectives": [dataclasses.asdict(each) for each in plan.collectives],
        "cpu_seconds": time.process_time() - start,
    }


def line(case: Case, known: Figures) -> str:
    """A line of the table."""
    figures = known[case.key]
    options = "<br>".join(f"`{name}={value}`" for name, value in case.options.items())
    tiles = "two kernels" if case.tiles else "fused"
    cells = [case.name, case.topology, options or "none", tiles]
    if "too_large" in figures:
        return f"| {' | '.join([*cells, figures['too_large'], '', '', '', ''])} |"
    data = [each for each in figures["collectives"] if "data" in each["axes"]]
    beside, total = (sum(each[key] for each in data) for key in ("overlapped_bytes", "n_bytes"))
    cells += [
        f"{figures['memory'] / 2**30:.2f}",
        f"{figures['cycles'] / 1e6:,.2f}",
        f"{figures['hbm_bytes'] / 1e9:,.2f}",
        f"{figures['attention_kernels']}, {figures['attention_copies']}",
        f"{sum(each['times'] for each in data)}, {beside / total:.0%}" if data else "none",
    ]
    return f"| {' | '.join(cells)} |"


def document(page: str, known: Figures) -> str:
    """docs/scaling.md with the rows that were compiled."""
    return replace_rows(page, "| model |", [line(case, known) for case in CASES if case.key in known])


def main() -> None:
    """Compiles the missing rows, and writes the results and the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    words = parser.parse_args().words
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known = recorded["results"] if recorded.get("versions") == versions else {}
    for case in CASES:
        if case.key in known or not all(word in case.key for word in words):
            continue
        print(case.key, file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            known[case.key] = process.submit(compile_case, case).result()
        RECORD.write_text(json.dumps({"versions": versions, "results": known}, indent=1) + "\n")
    DOCUMENT.write_text(document(DOCUMENT.read_text(), known))


if __name__ == "__main__":
    main()
