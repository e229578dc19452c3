"""Exit codes of commands, their errors in one line, Ctrl-C at any moment, and silence of other libraries."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from xla_flags import FAST_COMPILE

from gpt2_jax import cli, train
from gpt2_jax.__main__ import main
from gpt2_jax.errors import UserError

ROOM = "No space left on device; make room, or write elsewhere"
LESS_MEMORY = "take a smaller model, or devices with more memory"


def test_the_commands_are_listed(capsys):
    assert main([]) == 0
    listed = re.findall(r"^  python -m gpt2_jax\.(\w+) ", capsys.readouterr().out, re.MULTILINE)
    package = Path(cli.__file__).parent
    have_command = {path.stem for path in package.glob("*.py") if "\ndef command()" in path.read_text()}
    assert have_command | {"data"} == set(listed)
    with pytest.raises(UserError, match=r"a command follows a dot; type python -m gpt2_jax.train --config quickstart$"):
        main(["train", "--config", "quickstart"])
    with pytest.raises(UserError, match="'tain' is not a command; they are train, generate, "):
        main(["tain"])


COMPLETE = """
source /dev/stdin
complete -p gpt2-train > /dev/null || exit 1
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_a_shell_completes_flags_and_presets(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--tyro-print-completion", "bash"])
    assert not exit_.value.code
    script = capsys.readouterr().out

    def complete(*words):
        command = ["bash", "-c", COMPLETE, "bash", "gpt2-train", *words]
        return subprocess.run(command, input=script, capture_output=True, text=True, check=True).stdout.split()

    assert complete("--model.n_") == ["--model.n_layer", "--model.n_head", "--model.n_embd"]
    assert complete("--config", "quick") == ["quickstart"]
    assert complete("--coordi") == ["--coordinator", "--coordinator_timeout"]


@pytest.mark.parametrize(
    ("result", "code", "stderr"),
    [
        (0, 0, ""),
        (143, 143, ""),
        (UserError("a\nb"), 2, "error: a b\n"),
        (
            UserError("file\x1b[2J\x07.txt\r"),
            2,
            "error: file\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}.txt\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device", "a.bin"), 2, f"error: a.bin cannot be written: {ROOM}\n"),
        *(
            (RuntimeError(f"{text}\n"), 2, f"error: not enough memory ({text}); {LESS_MEMORY}\n")
            for text in (
                "RESOURCE_EXHAUSTED: Out of memory",
                "INTERNAL: Error dispatching computation: Out of memory allocating 8 bytes.",
                "INTERNAL: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY",
                "INTERNAL: failed to create cublas handle: CUBLAS_STATUS_ALLOC_FAILED",
            )
        ),
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


PRINTS = "import sys; from gpt2_jax.cli import run_command; run_command(lambda args: print('text') or 0)"
WRITES = "import sys; from gpt2_jax.cli import run_command; run_command(lambda args: sys.stdout.write('x' * 99999) * 0)"
FAILS = "from gpt2_jax.errors import UserError; from gpt2_jax.cli import run_command; run_command(lambda _: 1 / 0)"
REFUSES = FAILS.replace("lambda _: 1 / 0", "lambda _: (_ for _ in ()).throw(UserError('no'))")
BACKEND = "import jax; from gpt2_jax.cli import run_command; run_command(lambda args: jax.devices() and 0)"
FULL = "error: the output cannot be written: No space left on device; make room, or write elsewhere\n"


@pytest.mark.parametrize(
    ("program", "redirection", "code", "stderr"),
    [
        (PRINTS, ">&-", 2, "error: standard output is closed; to run without it, type > /dev/null\n"),
        (PRINTS, "> /dev/full", 2, FULL),
        (WRITES, "> /dev/full", 2, FULL),
        (WRITES, "| true", 141, ""),
        (PRINTS, "2>&-", 0, ""),
        (REFUSES, "2>&-", 2, ""),
        (REFUSES, "2> /dev/full", 2, ""),
        (REFUSES, "2>&1 | true", 2, ""),
    ],
)
def test_output_that_nobody_takes(program, redirection, code, stderr):
    shell = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell, sys.executable, program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_a_platform_that_does_not_exist_is_one_line():
    command = [sys.executable, "-c", BACKEND]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "foo"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unable to initialize backend 'foo'")
    assert done.stderr.count("\n") == 1


SWALLOWS = """
import gc, os, signal, time
from gpt2_jax.cli import run_command

def ctrl_c(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.001)  # the handler runs here

class Finalized:
    def __del__(self):
        ctrl_c()

class Attribute:
    def __getattr__(self, name):
        try:
            ctrl_c()
        except BaseException:
            raise AttributeError from None

def main(args):
    WAYS
    time.sleep(20)
    return 0

run_command(main)
"""


@pytest.mark.parametrize(
    "way",
    [
        "Finalized()",
        "gc.callbacks.append(lambda *_: (gc.callbacks.clear(), ctrl_c())); gc.collect()",
        "[Finalized() for _ in range(3)]",
        "ctrl_c()",
        "try: ctrl_c()\n    except: pass",
        "hasattr(Attribute(), 'any')",
    ],
)
def test_an_interrupt_that_is_swallowed_comes_again(way):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWS.replace("WAYS", way)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert time.monotonic() - started < 15


def test_an_interrupt_that_a_library_turns_into_its_own_error():
    way = "try: ctrl_c()\n    except BaseException: raise RuntimeError('failed') from None"
    done = subprocess.run([sys.executable, "-c", SWALLOWS.replace("WAYS", way)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_cleanup_is_not_interrupted_by_the_retry():
    way = "try: ctrl_c()\n    finally: time.sleep(2); print('cleaned up')"
    done = subprocess.run([sys.executable, "-c", SWALLOWS.replace("WAYS", way)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "interrupted\n")


def interrupted(seconds, args, cwd):
    """The exit code and the output of a command that gets Ctrl-C some seconds after it has begun its imports."""
    command = [sys.executable, "-X", "faulthandler", "-m", *map(str, args)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"XLA_FLAGS": FAST_COMPILE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "numpy" not in maps.read_text():
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # prints where it is
        output, _ = process.communicate()
        pytest.fail(f"still runs 120 seconds after Ctrl-C: {output}")
    return process.returncode, output


TRAIN = [
    "gpt2_jax.train",
    "--config",
    "quickstart",
    "--steps",
    "1000000",
    "--eval.every",
    "0",
    "--checkpoint.every",
    "0",
]
GENERATE = ["gpt2_jax.generate", "--model", "./none", "--prompt", "x"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc to see imports")
@pytest.mark.parametrize(
    ("command", "seconds"),
    [(GENERATE, 0.0), (TRAIN, 0.2), (TRAIN, 1.5)]
    + [pytest.param(TRAIN, 0.4 * moment, marks=pytest.mark.slow) for moment in range(16)],
)
def test_ctrl_c_at_any_moment_of_a_start(command, seconds, tmp_path):
    code, output = interrupted(seconds, command, tmp_path)
    assert code == 130, output
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    assert "interrupted" in output or "stopped after update" in output
