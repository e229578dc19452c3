"""Texts that the model continues at evaluations: rows of samples.jsonl, which leave the run as it is."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from gpt2_jax import load
from gpt2_jax import train as training
from gpt2_jax.checkpoint_info import read_info
from gpt2_jax.config.flags import parse_args
from gpt2_jax.data import open_data
from gpt2_jax.errors import UserError

TINY = """--config quickstart --steps 6 --batch_size 4 --optimizer.warmup_steps 2 --optimizer.decay_steps 6
--model.block_size 16 --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.dropout 0.1 --data.tokenizer chars
--checkpoint.every 2 --eval.every 2 --eval.prompt_tokens 20 --eval.sample_tokens 0 --log.every 1"""
PROMPTS = ["12 squared", "is 9, longer than the model's context", "1"]


@pytest.fixture
def run(tmp_path):
    """Trains a tiny model and returns its rows without speeds and the last fingerprint."""
    text = "".join(f"{number} squared is {number * number}, longer than the model's context\n" for number in range(99))
    (tmp_path / "text.txt").write_text(text)

    def run(out, *flags):
        args = [*TINY.split(), "--data.text", tmp_path / "text.txt", "--out", tmp_path / out, *flags]
        assert training.train(parse_args("train", "", list(map(str, args))), jax.devices()[:1]) == 0
        newest = max((tmp_path / out / "checkpoints").iterdir(), key=lambda path: int(path.name))
        rows = [{**row, "tokens_per_second": None} for row in rows_of(tmp_path / out / "metrics.jsonl")]
        return rows, read_info(newest)["fingerprint"]["state"]

    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_is_the_same_with_prompts_and_resumes_with_the_same_samples(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\n\n{PROMPTS[2]}\n")
    flags = ["--eval.prompts", PROMPTS[0], f"@{tmp_path}/prompts.txt"]
    whole = run("a", *flags)
    printed = capsys.readouterr().out
    assert whole == run("b")
    assert not (tmp_path / "b" / "samples.jsonl").exists()
    samples = rows_of(tmp_path / "a" / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [(k, text) for k in (2, 4, 6) for text in PROMPTS]
    assert all(row["tokens"] == row["step"] * 4 * 16 for row in samples)
    assert all(len(row["text"]) == 20 for row in samples)
    assert len({row["text"] for row in samples}) >= 3  # the model changes
    assert re.findall("^update ([246]): 12 squared", printed, re.MULTILINE) == ["2", "4", "6"]

    # What the API writes with the last checkpoint.
    expected = load(str(tmp_path / "a")).generate_batch(PROMPTS, 20, seed=1337, slide=True)
    assert [row["prompt"] + row["text"] for row in samples[-3:]] == expected

    shutil.copytree(tmp_path / "a", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "checkpoints" / "6")  # what was written after the fourth update is lost
    assert run("c", *flags) == whole
    assert rows_of(tmp_path / "c" / "samples.jsonl") == samples


def test_token_files_have_a_tokenizer_for_prompts_alone(tmp_path):
    for name in ("train", "val"):
        np.arange(2000, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    flags = [*TINY.split(), "--data.text", "", "--data.train", str(tmp_path / "train.bin"), "--data.val",
             str(tmp_path / "val.bin"), "--data.tokenizer", "bytes", "--model.vocab_size", "2000"]  # fmt: skip
    assert open_data(parse_args("train", "", flags))[0].tokenizer is None
    assert open_data(parse_args("train", "", [*flags, "--eval.prompts", "1"]))[0].tokenizer is not None


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["ü"], "'ü'"),
        ([""], "the prompt is empty, and this model has no end-of-text token"),
        (["@none.txt"], "--eval.prompts @none.txt: No such file or directory; expected a text file with a prompt in"),
        (["@empty.txt"], "--eval.prompts @empty.txt: the file is empty; write a prompt in each line"),
        (["@binary.txt"], "--eval.prompts @binary.txt: not UTF-8 text"),
        (["1" * 70_000], "eval.prompts has more than 65,536 bytes"),
    ],
)
def test_prompts_that_cannot_be_continued_start_no_run(run, tmp_path, monkeypatch, prompts, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=re.escape(message)):
        run("a", "--eval.prompts", *prompts)
    assert not (tmp_path / "a").exists()
