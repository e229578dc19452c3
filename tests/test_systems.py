"""macOS and Windows: the package without what they lack, simulated on Linux, and paths as they have them."""

import ast
import json
import ntpath
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
from token_files import write_llmc
from xla_flags import FAST_COMPILE

from gpt2_jax.config import TrainConfig
from gpt2_jax.config.toml import read_config, to_toml
from gpt2_jax.data import corpus
from gpt2_jax.data.shards import open_tokens
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "gpt2_jax"

# --- paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [r"C:\runs\mine", "C:mine", r"runs\mine"])
def test_a_path_of_windows_is_no_name_on_the_hub(name):
    with pytest.raises(UserError) as error:
        open_model(name)
    assert str(error.value).startswith(f"{name} does not exist; expected a run directory")


def test_paths_of_windows_survive_toml(tmp_path):
    config = TrainConfig(out=r"C:\new\run", steps=1, batch_size=1, init_from=r"\\server\share\x")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_config(str(tmp_path / "config.toml")) == config


def test_documents_have_the_same_names_and_order_on_every_system(monkeypatch):
    paths = ["/data/b-c/x.txt", "/data/b/x.txt", "/data/a.txt"]
    here = list(corpus.name_files(paths))
    assert here == ["a.txt", "b-c/x.txt", "b/x.txt"]
    monkeypatch.setattr(corpus, "Path", PureWindowsPath)
    monkeypatch.setattr(corpus.os, "path", ntpath)
    there = corpus.name_files("C:" + path.replace("/", "\\") for path in paths)
    assert list(there) == here
    assert there["b/x.txt"] == PureWindowsPath(r"C:\data\b\x.txt")
    assert list(corpus.name_files([r"C:\a\x.txt", r"D:\y.txt"])) == ["C:/a/x.txt", "D:/y.txt"]


# --- files ---------------------------------------------------------------------------------------------


def test_token_files_are_read_without_preadv(monkeypatch, tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    write_llmc(tmp_path / "x.bin", tokens)
    file, out = open_tokens(tmp_path / "x.bin"), np.zeros((3, 10), np.uint16)
    monkeypatch.delattr(os, "preadv")
    file.read(np.array([990, 5]), out, np.array([2, 0]))
    np.testing.assert_array_equal(out, [tokens[5:15], np.zeros(10), tokens[990:]])
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match="has become shorter"):
        file.read(np.array([990]), out, np.array([0]))


def text_files(tree: ast.AST) -> list[ast.Call]:
    """The calls that open a text file, or write or read a whole one."""
    calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            modes = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
            opens = called == "open" and "b" not in "".join(map(str, modes))
            if opens or (called.endswith((".write_text", ".read_text")) and not called.startswith("parsing.")):
                calls.append(node)
    return calls


def test_text_files_have_the_same_bytes_on_every_system():
    found = 0
    for path in PACKAGE.rglob("*.py"):
        for call in text_files(ast.parse(path.read_text(encoding="utf-8"))):
            names = {keyword.arg for keyword in call.keywords}
            where = f"{path}:{call.lineno}: {ast.unparse(call)}"
            if "os.devnull" in where:
                continue
            found += 1
            assert "utf-8" in where, where
            assert "newline" in names or ".read_text" in where, where
    assert found


# --- the whole package ---------------------------------------------------------------------------------

# Every step runs as the command does, in this process: the programs are compiled once. A signal stops the first run.
DRIVER = '''
import importlib, pkgutil, shlex, signal, sys
from pathlib import Path
import gpt2_jax
from gpt2_jax.files import exclusive
from gpt2_jax.errors import UserError

def command(name, *args):
    module = importlib.import_module(f"gpt2_jax.{name}")
    sys.argv = [f"gpt2-{name}", *args]
    try:
        module.command()
    except SystemExit as done:
        return done.code

def main():
    for module in pkgutil.walk_packages(gpt2_jax.__path__, "gpt2_jax."):
        if module.name not in ("gpt2_jax.evaluation.harness", "gpt2_jax.evaluation.lm_eval"):  # need lm-eval
            importlib.import_module(module.name)
    Path("run").mkdir()
    with exclusive(Path("run"), "training"):
        try:
            with exclusive(Path("run"), "training"):
                raise AssertionError("locked twice")
        except UserError as error:
            assert "another process is training in run" in str(error)
    assert not list(Path("run").iterdir())

    from gpt2_jax import train
    put_batch, calls = train.put_batch, []
    def stop_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGHUP)  # in the simulation of Windows the package knows it as SIGBREAK
        return put_batch(*args)
    train.put_batch = stop_at_the_third
    assert command("prepare", "texts/*.txt", "--out", "tokens", "--workers", "2", "--tokenizer", "bytes") == 0
    flags = shlex.split("""--config quickstart --steps 6 --batch_size 2 --model.n_layer 1 --model.n_embd 24
        --model.block_size 16 --eval.every 2 --eval.tokens 256 --eval.sample_tokens 5 --checkpoint.every 1
        --checkpoint.keep 1 --data.text '' --data.train tokens/train*.bin --data.val tokens/val*.bin
        --compilation_cache programs --out run""")
    assert command("train", *flags) == 128 + signal.SIGHUP
    assert command("train", *flags) == 0
    assert len(calls) == 6
    assert command("convert", "--from", "run", "--to", "huggingface", "--out", "export") == 0
    assert command("generate", "--model", "export", "--prompt", "a", "--max-new-tokens", "3") == 0

if __name__ == "__main__":
    main()
'''


def run_everything(directory: Path, system: str) -> dict[str, bytes]:
    """Runs the driver, and returns the files that do not depend on the time."""
    texts = directory / "texts"
    texts.mkdir(parents=True)
    for number in range(9):
        (texts / f"{number}.txt").write_text("".join(f"{number} + {n} = {number + n}\n" for n in range(200)))
    (directory / "driver.py").write_text(DRIVER)
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE, "SIMULATED_SYSTEM": system}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS / "systems"), str(TESTS.parent)])
    if not system:
        del environment["SIMULATED_SYSTEM"]
    process = [sys.executable, "driver.py"]
    done = subprocess.run(process, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    files = [path for name in ("tokens", "export") for path in (directory / name).iterdir()]
    contents = {path.name: path.read_bytes() for path in [*files, directory / "run/config.toml"]}
    return contents | {"state": rows[-1]["fingerprint"].encode()}


@pytest.fixture(scope="module")
def on_linux(tmp_path_factory):
    return run_everything(tmp_path_factory.mktemp("linux") / "here", "")


@pytest.mark.slow
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_the_package_imports_prepares_trains_resumes_and_converts(on_linux, tmp_path, system):
    assert run_everything(tmp_path / "here", system) == on_linux
