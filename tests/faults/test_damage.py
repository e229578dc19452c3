"""Damaged checkpoints: which are set aside, what is used instead, and what is refused."""

import shutil
from contextlib import suppress

import jax
import numpy as np
import pytest
from faulty import names, rows, run

from gpt2_jax import load
from gpt2_jax.checkpoint import SavedState
from gpt2_jax.errors import DamagedError, DeletedError
from gpt2_jax.interop import runs


def largest(directory):
    return max((path for path in directory.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)


# Of each kind of file that a restart reads, the one that says most.
FILES = {
    "arrays": lambda checkpoint: largest(checkpoint / "state" / "ocdbt.process_0" / "d"),
    "index": lambda checkpoint: largest(checkpoint / "state" / "d"),
    "manifest": lambda checkpoint: checkpoint / "state" / "manifest.ocdbt",
    "tree": lambda checkpoint: checkpoint / "state" / "_METADATA",
    "facts": lambda checkpoint: checkpoint / "info" / "metadata",
    "loss": lambda checkpoint: checkpoint / "metrics" / "metrics",
}


def flip(out, step, kind):
    """Flips one bit in the middle of a file of a checkpoint."""
    path = FILES[kind](out / "checkpoints" / str(step))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damages",
    [
        {8: "arrays", 6: "manifest", 4: "loss"},  # the third is not restored, but found at the start
        *(pytest.param({8: kind}, marks=pytest.mark.slow) for kind in FILES),
    ],
    ids=lambda damages: ", ".join(damages.values()),
)
def test_one_flipped_bit_is_set_aside_and_the_checkpoint_before_is_used(stopped, whole, flags, capfd, damages):
    out = stopped(2, 4, 6, 8)
    for step, kind in damages.items():
        flip(out, step, kind)
    assert run(flags, out) == 0
    captured = capfd.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("damaged ")]
    used = max({2, 4, 6, 8} - damages.keys())
    aside = {step for step in damages if step > used or damages[step] in ("facts", "loss")}
    if damages == {8: "tree"}:  # its middle is the name of a part that restoring does not read
        aside &= {int(name.split(".")[0]) for name in names(out) if "damaged" in name}
        used = used if aside else 8
    assert sorted(lines) == sorted(lines[: len(aside)])
    for step in aside:
        assert any(
            f"checkpoints/{step} is damaged (" in line and line.endswith(f"now {step}.damaged") for line in lines
        )
    assert f"resumed after update {used}" in captured.out
    assert captured.err == ""
    assert rows(out) == rows(whole)  # the fingerprint of each saved state is in them
    assert [name for name in names(out) if "damaged" in name] == sorted(f"{step}.damaged" for step in aside)


@pytest.mark.parametrize("kind", ["arrays", "facts"])
def test_if_all_are_damaged_the_run_is_refused_and_nothing_is_renamed(stopped, flags, kind):
    out = stopped(6, 8)
    for step in (6, 8):
        flip(out, step, kind)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(DamagedError, match=r"checkpoints/8 is damaged .*, and no older one is intact; restore a copy"):
        run(flags, out)
    assert names(out) == ["6", "8"]
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["manifest", "facts"])
def test_strict_refuses_the_older_one(stopped, flags, kind):
    out = stopped(6, 8)
    flip(out, 8, kind)
    with pytest.raises(DamagedError, match=r"checkpoints/8 is damaged .*; leave out --checkpoint.strict"):
        run(flags, out, "--checkpoint.strict", "true")
    assert names(out) == ["6", "8"]


def test_a_reader_takes_the_next_if_its_checkpoint_is_deleted_between_open_and_read(stopped, tmp_path, monkeypatch):
    out, copy = stopped(6, 8), tmp_path / "8"
    shutil.copytree(out / "checkpoints" / "8", copy)
    expected = load(str(out / "checkpoints" / "6")).params
    opened = []

    class Deleting(SavedState):
        def __init__(self, path):
            super().__init__(path)
            opened.append(path.name)
            if path.name == "8":
                shutil.rmtree(path)

    monkeypatch.setattr(runs, "SavedState", Deleting)
    params = load(str(out)).params
    assert opened == ["8", "6"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    copy.rename(out / "checkpoints" / "8")
    with pytest.raises(DeletedError, match=r"checkpoints/8 was deleted while it was read; use a newer one"):
        load(str(out / "checkpoints" / "8"))


@pytest.mark.parametrize("kind", FILES)
def test_a_reader_of_a_damaged_checkpoint_gets_one_line(stopped, kind, capfd):
    out = stopped(8)
    flip(out, 8, kind)
    with suppress(DamagedError):  # not all of it is read
        load(str(out))
    assert capfd.readouterr().err == ""
