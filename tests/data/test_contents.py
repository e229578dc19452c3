"""Data that changed between two starts or differs between two hosts, also in the middle of a file."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from token_files import write_llmc, write_nanogpt

from gpt2_jax import train as training
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import DataConfig
from gpt2_jax.config.toml import read_config
from gpt2_jax.config.validation import validate
from gpt2_jax.data import contents as contents_module
from gpt2_jax.data.contents import Contents
from gpt2_jax.data.manifest import Manifest, Shard, read_manifest
from gpt2_jax.errors import UserError

TOKENS = np.random.default_rng(0).integers(0, 256, 60_000)
OTHERS = np.concatenate([TOKENS[:10_000], TOKENS[10_000:50_000] ^ 1, TOKENS[50_000:]])  # 40,000 in the middle


@pytest.fixture
def files(tmp_path):
    """Two token files and a run directory."""
    for name in ("train", "val"):
        write_nanogpt(tmp_path / f"{name}.bin", TOKENS)
    (tmp_path / "run").mkdir()
    return [tmp_path / "train.bin", tmp_path / "val.bin"]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(directory, paths, later=1):
    """The manifest of `prepare`, written some seconds after the files."""
    shards = tuple(Shard(path.name, len(TOKENS), 1, digest(path)) for path in paths)
    (directory / "manifest.json").write_text(Manifest({"tokenizer": "bytes"}, 1, 0, shards).to_json())
    assert read_manifest(directory) is not None
    newest = max(path.stat().st_mtime for path in paths)
    os.utime(directory / "manifest.json", (newest + later, newest + later))


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read to hash them."""
    names, sha256 = [], contents_module.sha256

    def watched(path):
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(contents_module, "sha256", watched)
    return names


def open_contents(files, run, process=0):
    contents = Contents(files, run, process)
    assert contents.hash_rest() == 0
    return contents


def test_files_are_hashed_once(files, hashed, tmp_path):
    run = tmp_path / "run"
    assert open_contents(files, run).sha256 == [digest(path) for path in files]
    assert hashed == ["train.bin", "val.bin"]
    assert open_contents(files, run).sha256 == [digest(path) for path in files]
    assert len(hashed) == 2
    moved = [path.rename(path.with_name("moved-" + path.name)) for path in files]
    assert open_contents(moved, run).sha256 == [digest(path) for path in moved]
    assert len(hashed) == 2
    shutil.copy(moved[0], files[0])  # the same content in another file
    assert open_contents([files[0], moved[1]], run).sha256 == [digest(path) for path in moved]
    assert hashed[2:] == ["train.bin"]
    os.utime(moved[1], (1, 1))
    assert open_contents([files[0], moved[1]], run).sha256 == [digest(path) for path in moved]
    assert hashed[3:] == ["moved-val.bin"]


def test_prepared_files_are_known_without_reading_them(files, hashed, tmp_path):
    write_manifest(tmp_path, files)
    assert open_contents(files, tmp_path / "run").sha256 == [digest(path) for path in files]
    assert hashed == []
    assert not list((tmp_path / "run").iterdir())


def test_a_prepared_file_that_is_newer_than_its_manifest_is_hashed_and_compared(files, hashed, tmp_path):
    write_manifest(tmp_path, files)
    os.utime(files[0])  # copied, but the same
    os.utime(files[0], (time.time() + 60, time.time() + 60))
    open_contents(files, tmp_path / "run").check([], tmp_path / "run")
    assert hashed == ["train.bin"]
    write_nanogpt(files[0], OTHERS)
    os.utime(files[0], (time.time() + 60, time.time() + 60))
    with pytest.raises(
        UserError, match=r"train.bin is damaged: its SHA-256 is .*, but the manifest has .*; copy or prep"
    ):
        open_contents(files, tmp_path / "run").check([], tmp_path / "run")


def test_large_files_are_hashed_in_the_background(files, hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(contents_module, "FOREGROUND_BYTES", 100_000)
    go, sha256 = threading.Event(), contents_module.sha256
    monkeypatch.setattr(contents_module, "sha256", lambda path: (go.wait(60), sha256(path))[1])
    contents = Contents(files, tmp_path / "run", 0)
    assert contents.hash_rest() == 240_000
    assert contents.sha256 == [None, None]
    contents.check(["00" * 32, None], tmp_path)  # not known yet
    go.set()
    deadline = time.monotonic() + 60
    while None in contents.sha256 or len(json.loads((tmp_path / "run" / "data.json").read_text())["files"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(
        UserError, match=r"the data of .* has changed: the SHA-256 of .*train.bin is .*, and was 000000"
    ):
        contents.check(["00" * 32, None], tmp_path)
    assert Contents(files, tmp_path / "run", 0).hash_rest() == 0
    assert len(hashed) == 2


def test_a_file_that_changes_while_it_is_hashed_stays_unknown(files, tmp_path, monkeypatch):
    def changes(path):
        path.write_bytes(path.read_bytes() + b"12")
        return "00" * 32

    monkeypatch.setattr(contents_module, "sha256", changes)
    assert open_contents(files, tmp_path / "run").sha256 == [None, None]
    assert Contents(files, tmp_path / "run", 0).sha256 == [None, None]


# --- several hosts -------------------------------------------------------------------------------------


def test_processes_with_the_same_files_hash_them_once(files, hashed, tmp_path):
    first, second = (Contents(files, tmp_path / "run", process) for process in (0, 1))
    second.agree(first.state())
    assert second.hash_rest() == 0
    assert second.sha256 == [None, None]
    first.hash_rest()
    second.agree(first.state())
    assert second.sha256 == first.sha256 == [digest(path) for path in files]
    assert len(hashed) == 2


@pytest.mark.parametrize("change", [False, True])
def test_hosts_with_copies_of_their_own_compare_them(files, hashed, change, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for path in files:
        shutil.copy2(path, here)
    if change:
        times = files[0].stat()
        write_nanogpt(here / "train.bin", OTHERS)
        os.utime(here / "train.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    first = open_contents(files, tmp_path / "run")
    own = [here / path.name for path in files]
    for known in (False, True):  # at the second start, what process 1 kept is known
        second = Contents(own, tmp_path / "run", 1)
        assert second.sha256 == ([digest(path) for path in own] if known else [None, None])
        if not known:
            second.agree(first.state())
        assert second.hash_rest() == 0
        assert len(hashed) == 4
        if change:
            with pytest.raises(UserError, match=r"the data differs from process 0: .*here/train.bin has the SHA-256 "):
                second.agree(first.state())
        else:
            second.agree(first.state())


# --- runs ----------------------------------------------------------------------------------------------


def config_of(tmp_path, steps, **data):
    """A run that takes no time."""
    config = read_config("quickstart")
    model = dataclasses.replace(config.model, block_size=8, n_layer=1, n_head=1, n_embd=8, dropout=0.0)
    config = dataclasses.replace(
        config,
        out=str(tmp_path / "run"),
        steps=steps,
        batch_size=2,
        micro_batch_size=2,
        batch_ramp=(),
        model=model,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0, decay_steps=8),
        eval=dataclasses.replace(config.eval, every=0, tokens=16, sample_tokens=0),
        checkpoint=dataclasses.replace(config.checkpoint, every=1),
        data=DataConfig(**data, tokenizer="bytes"),
    )
    validate(config)
    return config


def train(config):
    assert training.train(config, jax.devices()[:1]) == 0


def newest_info(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints", 9) as checkpoints:
        return checkpoints.info(checkpoints.latest())


def test_a_run_is_not_resumed_with_data_that_changed_in_the_middle(files, tmp_path, monkeypatch, capsys):
    data = {"train": str(files[0]), "val": str(files[1])}
    shutil.rmtree(tmp_path / "run")
    train(config_of(tmp_path, 1, **data))
    assert newest_info(tmp_path)["sha256"] == [digest(path) for path in files]
    write_nanogpt(files[0], OTHERS)
    with pytest.raises(
        UserError, match=r"the data of .*run has changed: the SHA-256 of .*train.bin is .* restore the ol"
    ):
        train(config_of(tmp_path, 2, **data))
    assert "in the background" not in capsys.readouterr().out

    # Where hashing takes long, the run starts, and ends before it saves anything.
    write_nanogpt(files[0], OTHERS[::-1][::-1])
    monkeypatch.setattr(contents_module, "FOREGROUND_BYTES", 0)
    started, save = [], training.RunCheckpoints.save
    hashing, sha256 = threading.Event(), contents_module.sha256
    monkeypatch.setattr(contents_module, "sha256", lambda path: hashing.wait(60) and sha256(path))

    def wait(self, *args):
        started.append(args[0])
        hashing.set()
        deadline = time.monotonic() + 60
        while None in self._contents.sha256:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        save(self, *args)

    (tmp_path / "run" / "data.json").unlink()
    monkeypatch.setattr(training.RunCheckpoints, "save", wait)
    with pytest.raises(UserError, match=r"the data of .*run has changed"):
        train(config_of(tmp_path, 2, **data))
    assert started[0] == 2
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1"]
    text = capsys.readouterr().out
    assert "checksums 240kB of token files are being hashed in the background, once; until then, changes in" in text

    write_nanogpt(files[0], TOKENS)
    train(config_of(tmp_path, 2, **data))
    assert newest_info(tmp_path)["sha256"] == [digest(path) for path in files]


def test_checkpoints_of_older_versions_are_resumed(files, tmp_path, monkeypatch):
    """They know only the sizes and the ends of the files."""
    shutil.rmtree(tmp_path / "run")
    data = {"train": str(files[0]), "val": str(files[1])}
    with monkeypatch.context() as patch:
        patch.setattr(
            "gpt2_jax.checkpoint.seal", lambda step, loss, info: {key: info[key] for key in ("data", "layout")}
        )
        train(config_of(tmp_path, 1, **data))
    assert newest_info(tmp_path).keys() == {"data", "layout"}
    train(config_of(tmp_path, 2, **data))
    assert newest_info(tmp_path)["sha256"] == [digest(path) for path in files]
    write_llmc(files[0], TOKENS[:50_000])
    with pytest.raises(UserError, match=r"the data of .*run has changed \(60000 \+ 60000 tokens, .* -> 50000 \+ 60000"):
        train(config_of(tmp_path, 3, **data))


def test_hosts_compare_at_the_start_and_at_each_checkpoint(files, tmp_path, monkeypatch):
    """Process 0 has another content in the middle of a file, and knows it before or after this process starts."""
    shutil.rmtree(tmp_path / "run")
    data = {"train": str(files[0]), "val": str(files[1])}
    for known_from in (0, 2):
        calls = itertools.count()

        def theirs(name, value, calls=calls, known_from=known_from):
            if name != "contents":
                return value
            other = "00" * 32 if next(calls) >= known_from else None
            return json.dumps([[size, time, inode + 1, other] for size, time, inode, _ in json.loads(value)])

        monkeypatch.setattr("gpt2_jax.run.checkpoints.broadcast_from_primary", theirs)
        with pytest.raises(UserError, match=r"the data differs from process 0: .*train.bin has the SHA-256 "):
            train(config_of(tmp_path, 3, **data))
        assert (tmp_path / "run").exists() == bool(known_from)  # a refused start leaves nothing
        saved = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*")}
        assert saved == ({"1"} if known_from else set())
