"""Paths that users type: what no file can be called, what cannot be read, and names with the signs of a glob."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_jax import convert, generate, prepare, train
from gpt2_jax.data import __main__ as data
from gpt2_jax.data.corpus import match_files
from gpt2_jax.data.shards import find_token_files
from gpt2_jax.errors import UserError
from gpt2_jax.files import find_paths, make_directory, user_path

COMMANDS = {
    "train --config": (train, ["--config", None]),
    "train --out": (train, ["--config", "quickstart", "--out", None]),
    "train --data.text": (train, ["--config", "quickstart", "--data.text", None]),
    "train --data.train": (train, ["--config", "gpt2-124m", "--data.train", None]),
    "train --data.val": (train, ["--config", "gpt2-124m", "--data.val", None]),
    "train --init_from": (train, ["--config", "finetune", "--init_from", None]),
    "train --compilation_cache": (train, ["--config", "quickstart", "--compilation_cache", None]),
    "train, in sources": (train, ["--config", "sources.toml", "--data.sources.0.train", None]),
    "prepare SOURCE": (prepare, [None, "--out", "tokens"]),
    "prepare --out": (prepare, ["stdlib", "--out", None]),
    "data DIR": (data, [None]),
    "generate --prompt-file": (generate, ["--model", "gpt2", "--prompt-file", None]),
    "generate --model": (generate, ["--prompt", "x", "--model", None]),
    "convert --from": (convert, ["--to", "llmc", "--out", "model", "--from", None]),
    "convert --out": (convert, ["--to", "llmc", "--from", "gpt2", "--out", None]),
}
SOURCES = "out='x'\nsteps=1\nbatch_size=1\n[data]\nval='v'\n[[data.sources]]\ntrain='a'\n[optimizer]\nwarmup_steps=0\n"


def call(name, path):
    command, args = COMMANDS[name]
    return command.main([path if arg is None else arg for arg in args])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, except for a config."""
    monkeypatch.chdir(tmp_path)
    Path("sources.toml").write_text(SOURCES)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/x", "~nosuchuser is unknown; type the whole path, or ./~nosuchuser for"),
        ("a\0b", "has a NUL character, which no path has; type another path"),
        ("caf\udce9", "not UTF-8; convert it, or type another"),
        ("x" * 300, "File name too long; type a shorter path"),
    ],
)
def test_what_no_file_can_be_called_is_refused_and_nothing_is_written(here, name, path, message):
    with pytest.raises(UserError, match=message) as error:
        call(name, path)
    assert "\n" not in str(error.value)
    assert [file.name for file in here.iterdir()] == ["sources.toml"]


@pytest.mark.parametrize("name", ["train --config", "prepare SOURCE", "generate --prompt-file", "generate --model"])
def test_a_fifo_is_refused_where_a_file_is_read(here, name):
    os.mkfifo("x.bin")
    with pytest.raises(UserError, match=r"x\.bin is a FIFO; expected a file; store the content in one, and type its"):
        call(name, "x.bin")
    assert not Path("tokens").exists()


def test_a_fifo_or_a_socket_among_token_files_is_refused(here):
    os.mkfifo("x.bin")
    for pattern in ("x.bin", "*.bin"):
        with pytest.raises(UserError, match=r"x\.bin is a FIFO"):
            find_token_files(pattern, "data.train")
    with pytest.raises(UserError, match=r"x\.bin is a FIFO"):
        data.main(["."])
    Path("x.bin").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("x.bin")
        with pytest.raises(UserError, match=r"x\.bin is a socket"):
            find_token_files("*.bin", "data.train")
    os.mkfifo("x.txt")
    with pytest.raises(UserError, match=r"x\.txt is a FIFO"):
        match_files("x.txt", "data.text")
    with pytest.raises(UserError, match="/dev/zero is a device"):
        match_files("/dev/zero", "data.text")


def test_a_pipe_of_the_shell_may_be_a_prompt(here):
    shell = f"{sys.executable} -m gpt2_jax.generate --model ./none --prompt-file <(echo hello)"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stderr.startswith("error: ./none does not exist")


def test_a_path_that_exists_is_that_file(here):
    folder = here / "dir[1]"
    folder.mkdir()
    for name in ("train.bin", "a*.txt", "ab.txt"):
        (folder / name).touch()
    assert find_token_files("dir[1]/train.bin", "data.train") == [Path("dir[1]/train.bin")]
    assert match_files("dir[1]/a*.txt", "data.text") == ["dir[1]/a*.txt"]
    assert match_files("dir[[]1]/a*.txt", "data.text") == ["dir[1]/a*.txt", "dir[1]/ab.txt"]
    assert find_paths("dir[1]", "x") == [Path("dir[1]")]
    assert find_paths("nothing*", "x") == []


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x", "--out") == tmp_path / "x"
    assert user_path("./~x", "--out") == Path("~x")


def test_a_directory_that_cannot_be_created_leaves_no_parents(tmp_path):
    with pytest.raises(OSError, match="too long"):
        make_directory(tmp_path / "a" / "b" / ("x" * 300))
    assert not list(tmp_path.iterdir())
    assert make_directory(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]


NO_HOME = "is not a file or directory here, and there is no home directory .*; give a path, or set HF_HOME"


def test_the_hub_needs_a_place_for_its_files(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")  # as without a home
    with pytest.raises(UserError, match=f"^gpt2 {NO_HOME}"):
        call("generate --model", "gpt2")
    with pytest.raises(UserError, match=f"^kjj0/fineweb10B-gpt2 {NO_HOME}"):
        call("prepare SOURCE", "fineweb-10b-tokenized")
    assert os.listdir() == ["sources.toml"]
