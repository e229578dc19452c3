"""Every reader takes damaged files or raises `UserError`, within memory and time: `fuzz.py` says how."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from targets import TARGETS

from gpt2_jax.errors import UserError

MODELS = {"llmc", "huggingface", "nanogpt", "meta"}


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in MODELS])
def test_files_that_once_did_harm(name, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2_jax.data.sources.MAX_RECORD_BYTES", 1 << 21)  # set by the target, restored here
    for number, files in enumerate(TARGETS[name].samples()):
        (folder := tmp_path / str(number)).mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        with contextlib.suppress(UserError):
            TARGETS[name].read(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name):
    """Run `python tests/fuzz/fuzz.py` for minutes instead of seconds."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), name, "--cases", "400", "--seconds", "6"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-1000:]
