"""What a checkpoint costs the training that goes on meanwhile, and how long it takes to restore; beside torch's.

    python bench/checkpoint.py
    python bench/checkpoint.py --config gpt2-124m --batch_size 16 --micro_batch_size 16

Updates run one by one; after some of them the state is saved as run.py does it, once the update is done. The call that
saves blocks; the updates that follow, until the checkpoint has its final name and at least three more, take longer
than the median of those without a save around them. Both in units of that median: their sum is what a save stalls
training. `torch.save` and `torch.load` write and read the same number of bytes, in the same directory, and block.
Nobody waits for the disk beyond what the libraries do. By default 124M parameters and 2 sequences of 1,024 tokens, what
bench/peers.py takes on a CPU. There, writing takes processor time from training: seconds, however long an update is.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from record import arguments, slug, write
from sides import Ours, training_config

from gpt2_jax import runtime
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.errors import UserError
from gpt2_jax.step import abstract_state

PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "torch", "numpy")
SMALL = ["--config", "gpt2-124m", "--batch_size", "2", "--micro_batch_size", "2"]
AFTER = 3  # updates that still count as disturbed once the checkpoint is there


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def save(ours: Ours, checkpoints: Checkpoints, directory: Path) -> dict[str, Any]:
    """Saves, and trains on until the checkpoint is there and a bit longer: seconds of the call and of each update."""
    step = int(ours.state.step)
    start = time.perf_counter()
    checkpoints.save(step, ours.state, {"data": "random"})
    blocked = time.perf_counter() - start
    updates: list[float] = []
    written = None
    after = 0
    while after < AFTER:
        updates.append(timed(lambda: ours.updates(1)))
        if written is not None:
            after += 1
        elif (directory / str(step)).exists():  # it gets its name when it is whole
            written = time.perf_counter() - start
    return {"step": step, "blocked_s": blocked, "written_s": written, "updates_s": updates}


def restore(ours: Ours, checkpoints: Checkpoints, step: int) -> float:
    """Seconds until a saved state is on the device, whole."""
    wanted = abstract_state(ours.model, ours.config.optimizer, ours.mesh)
    start = time.perf_counter()
    jax.block_until_ready(checkpoints.restore(step, wanted))
    return time.perf_counter() - start


def with_torch(shapes: Sequence[tuple[int, ...]], file: Path) -> tuple[float, float]:
    """Seconds that torch takes to save tensors of these shapes, parameters and two moments, and to load them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = {str(number): torch.rand(shape, device=device) for number, shape in enumerate(shapes)}
    saved = timed(lambda: torch.save(tensors, file))
    tensors.clear()
    loaded = timed(lambda: torch.load(file, map_location=device))
    file.unlink()
    return saved, loaded


def main() -> None:
    """Measures, and writes the table and the file."""
    parser = arguments(__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="saves and restores")
    parser.add_argument("--updates", type=int, default=3, help="without a save, before each")
    parser.add_argument("--directory", type=Path, help="where to write; by default the temporary one")
    args, extra = parser.parse_known_args()
    flags = extra if "--config" in extra else SMALL + extra
    runtime.use_single_malloc_arena()
    try:
        config = training_config(flags)
    except UserError as error:
        parser.error(str(error))

    ours = Ours(config)
    ours.updates(3)
    shapes = [leaf.shape for leaf in jax.tree.leaves(ours.state)]
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(ours.state))
    alone: list[float] = []
    saves, restores = [], []
    theirs: dict[str, list[float]] = {"save_s": [], "load_s": []}
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        directory = Path(temporary)
        with Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
            for repetition in range(args.repeat + 1):  # the first warms up
                undisturbed = [timed(lambda: ours.updates(1)) for _ in range(args.updates)]
                saved = save(ours, checkpoints, directory / "checkpoints")
                checkpoints.wait()
                restored = restore(ours, checkpoints, saved["step"])
                torch_saved, torch_loaded = with_torch(shapes, directory / "state.pt")
                if repetition:
                    alone += undisturbed
                    saves.append(saved)
                    restores.append(restored)
                    theirs["save_s"].append(torch_saved)
                    theirs["load_s"].append(torch_loaded)
    update = statistics.median(alone)
    for saved in saves:
        saved["blocked"] = saved["blocked_s"] / update
        saved["slower"] = sum(seconds - update for seconds in saved["updates_s"]) / update
        saved["stall"] = saved["blocked"] + saved["slower"]

    def median(name: str) -> float:
        return float(np.median([saved[name] for saved in saves]))

    figures = {
        "flags_of_training": flags,
        "bytes": n_bytes,
        "update_s": update,
        "blocked": median("blocked"),
        "slower": median("slower"),
        "stall": median("stall"),
        "written_s": median("written_s"),
        "restore_s": statistics.median(restores),
        "torch_save_s": statistics.median(theirs["save_s"]),
        "torch_load_s": statistics.median(theirs["load_s"]),
        "restore_ratio": statistics.median(restores) / statistics.median(theirs["load_s"]),
        "runs": {"alone_s": alone, "saves": saves, "restore_s": restores, "torch": theirs},
    }
    print(f"{n_bytes / 1e9:.2f} GB; an update takes {update:.2f} s")
    print(f"a save blocks {figures['blocked']:.2f} updates, those that follow take {figures['slower']:.2f} longer: "
          f"{figures['stall']:.2f}; on disk after {figures['written_s']:.2f} s")  # fmt: skip
    print(f"torch.save blocks {figures['torch_save_s'] / update:.2f} updates ({figures['torch_save_s']:.2f} s)")
    print(f"restore {figures['restore_s']:.2f} s, torch.load {figures['torch_load_s']:.2f} s")
    name = f"checkpoint-{slug(jax.devices()[0].device_kind)}"
    print(write(name, PACKAGES, figures, results=args.results))


if __name__ == "__main__":
    main()
