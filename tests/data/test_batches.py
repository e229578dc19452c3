"""`python -m gpt2_jax.data RUN --update N`, compared with the bytes of the files and the batches of training."""

import json
import re
import shutil
import subprocess
import sys
from ast import literal_eval
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_files import write_llmc, write_nanogpt, write_npy

from gpt2_jax import load
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import (
    CheckpointConfig,
    DataConfig,
    GPT2Config,
    LogConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from gpt2_jax.config.toml import to_toml
from gpt2_jax.data import open_data
from gpt2_jax.data.__main__ import main
from gpt2_jax.data.order import BatchSchedule
from gpt2_jax.data.pipeline import BatchSource
from gpt2_jax.errors import UserError
from gpt2_jax.metrics import read_rows
from gpt2_jax.train import train

BLOCK = 8
END = 256  # end-of-text of the tokenizer of bytes
HEADERS = {".npy": 128, ".llmc.bin": 1024, ".bin": 0}  # bytes before the first token
TOKEN_FILE = re.compile(r"\nsequence (\d+): (?:(\S+): )?(\S+), tokens ([\d,]+) to ([\d,]+):\n    (.*)")
TEXT_FILE = re.compile(
    r"\nsequence (\d+): (\S+), byte ([\d,]+) \(tokens ([\d,]+) to ([\d,]+) of the training .*\n    (.*)"
)


def number(text):
    return int(text.replace(",", ""))


def as_text(tokens):
    """The tokens of bytes as text, and those beyond them as the command shows them."""
    parts = [bytes([t]) if t < END else b"<|endoftext|>" if t == END else b"<|%d|>" % t for t in tokens]
    return b"".join(parts).decode("utf-8", "replace")


def write(path, seed, size, largest=END):
    tokens = np.random.default_rng(seed).integers(0, largest + 1, size)
    tokens[::13] = END
    writer = write_npy if path.suffix == ".npy" else write_llmc if path.suffixes[:1] == [".llmc"] else write_nanogpt
    writer(path, tokens)


def make_run(directory, data, steps=40, vocab_size=0, **keys):
    model = GPT2Config(vocab_size=vocab_size, block_size=BLOCK, n_layer=1, n_head=1, n_embd=8)
    keys = {"batch_size": 8, "seed": 3} | keys
    config = TrainConfig(out=str(directory), steps=steps, data=data, model=model, **keys)
    config = replace(config, optimizer=replace(config.optimizer, warmup_steps=0))
    directory.mkdir()
    (directory / "config.toml").write_text(to_toml(open_data(config)[1]))
    return config


def batch_of(config, update, micro_batches=1):
    """The batch that training reads, int [sequences, block_size + 1]."""
    data, config = open_data(config)
    schedule = BatchSchedule(config.batch_size, config.batch_ramp, BLOCK)
    source = BatchSource(data.train, schedule, dict.fromkeys(schedule.sizes(), micro_batches))
    return source[update - 1].reshape(-1, BLOCK + 1)


def show(capsys, run, update, *flags):
    assert main([str(run), "--update", str(update), *flags]) == 0
    return capsys.readouterr().out


def files(tmp_path, case):
    """The data of a case, and other keys of its run."""
    write(tmp_path / "val.bin", 99, 100)
    one, val = str(tmp_path / "a0.bin"), str(tmp_path / "val.bin")
    for name, size in (("a0.bin", 900), ("a1.llmc.bin", 500), ("a2.npy", 5), ("a3.npy", 300), ("b.llmc.bin", 250)):
        write(tmp_path / name, size, size, 299 if case == "beyond the tokenizer" else END)
    match case:
        case "one file":
            return DataConfig(train=one, val=val), {}
        case "beyond the tokenizer":
            return DataConfig(train=one, val=val), {"vocab_size": 300}
        case "several files":
            return DataConfig(train=str(tmp_path / "a*"), val=val), {}
        case "document starts":
            return DataConfig(train=str(tmp_path / "a*"), val=val, document_starts=True), {}
        case "ramp":  # 2 sequences until update 4, then 4 until update 9
            return DataConfig(train=one, val=val), {"batch_ramp": ((60, 2), (220, 4))}
        case "sources":
            sources = (SourceConfig(str(tmp_path / "a*"), 3.0), SourceConfig(str(tmp_path / "b*")))
            return DataConfig(sources=sources, val=val, document_starts=True), {"batch_ramp": ((100, 4),)}


@pytest.mark.parametrize(
    "case", ["one file", "beyond the tokenizer", "several files", "document starts", "ramp", "sources"]
)
def test_a_sequence_is_in_its_file_where_it_is_said_to_be(case, tmp_path, capsys):
    data, keys = files(tmp_path, case)
    config = make_run(tmp_path / "run", replace(data, tokenizer="bytes"), **keys)
    seen, consumed = set(), 0
    for update in range(1, 31):
        batch = batch_of(config, update, micro_batches=2)
        if update in (1, 4, 5, 9, 10, 30):
            text = show(capsys, tmp_path / "run", update, "--window-tokens", "99")
            assert text.startswith(
                f"update {update} of 40: {len(batch)} sequences of {BLOCK} tokens, after {consumed:,} tokens\n"
            )
            found = TOKEN_FILE.findall(text)
            assert [int(sequence) for sequence, *_ in found] == list(range(1, len(batch) + 1))
            for row, (_, glob, path, start, stop, shown) in zip(batch, found, strict=True):
                header = next(size for suffix, size in HEADERS.items() if path.endswith(suffix))
                tokens = np.fromfile(path, "<u2", BLOCK + 1, offset=header + 2 * number(start)).tolist()
                assert tokens == row.tolist()
                assert number(stop) == number(start) + BLOCK + 1
                assert literal_eval(shown) == as_text(tokens)
                letter = path.removeprefix(f"{tmp_path}/")[0]
                assert glob == (f"{tmp_path}/{letter}*" if case == "sources" else "")
                seen.add(path)
        consumed += len(batch) * BLOCK
    assert len(seen) == {"several files": 3, "document starts": 3, "sources": 4}.get(case, 1)


WORDS = ["naïve ", "日本\n", "x = 1\n", "\x1b[2J", "a ", "🎲"]


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "gpt2"])
@pytest.mark.parametrize("n_files", [1, 5])
def test_a_sequence_of_a_text_is_at_its_byte(tokenizer, n_files, tmp_path, capsys, gpt2_vocabulary):
    (tmp_path / "text" / "sub").mkdir(parents=True)
    for file in range(n_files):
        text = "".join(np.random.default_rng(file).choice(WORDS, 300))
        (tmp_path / "text" / ("sub" if file % 2 else "") / f"{file}.txt").write_text(text)
    data = DataConfig(text=str(tmp_path / "text/**/*.txt"), tokenizer=tokenizer)
    config = make_run(tmp_path / "run", data)
    starts = set()
    for update in (1, 2, 3):
        text = show(capsys, tmp_path / "run", update, "--window-tokens", "99")
        assert "\x1b" not in text
        found = TEXT_FILE.findall(text)
        assert len(found) == len(batch_of(config, update)) == 8
        opened, _ = open_data(config)
        for row, (_, name, byte, _, _, shown) in zip(batch_of(config, update), found, strict=True):
            content = (tmp_path / "text" / name).read_bytes()[number(byte) :]
            whole = opened.tokenizer.decode_bytes(row.tolist()).removeprefix(b"<|endoftext|>")
            inside = whole.split(b"<|endoftext|>")[0]  # a sequence may go on in the next file
            assert content
            assert content[: len(inside)] == inside[: len(content)]
            assert literal_eval(shown) == opened.tokenizer.decode_bytes(row.tolist()).decode("utf-8", "replace")
            starts.add((name, number(byte)))
    assert len(starts) > 20


def test_long_batches_and_sequences_are_shortened(tmp_path, capsys):
    data, _ = files(tmp_path, "one file")
    cache = {"compilation_cache": "/mine"}  # as runs of earlier versions name one
    make_run(tmp_path / "run", replace(data, tokenizer="bytes"), batch_size=20, **cache)
    text = show(capsys, tmp_path / "run", 1, "--window-tokens", "3")
    assert len(TOKEN_FILE.findall(text)) == 16
    assert text.endswith("' …\n\n… 4 more; --windows 20 shows all\n")
    assert len(TOKEN_FILE.findall(show(capsys, tmp_path / "run", 1, "--windows", "20"))) == 20
    for _, _, path, start, _, shown in TOKEN_FILE.findall(text):
        tokens = np.fromfile(path, "<u2", 3, offset=2 * number(start)).tolist()
        assert literal_eval(shown.removesuffix(" …")) == as_text(tokens)


def test_other_data_than_that_of_the_newest_checkpoint_is_an_error(tmp_path, capsys):
    data, _ = files(tmp_path, "several files")
    run = tmp_path / "run"
    config = make_run(run, replace(data, tokenizer="bytes"))
    opened, _ = open_data(config)
    assert "no checkpoint yet: nothing to compare the data with" in show(capsys, run, 2)
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(9, {"a": np.zeros(1)}, {"data": "other"})
        checkpoints.save(10, {"a": np.zeros(1)}, {"data": opened.fingerprint})
    before = sorted(run.rglob("*"))
    assert "the data is that of checkpoint 10" in show(capsys, run, 2)
    assert sorted(run.rglob("*")) == before
    shutil.rmtree(run / "checkpoints/10")
    with pytest.raises(UserError, match=r"the data of .*run has changed since checkpoint 9 \(other -> .*; restore the"):
        main([str(run), "--update", "2"])
    (run / "checkpoints/9/info/metadata").write_text("[]")
    with pytest.raises(UserError, match=r"/9 is damaged \(info/metadata is not an object\)"):
        main([str(run), "--update", "2"])


def test_a_change_in_the_middle_of_a_file_is_noticed_where_its_digest_is_known(tmp_path, capsys):
    """A manifest of other files with the same sizes and ends: the data was prepared again."""
    data, _ = files(tmp_path, "one file")
    run = tmp_path / "run"
    config = make_run(run, replace(data, tokenizer="bytes"))
    (run / "checkpoints/5/info").mkdir(parents=True)
    info = {"data": open_data(config)[0].fingerprint, "sha256": ["0" * 64, None]}
    (run / "checkpoints/5/info/metadata").write_text(json.dumps(info))
    (run / "checkpoints/5/commit_success.txt").touch()
    show(capsys, run, 1)  # unknown digests are not computed
    status = (tmp_path / "a0.bin").stat()
    kept = {
        "path": "",
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
        "sha256": "1" * 64,
    }
    (run / "data.json").write_text(json.dumps({"files": [kept]}))
    with pytest.raises(
        UserError, match=r"has changed: the SHA-256 of .*a0.bin is 111111111111…, and was 000000000000…"
    ):
        main([str(run), "--update", "1"])


def test_what_cannot_be_shown(tmp_path):
    data, _ = files(tmp_path, "one file")
    run = tmp_path / "run"
    make_run(run, replace(data, tokenizer="bytes"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.toml").write_text("[model]\nn_layer = 1\n")
    for arguments, message in (
        ([run, "--update", "0"], r"--update 0: .*run has the updates 1 to 40; type one of them"),
        ([run, "--update", "-3"], r"--update -3: .*run has the updates 1 to 40; type one of them"),
        ([run, "--update", "41"], r"--update 41: .*run has the updates 1 to 40; type one of them"),
        ([run], r"run is a run directory; type --update N"),
        ([tmp_path, "--update", "1"], r"has no config.toml; --update needs the directory of a run"),
        ([tmp_path / "none", "--update", "1"], r"has no config.toml; --update needs the directory of a run"),
        ([tmp_path / "model", "--update", "1"], r"config.toml is not the config of a run \(.*missing key out"),
        ([run, "--update", "1", "--tokenizer", "gpt2"], r"--tokenizer does not go with --update"),
        ([run, "--update", "1", "--windows", "-1"], r"--windows and --seed must be 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            main(list(map(str, arguments)))
    (tmp_path / "a0.bin").unlink()
    with pytest.raises(UserError, match=r"a0.bin' matches no file"):
        main([str(run), "--update", "1"])


def test_neither_jax_nor_grain_is_imported(tmp_path):
    data, _ = files(tmp_path, "sources")
    make_run(tmp_path / "run", replace(data, tokenizer="bytes"))
    program = (
        "import sys; from gpt2_jax.data.__main__ import main; main(sys.argv[1:]); "
        "print({'jax', 'grain', 'orbax'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run"), "--update", "3"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith("update 3 of 40")
    assert output.endswith("set()\n")


@pytest.mark.slow
def test_the_loss_of_an_update_is_that_of_the_sequences_that_are_shown(tmp_path, capsys):
    """The row with `step` N is about the parameters of checkpoint N − 1 and the sequences of update N."""
    data, keys = files(tmp_path, "ramp")
    run = tmp_path / "run"
    config = make_run(run, replace(data, tokenizer="bytes"), steps=6, **keys)
    config = replace(config, checkpoint=CheckpointConfig(1, 9), log=LogConfig(1), optimizer=OptimizerConfig(1e-2, 0, 0))
    assert train(config, jax.devices()[:1]) == 0
    losses = {row["step"]: row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row}
    for update in (4, 5, 6):
        capsys.readouterr()
        found = TOKEN_FILE.findall(show(capsys, run, update))
        tokens = np.stack([np.fromfile(path, "<u2", 9, offset=2 * number(start)) for _, _, path, start, _, _ in found])
        model = load(str(run / "checkpoints" / str(update - 1)))
        logits = model.model.apply({"params": model.params}, jnp.asarray(tokens[:, :-1], jnp.int32))
        logits = np.asarray(logits, np.float64)
        targets = np.take_along_axis(logits, tokens[:, 1:, None].astype(int), axis=-1)[..., 0]
        expected = np.mean(np.log(np.exp(logits).sum(axis=-1)) - targets)
        assert losses[update] == pytest.approx(expected, abs=2e-6)  # float32 has 5e-7 at 5.5 nats
        assert all(abs(losses[other] - expected) > 1e-4 for other in losses if other != update)
