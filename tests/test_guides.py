"""The commands of every page, one after the other, with small models and files in place of large ones."""

import dataclasses
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import zstandard
from pages import PAGES, ROOT, shell_lines
from tiktoken_ext.openai_public import r50k_pat_str
from token_files import write_llmc
from torch_gpt2 import torch_gpt2

from gpt2_jax import train
from gpt2_jax.config import GPT2Config
from gpt2_jax.convert import convert
from gpt2_jax.data.tokenizer import END_OF_TEXT

SMALL = GPT2Config(vocab_size=50257, block_size=32, n_layer=1, n_head=2, n_embd=16, attention="xla")
MODEL = {f"--model.{key}": str(getattr(SMALL, key)) for key in ("block_size", "n_layer", "n_head", "n_embd")}
TRAINING = {
    **MODEL, "--steps": "4", "--batch_size": "8", "--optimizer.warmup_steps": "1", "--eval.every": "2",
    "--eval.tokens": "64", "--eval.sample_tokens": "0", "--eval.prompt_tokens": "4", "--eval.tasks_data": "tasks",
    "--checkpoint.every": "2",
}  # fmt: skip
FLAGS = {
    "train": TRAINING, "plan": {**MODEL, "--batch_size": "128", "--micro_batch_size": "1"},
    "generate": {"--max-new-tokens": "4"}, "evaluate": {"--data": "tasks", "--limit": "2"}, "convert": {}, "report": {},
    "prepare": {}, "data": {},
}  # fmt: skip
# What cannot run here, and why. All commands of the package are parsed by tests/test_readme.py.
LEFT_OUT = {
    "pip install": "downloads; .ci/run installs the package, with its extra test",
    "curl ": "downloads; the file is there",
    "prepare fineweb-": "downloads up to 20 GB; tests/data/test_prepare.py reads a hub of its own",
    "--topology h100:8": "needs JAX's CUDA plugin",
    "lm-eval:": "downloads its examples; tests/evaluation/test_lm_eval.py has some",
    "lm_eval ": "the same",
    "ct2-transformers-converter ": "needs CTranslate2; tests/interop/test_serving.py runs it, where it is installed",
    "llama-": "llama.cpp is not installed",
    "--coordinator host0:8476": "two hosts; tests/distributed/test_processes.py starts two processes with these flags",
    "tpu_vm.sh watch": "needs a TPU; tests/distributed/test_launch.py has a fake one",
    "tpu_vm.sh logs": "the same",
    "tpu_vm.sh delete": "the same",
    "sbatch --nodes": "needs SLURM; tests/distributed/test_slurm.py, where it is installed",
    "sky ": "needs SkyPilot and a cloud; tests/distributed/test_launch.py checks the task and runs its scripts",
    "kubectl ": "needs a cluster; tests/distributed/test_launch.py checks the files",
    "docker ": "needs Docker and downloads; tests/distributed/test_launch.py checks the file",
}
# A model that is too large, or a checkpoint of a real run.
SMALLER = {"gpt2": "small", "gpt2-xl": "small", "runs/mine/checkpoints/500": "small"}
RUNS = ("gpt2-124m", "quickstart", "mine", "small", "large")


def lines(page):
    """The lines of a page that can run here."""
    return [line for line in shell_lines(page) if not any(words in line for words in LEFT_OUT)]


@pytest.fixture(scope="module")
def vocabulary():
    """In place of GPT-2's vocabulary, which is downloaded: as many tokens, the bytes and 50,000 pairs of bytes."""
    pairs = itertools.islice(itertools.product(range(256), repeat=2), 50_000)
    ranks = {bytes(token): rank for rank, token in enumerate([*((byte,) for byte in range(256)), *pairs])}
    special = {END_OF_TEXT: 50_256}
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiktoken.registry.ENCODINGS, "gpt2", encoding)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory, vocabulary):
    """A directory with everything that the guides take for granted, small, and a run that others are copies of."""
    directory = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        write_files()
        assert train.main(["--config", "gpt2-124m", "--out", "first", *words_of(TRAINING)]) == 0
    return directory


def write_files():
    rng = np.random.default_rng(0)
    Path("data/fineweb10B").mkdir(parents=True)
    for name in ("train_000001", "val_000000"):
        write_llmc(Path(f"data/fineweb10B/fineweb_{name}.bin"), rng.integers(0, 50257, 4000))
    text = "".join(f"First Citizen:\nNumber {number}, speak.\n\n" for number in range(300))
    Path("tinyshakespeare.txt").write_text(text)
    Path("mine").mkdir()
    Path("mine/one.txt").write_text(text)
    documents = [json.dumps({"text": f"document {number} " * 20}) for number in range(300)]
    Path("mine/one.jsonl").write_text("\n".join(documents) + "\n")
    bodies = "".join(json.dumps({"body": f"document {number} " * 20}) + "\n" for number in range(300))
    Path("mine/more.jsonl.zst").write_bytes(zstandard.compress(bodies.encode()))
    torch_gpt2(SMALL).save_pretrained("small")
    torch_gpt2(dataclasses.replace(SMALL, gelu="exact")).save_pretrained("exact")
    for model, to, out in (("exact", "nanogpt", "ckpt.pt"), ("small", "llmc", "model_00019560.bin")):
        (written,) = [path for path in convert(model, to, f"written/{to}").iterdir() if path.suffix == Path(out).suffix]
        written.rename(out)
    convert("exact", "orbax", "runs/shakespeare-char")
    Path("notes").mkdir()
    Path("notes/one.txt").write_text(text)
    Path("notes/two.md").write_text(text)
    Path("letter.txt").write_text("Dear")
    Path("prompts.txt").write_text("One day\n")
    Path("tasks").mkdir()
    Path("tasks/lambada_test.jsonl").write_text('{"text": "one two"}\n' * 2)
    row = json.dumps({"query": "a", "endings": ["b", "c", "d", "e"], "label": 0})
    Path("tasks/hellaswag_val.jsonl").write_text(f"{row}\n" * 2)
    for name in ("train", "valid", "test"):
        Path(f"tasks/wiki.{name}.raw").write_text(" = One = \n\n Two three . \n")


def words_of(flags):
    return [word for flag, value in flags.items() for word in (flag, value)]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if lines(page) and page != "docs/start.md"])
def test_every_command_of_a_guide_works(page, files, in_process, tmp_path, monkeypatch, capsys):
    """tests/test_newcomer.py runs docs/start.md."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    copies = [f"runs/{run}" for run in RUNS]
    for run in copies:
        shutil.copytree("first", run)
    for line in lines(page):
        command = re.fullmatch(r"(?:cat (\S+) \| )?python -m gpt2_jax\.(\w+) (.*)", line)
        if not command:
            assert "launch/" in line, f"{line} is not a command of the package; add it to LEFT_OUT"
            assert "--dry-run" in line
            assert subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, check=True).stdout
            continue
        piped, name, words = command.groups()
        args = shlex.split(words, comments=True)
        more = {flag: value for flag, value in FLAGS[name].items() if flag not in args}
        if name == "train":
            config = args[args.index("--config") + 1]
            if config == "finetune":
                more["--init_from"] = "small"
            out = args[args.index("--out") + 1] if "--out" in args else f"runs/{config}"
            if out in copies:  # the page trains it itself
                copies.remove(out)
                shutil.rmtree(out)
        if "--max-new-tokens" in args:
            args[args.index("--max-new-tokens") + 1] = "4"
        args = [SMALLER.get(word, word) for word in args] + words_of(more)
        module = importlib.import_module("gpt2_jax.data.__main__" if name == "data" else f"gpt2_jax.{name}")
        with open(piped or os.devnull, encoding="utf-8") as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            assert module.main(args) == 0, line
        assert capsys.readouterr().out, line


@pytest.mark.parametrize("words", LEFT_OUT)
def test_what_is_left_out_is_on_a_page(words):
    assert any(words in line for page in PAGES for line in shell_lines(page))
