"""The commands of the README and of docs/, one after the other, with small models and files in place of large ones."""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from token_files import write_llmc
from torch_gpt2 import torch_gpt2

from gpt2_jax import train
from gpt2_jax.config import GPT2Config
from gpt2_jax.convert import convert

ROOT = Path(__file__).parents[1]
# tests/test_newcomer.py runs docs/start.md. docs/launching.md is for several hosts: tests/distributed.
PAGES = ("README.md", *(f"docs/{page}.md" for page in (
    "reproduce", "finetune", "coming-from", "symptoms", "extend", "architecture", "data", "evaluation", "generation",
    "serving", "training",
)))  # fmt: skip
SMALL = GPT2Config(vocab_size=50257, block_size=16, n_layer=1, n_head=2, n_embd=16, attention="xla")
MODEL = {f"--model.{key}": str(getattr(SMALL, key)) for key in ("block_size", "n_layer", "n_head", "n_embd")}
TRAINING = {
    **MODEL, "--steps": "4", "--batch_size": "8", "--optimizer.warmup_steps": "1", "--eval.every": "2",
    "--eval.tokens": "64", "--eval.sample_tokens": "0", "--eval.prompt_tokens": "4", "--eval.tasks_data": "tasks",
    "--checkpoint.every": "2",
}  # fmt: skip
FLAGS = {
    "train": TRAINING, "plan": {**MODEL, "--batch_size": "16", "--micro_batch_size": "1"},
    "generate": {"--max-new-tokens": "4"}, "evaluate": {"--data": "tasks", "--limit": "2"}, "convert": {}, "report": {},
    "prepare": {}, "data": {},
}  # fmt: skip
# A command that cannot run here, and why. All of them are parsed by tests/test_readme.py.
LEFT_OUT = {
    "prepare fineweb-": "downloads up to 20 GB; tests/data/test_prepare.py reads a hub of its own",
    "--topology h100:8": "needs JAX's CUDA plugin",
    "--topology rtx-4090:1": "needs JAX's CUDA plugin",
    "lm-eval:": "downloads its examples; tests/evaluation/test_lm_eval.py has some",
    "lm_eval ": "the same",
    "data runs/quickstart --update": "reads a run; tests/data/test_batches.py",
    "--from runs/quickstart --to gguf": "tests/interop/test_gguf.py",
}
# A model that is too large, or a checkpoint of a real run.
SMALLER = {"gpt2": "small", "gpt2-xl": "small", "runs/mine/checkpoints/500": "small"}
RUNS = ("gpt2-124m", "quickstart", "mine", "small", "large")


def commands(page):
    """The commands of a page as lists of words: the name, and its arguments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python -m gpt2_jax.")]
    kept = [line for line in lines if not any(words in line for words in LEFT_OUT)]
    return [shlex.split(line.removeprefix("python -m gpt2_jax."), comments=True) for line in kept]


@pytest.fixture
def files(tmp_path, monkeypatch, gpt2_vocabulary):
    """Everything that the guides take for granted, small, in the current directory."""
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_guide_works(page, files, capsys):
    flags = [word for flag, value in TRAINING.items() for word in (flag, value)]
    assert train.main(["--config", "gpt2-124m", "--out", "first", *flags]) == 0
    copies = [f"runs/{run}" for run in RUNS]
    for run in copies:
        shutil.copytree("first", run)
    for name, *args in commands(page):
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
        args = [SMALLER.get(word, word) for word in args]
        args += [word for flag, value in more.items() for word in (flag, value)]
        module = importlib.import_module("gpt2_jax.data.__main__" if name == "data" else f"gpt2_jax.{name}")
        assert module.main(args) == 0, (name, args)
    assert capsys.readouterr().out
