"""The cost of a checkpoint for the training that runs meanwhile, and the time to restore it, beside torch.

    python bench/checkpoint.py
    python bench/checkpoint.py --config gpt2-124m --batch_size 16 --micro_batch_size 16

Updates run one by one, and after some of them the state is saved. The call that saves blocks. The updates after it,
until the checkpoint has its final name and for three more, take longer than the median update without a save. The sum
of both, in units of that median, is the stall. `torch.save` and `torch.load` write and read as many bytes in the same
directory, and block. No one waits for the disk beyond what the libraries do. Flags are those of training, by default
124M with 2 sequences of 1,024 tokens, as bench/peers.py takes on a CPU. There, writing competes with training for
processor time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import torch
from record import arguments, slug, timed, write
from trainers import Ours, training_config

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.errors import UserError
from gpt2_jax.step import abstract_state

SMALL = ["--config", "gpt2-124m", "--batch_size", "2", "--micro_batch_size", "2"]
AFTER = 3  # updates that count as disturbed after the checkpoint is complete


def save(ours: Ours, checkpoints: Checkpoints) -> dict[str, Any]:
    """Saves and trains until the checkpoint is complete and `AFTER` updates longer: seconds of the call and updates."""
    step = int(ours.state.step)
    start = time.perf_counter()
    blocked = timed(lambda: checkpoints.save(step, ours.state, {"data": "random"}))
    updates: list[float] = []
    written, after = None, 0
    while after < AFTER:
        updates.append(timed(lambda: ours.updates(1)))
        if written is not None:
            after += 1
        elif (checkpoints.directory / str(step)).exists():  # renamed when complete
            written = time.perf_counter() - start
    checkpoints.wait()
    return {"step": step, "blocked_s": blocked, "written_s": written, "updates_s": updates}


def restore(ours: Ours, checkpoints: Checkpoints, step: int) -> float:
    """Seconds until a saved state is on the device."""
    state = abstract_state(ours.model, ours.config.optimizer, ours.mesh)
    return timed(lambda: jax.block_until_ready(checkpoints.restore(step, state)))


def with_torch(shapes: Sequence[tuple[int, ...]], file: Path) -> tuple[float, float]:
    """Seconds that torch takes to save tensors of these shapes, and to load them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = {str(number): torch.rand(shape, device=device) for number, shape in enumerate(shapes)}
    saved = timed(lambda: torch.save(tensors, file))
    tensors.clear()
    loaded = timed(lambda: torch.load(file, map_location=device))
    file.unlink()
    return saved, loaded


def main() -> None:
    """Measures, prints the figures and writes the file."""
    parser = arguments(__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="saves and restores")
    parser.add_argument("--updates", type=int, default=3, help="without a save, before each")
    parser.add_argument("--directory", type=Path, help="where to write; by default the temporary directory")
    args, extra = parser.parse_known_args()
    flags = extra if "--config" in extra else SMALL + extra
    try:
        ours = Ours(training_config(flags))
    except UserError as error:
        parser.error(str(error))
    ours.updates(3)
    leaves = jax.tree.leaves(ours.state)
    shapes, n_bytes = [leaf.shape for leaf in leaves], sum(leaf.nbytes for leaf in leaves)
    del leaves  # the next update donates them
    alone: list[float] = []
    saves: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        directory = Path(temporary)
        with Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
            for repetition in range(args.repeat + 1):  # the first warms up
                undisturbed = [timed(lambda: ours.updates(1)) for _ in range(args.updates)]
                saved = save(ours, checkpoints)
                saved["restore_s"] = restore(ours, checkpoints, saved["step"])
                saved["torch_save_s"], saved["torch_load_s"] = with_torch(shapes, directory / "state.pt")
                if repetition:
                    alone += undisturbed
                    saves.append(saved)
    update = statistics.median(alone)
    for saved in saves:
        saved["blocked"] = saved["blocked_s"] / update
        saved["slower"] = sum(seconds - update for seconds in saved["updates_s"]) / update
        saved["stall"] = saved["blocked"] + saved["slower"]
    names = ("blocked", "slower", "stall", "written_s", "restore_s", "torch_save_s", "torch_load_s")
    median = {name: statistics.median(saved[name] for saved in saves) for name in names}
    print(f"{n_bytes / 1e9:.2f} GB; an update takes {update:.2f} s")
    print(f"a save blocks {median['blocked']:.2f} updates, those after it take {median['slower']:.2f} longer: "
          f"{median['stall']:.2f}; on disk after {median['written_s']:.2f} s")  # fmt: skip
    print(f"torch.save blocks {median['torch_save_s'] / update:.2f} updates ({median['torch_save_s']:.2f} s)")
    print(f"restore {median['restore_s']:.2f} s, torch.load {median['torch_load_s']:.2f} s")
    figures = {"flags_of_training": flags, "bytes": n_bytes, "update_s": update, **median,
               "restore_ratio": median["restore_s"] / median["torch_load_s"],
               "runs": {"alone_s": alone, "saves": saves}}  # fmt: skip
    print(write(f"checkpoint-{slug(jax.devices()[0].device_kind)}", figures, results=args.results))


if __name__ == "__main__":
    main()
