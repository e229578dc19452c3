"""Exit codes of commands, their errors in one line, and silence of other libraries."""

import logging
import os
import subprocess
import sys

import pytest

from gpt2_jax import cli
from gpt2_jax.errors import UserError


@pytest.mark.parametrize(
    ("result", "code", "stderr"),
    [
        (0, 0, ""),
        (143, 143, ""),
        (UserError("a\nb"), 2, "error: a b\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(result, code, stderr, monkeypatch, capsys):
    monkeypatch.setattr(cli, "silence_third_parties", lambda: None)
    monkeypatch.setattr(sys, "argv", ["command", "--flag"])

    def main(args):
        assert args == ["--flag"]
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as exit_:
        cli.run_command(main)
    assert exit_.value.code == code
    assert capsys.readouterr().err == stderr


def test_commands_silence_absl_and_the_hub():
    program = (
        "from gpt2_jax.cli import silence_third_parties; silence_third_parties(); "
        "from huggingface_hub import logging as hub; import logging, absl.logging; "
        "print(hub.get_verbosity(), logging.getLogger('absl').level)"
    )
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    output = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(logging.ERROR), str(logging.CRITICAL)]
