"""The cost of a checkpoint for the training that runs meanwhile, and the time to restore it, beside torch.

    python bench/checkpoint.py
    python bench/checkpoint.py --config gpt2-124m --batch_size 16 --micro_batch_size 16

Updates run one by one, and after some of them the state is saved. The call that saves blocks. The updates after it,
until the checkpoint is complete and for three more, take longer than the median update without a save. The sum
of both, in units of that median, is the stall. `torch.save` and `torch.load` write and read as many bytes in the same
directory, and block. No one waits for the disk beyond what the libraries do. Flags are those of training, by default
124M with 2 sequences of 1,024 tokens, as bench/peers.py takes. On CPUs, writing competes with training for processor
time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import jax
import torch
from peers import CASES
from record import Figures, Rows, arguments, duration, median_of, take_turns, timed, write
from trainers import Ours, training_config

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.checkpoint_info import COMPLETE
from gpt2_jax.step import abstract_state

ALONE = 3  # updates without a save, before each save
AFTER = 3  # updates that count as disturbed after the checkpoint is complete


def save(ours: Ours, checkpoints: Checkpoints) -> Figures:
    """Saves and trains until the checkpoint is complete and `AFTER` updates longer: seconds of the call and updates."""
    step = int(ours.state.step)
    start = time.perf_counter()
    blocked = timed(lambda: checkpoints.save(step, ours.state, {"data": "random"}))
    updates: list[float] = []
    written, last = None, 0
    while written is None or len(updates) < last:
        updates.append(timed(lambda: ours.updates(1)))
        if written is None and (checkpoints.directory / str(step) / COMPLETE).exists():
            written, last = time.perf_counter() - start, len(updates) + AFTER
    checkpoints.wait()
    return {"step": step, "blocked_s": blocked, "written_s": written, "updates_s": updates}


def with_torch(ours: Ours, file: Path) -> dict[str, float]:
    """Seconds that torch takes to save tensors of the same shapes, and to load them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = [torch.rand(leaf.shape, device=device) for leaf in jax.tree.leaves(ours.state)]
    saved = timed(lambda: torch.save(tensors, file))
    tensors.clear()
    loaded = timed(lambda: torch.load(file, map_location=device))
    file.unlink()
    return {"torch_save_s": saved, "torch_load_s": loaded}


def cycle(ours: Ours, checkpoints: Checkpoints) -> Figures:
    """Updates without a save, then a save and a restore by each."""
    alone = [timed(lambda: ours.updates(1)) for _ in range(ALONE)]
    figures = {"alone_s": alone, **save(ours, checkpoints)}
    state = abstract_state(ours.model, ours.config.optimizer, ours.mesh)
    restore = timed(lambda: jax.block_until_ready(checkpoints.restore(figures["step"], state)))
    return {**figures, "restore_s": restore, **with_torch(ours, checkpoints.directory.parent / "state.pt")}


def rows(figures: Figures) -> Rows:
    """The updates that one save costs."""
    details = (
        f"the call {figures['blocked']:.2f}, the updates after it {figures['slower']:.2f}; "
        f"an update takes {duration(figures['update_s'])}; "
        f"{figures['bytes'] / 1e9:.2f} GB, restored in {duration(figures['restore_s'])}"
    )
    return {"updates that a save costs": (figures["stall"], details)}


def main() -> None:
    """Measures and writes the file."""
    parser = arguments(__doc__, repeat=3)
    args, extra = parser.parse_known_args()
    flags = extra if "--config" in extra else CASES["124m"] + extra
    ours = Ours(training_config(flags))
    ours.updates(3)
    with (
        tempfile.TemporaryDirectory() as temporary,
        Checkpoints(Path(temporary) / "checkpoints", keep=2) as checkpoints,
    ):
        runs = take_turns({"saves": lambda: cycle(ours, checkpoints)}, args.repeat)["saves"]
    update = statistics.median(seconds for run in runs for seconds in run["alone_s"])
    for run in runs:
        run["blocked"] = run["blocked_s"] / update
        run["slower"] = sum(seconds - update for seconds in run["updates_s"]) / update
        run["stall"] = run["blocked"] + run["slower"]
    names = ("blocked", "slower", "stall", "written_s", "restore_s", "torch_save_s", "torch_load_s")
    medians = {name: median_of(runs, name) for name in names}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(ours.state))
    figures = {"flags_of_training": flags, "bytes": size, "update_s": update, **medians, "runs": runs}
    figures["restore_ratio"] = medians["restore_s"] / medians["torch_load_s"]
    write("checkpoint", figures, rows(figures), args.results)


if __name__ == "__main__":
    main()
