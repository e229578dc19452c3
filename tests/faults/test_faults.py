"""What goes wrong while a run trains: numbers, disks, devices and signals. Nothing wrong is kept, nothing is lost."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faulty import command, names, rows, run
from xla_flags import FAST_COMPILE

from gpt2_jax import loss_scale
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.checkpoint_info import read_info
from gpt2_jax.errors import DivergedError, ReplicaError, SaveError, UserError
from gpt2_jax.train import EXIT_CODES

# --- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["loss", pytest.param("param_norm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("update", [6, pytest.param(7, marks=pytest.mark.slow)])  # at a save, and after one
def test_what_is_not_finite_is_never_saved(flags, tmp_path, after_update, metric, update):
    nan = jnp.float32(np.nan)
    after_update(update, lambda state, metrics: (state, metrics._replace(**{metric: nan})))
    saved = 2 * ((update - 1) // 2)
    with pytest.raises(DivergedError, match=rf"update {update} has .* nan.*; checkpoints/{saved} is from before"):
        run(flags, tmp_path / "run")
    assert names(tmp_path / "run") == [str(step) for step in range(2, update, 2)]
    assert max(row["step"] for row in rows(tmp_path / "run")) == update - 1


@pytest.mark.slow
@pytest.mark.parametrize(("value", "update"), [(1e6, 8), (np.nan, 6)])
def test_a_float16_run_that_diverged_is_no_overflow(flags, tmp_path, after_update, monkeypatch, value, update):
    """1e6 is infinite in float16 at any scale: the third overflow is at the smallest one. NaN is no overflow at all."""
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 4.0)
    broken = jax.jit(partial(jax.tree.map, lambda leaf: jnp.full_like(leaf, value)))
    after_update(5, lambda state, metrics: (state._replace(params=broken(state.params)), metrics))
    message = rf"update {update} has loss nan, gradient norm nan at loss scale \d and parameters of norm .* from before"
    with pytest.raises(DivergedError, match=message):
        run(flags, tmp_path / "run", "--dtype", "float16")
    skipped = [row["step"] for row in rows(tmp_path / "run") if "skipped" in row]
    assert skipped == list(range(6, update))


@pytest.mark.slow
def test_a_learning_rate_beyond_any_number_is_found_at_update_1(flags, tmp_path):
    huge = ("--optimizer.learning_rate", "3e38", "--optimizer.warmup_steps", 1)
    with pytest.raises(DivergedError, match=r"update 1 has .* parameters of norm inf; nothing was saved"):
        run(flags, tmp_path / "run", *huge)
    assert not (tmp_path / "run").exists()  # nothing was trained in it


# --- disks ---------------------------------------------------------------------------------------------


@pytest.fixture
def failing_saves(monkeypatch):
    """`failing_saves(n)` lets the first n saves of a run fail, each with the error of a full disk."""
    save = Checkpoints.save

    def failing_saves(number):
        failures = iter(range(number))

        def fail(self, step, *args):
            if next(failures, None) is not None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(self, step, *args)

        monkeypatch.setattr(Checkpoints, "save", fail)

    return failing_saves


def test_a_save_that_fails_is_tried_again_at_the_next(flags, whole, tmp_path, failing_saves, capsys):
    failing_saves(2)
    out = tmp_path / "run"
    assert run(flags, out) == 0
    line = "a checkpoint could not be saved (No space left on device); the newest is missing; training continues, and "
    assert capsys.readouterr().out.count(f"{line}tries again at the next save\n") == 2
    assert names(out) == ["10", "6", "8"]
    assert rows(out) == rows(whole)


def test_saves_that_keep_failing_end_the_run_with_code_1(flags, tmp_path, failing_saves):
    failing_saves(9)
    message = (
        r"could not be saved \(No space left on device\); the newest is missing; 2 saves in a row failed; fix that"
    )
    with pytest.raises(SaveError, match=message):
        run(flags, tmp_path / "run", "--checkpoint.max_failures", 2)
    assert EXIT_CODES[SaveError] == 1


@pytest.mark.parametrize(("free", "warns"), [(10_000, True), pytest.param(100_000, False, marks=pytest.mark.slow)])
def test_a_run_says_what_it_will_write_and_warns_if_the_disk_is_too_small(
    stopped, whole, flags, monkeypatch, capsys, free, warns
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 0, free))
    out = stopped(4, 6, 8)
    params = 257 * 8 + 127 * 8 + 8 * 8 + 4 * 8 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 2 * 8
    n_bytes = 3 * 4 * params + 3 * 4  # with both moments, the step and the optimizer's two counts
    assert run(flags, out, "--checkpoint.keep", 2) == 0
    output = capsys.readouterr().out
    assert (
        f"saves     {n_bytes / 1000:.3g}kB each, up to 4 at once; {free / 1000:g}kB free" in output
    )  # 2, the best, a new one
    assert (f"checkpoints needs {n_bytes / 1000:.3g}kB more, and its disk has 10kB; make room, or" in output) == warns
    assert names(out) == ["10", "8"]


@pytest.mark.parametrize(
    ("name", "update", "message"),
    [
        pytest.param(
            "metrics.jsonl",
            6,
            r"metrics.jsonl was deleted while the run trains; start it again to resume from",
            marks=pytest.mark.slow,
        ),
        pytest.param("", 3, r"run/\S+ was deleted while the run trains; start it again", marks=pytest.mark.slow),
        pytest.param("checkpoints", 3, r"run/checkpoints was deleted while the run", marks=pytest.mark.slow),
    ],
)
def test_what_is_deleted_while_a_run_trains_is_one_line(flags, whole, tmp_path, after_update, name, update, message):
    out, flags = tmp_path / "run", [*flags, "--checkpoint.every", "5"]

    def delete(*_):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    after_update(update, delete)
    with pytest.raises(UserError, match=message):
        run(flags, out)
    assert not (out / name).exists()
    after_update(0, delete)  # never
    assert run(flags, out) == 0
    assert rows(out)[-1] == rows(whole)[-1]


# --- devices -------------------------------------------------------------------------------------------


def flip(bit):
    """Returns what flips this bit of one element on the last device, for `after_update`."""

    def act(state, metrics):
        leaf = state.params["ln_f"]["scale"]
        copies = [np.array(shard.data) for shard in leaf.addressable_shards]
        copies[-1].view(np.uint32)[3] ^= 1 << bit
        placed = jax.device_put(copies, [shard.device for shard in leaf.addressable_shards])
        state.params["ln_f"]["scale"] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)
        return state, metrics

    return act


def test_a_replica_with_one_flipped_bit_is_found_at_the_next_check_and_named(flags, tmp_path, after_update, capsys):
    after_update(5, flip(7))
    few = ("--checkpoint.every", 4, "--eval.every", 0, "--log.check_replicas", 1)
    assert command(flags, tmp_path / "run", *few) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: after update 5, the training state on cpu:7 differs from its copies on other")
    assert line.endswith("checkpoints/4 is from before")
    assert names(tmp_path / "run") == ["4"]


@pytest.mark.slow
def test_a_run_with_a_flipped_bit_goes_back_by_itself_and_ends_as_the_undisturbed_one(
    flags, tmp_path, after_update, capsys
):
    few = ("--checkpoint.every", 4, "--log.on_mismatch", "restore")  # compares at the saves: after 4, 8 and 10
    assert run(flags, tmp_path / "whole", *few, devices=2) == 0
    capsys.readouterr()
    after_update(6, flip(29))  # a high bit: the losses of updates 7 and 8 are other ones too
    assert run(flags, tmp_path / "run", *few, devices=2) == 0
    found = "after update 8, the training state on cpu:0, cpu:1 differs from its copies on other devices: "
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(found)]
    assert [line.partition("; ")[2] for line in lines] == ["continuing from checkpoints/4"]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    ends = [read_info(tmp_path / out / "checkpoints" / "10")["fingerprint"] for out in ("run", "whole")]
    assert ends[0] == ends[1]
    assert names(tmp_path / "run") == names(tmp_path / "whole") == ["10", "4", "8"]


@pytest.mark.slow
def test_a_device_that_always_computes_wrongly_ends_the_run_after_one_return(flags, tmp_path, after_update, capsys):
    after_update(6, flip(7), times=9)
    always = ("--checkpoint.every", 4, "--log.check_replicas", 1, "--log.on_mismatch", "restore")
    with pytest.raises(ReplicaError, match=r"after update 5, .*; the run has already gone back to checkpoints/4 for"):
        run(flags, tmp_path / "run", *always, devices=2)
    assert capsys.readouterr().out.count("; continuing from checkpoints/4\n") == 1
    assert names(tmp_path / "run") == ["4"]
    assert max(row["step"] for row in rows(tmp_path / "run")) == 5
    after_update(0, flip(7))  # never
    assert run(flags, tmp_path / "run", *always, devices=2) == 0  # another machine, or a repaired one


# --- signals -------------------------------------------------------------------------------------------

TERMINATED = """
import os, signal
from gpt2_jax import train
train.sample_text = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
from gpt2_jax.train import command
command()
"""


@pytest.mark.slow
def test_a_signal_during_the_summary_leaves_the_last_save_whole(flags, whole, tmp_path):
    """A process of its own."""
    out = tmp_path / "run"
    words = [sys.executable, "-c", TERMINATED, *flags, "--out", str(out)]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=200)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    assert rows(out) == rows(whole)
    assert run(flags, out) == 0
    assert rows(out) == rows(whole)
    assert names(out) == names(whole)
