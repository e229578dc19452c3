"""The built wheel in a fresh environment and a fresh directory: a newcomer types the commands of docs/start.md."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--optimizer.warmup_steps", "5", "--eval.every", "100", "--checkpoint.every", "100", "--model.n_layer", "1"]
SHORTER = {"2500": "420", "2000": "400", "300": "30"}  # updates, updates of the schedule, tokens to write
TEXT = "".join(f"ROMEO:\nWhat light, number {number}, through yonder window breaks?\n\n" for number in range(4000))


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """Runs a command line in the fresh environment and directory, and returns what it prints."""
    home = tmp_path_factory.mktemp("newcomer")
    source = home / "source"  # a copy, as building leaves files of its own
    shutil.copytree(ROOT / "gpt2_jax", source / "gpt2_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", home]
    subprocess.run([*build, source], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    binaries = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
    # The dependencies are those of this environment: pip would take minutes. Of gpt2_jax it has only a link, which
    # the line of a .pth file does not follow.
    found = subprocess.run(
        [binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (Path(found.stdout.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = home.glob("gpt2_jax-*.whl")
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    work = home / "work"
    work.mkdir()
    (work / "tinyshakespeare.txt").write_text(TEXT)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def run(*words, interrupt_after=None):
        """Runs a command. With Ctrl-C after a line that begins with some words, if they are given."""
        with subprocess.Popen(
            words, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        ) as process:  # fmt: skip
            lines = []
            while interrupt_after and (line := process.stdout.readline()):
                lines.append(line)
                if line.startswith(interrupt_after):
                    process.send_signal(signal.SIGINT)
                    break
            output, errors = process.communicate(timeout=300)
        output = "".join(lines) + output
        assert process.returncode == (130 if interrupt_after else 0), output + errors
        return output

    return run


def commands():
    """The commands of the page that use the package."""
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python -m gpt2_jax.")]


@pytest.mark.slow
def test_every_command_of_the_first_page_works_with_the_wheel(newcomer):
    assert newcomer("python", "-c", "import gpt2_jax; print(gpt2_jax.__file__)").count("newcomer") == 1
    outputs = {}
    for line in commands():
        words = [SHORTER.get(word, word) for word in shlex.split(line)]
        if words[2] == "gpt2_jax.train":
            words += SMALL + ([] if "--steps" in words else ["--steps", "400"])
        is_first = words[2] == "gpt2_jax.train" not in outputs
        interrupt_after = "update 100: validation loss" if is_first else None
        outputs.setdefault(words[2], []).append(newcomer(*words, interrupt_after=interrupt_after))
    first, again, more = outputs["gpt2_jax.train"]
    assert "update 400/400" not in first
    (resumed,) = re.findall(r"resumed after update (\d+)", again)
    assert 100 <= int(resumed) < 400
    assert "update 100: validation" not in again
    assert "update 400: validation loss" in again
    assert "update 420/420: loss" in more
    assert "update 400: validation" not in more
    (text,) = outputs["gpt2_jax.generate"]
    assert text.startswith("ROMEO:")
    assert len(text) > 30
    assert outputs["gpt2_jax.report"] == ["wrote     shakespeare.html\n"]
    assert "ckpt.pt" in outputs["gpt2_jax.convert"][0]


@pytest.mark.slow
def test_a_trained_model_is_evaluated_exported_and_loaded_by_transformers(newcomer):
    """With the quickstart of the README, on bytes."""
    flags = ["--steps", "30", "--model.n_layer", "1", "--model.n_embd", "32", "--model.n_head", "2"]
    trained = newcomer("gpt2-train", "--config", "quickstart", "--data.text", "tinyshakespeare.txt", *flags)
    assert "update 30/30: loss" in trained
    evaluated = newcomer(
        "gpt2-evaluate", "--model", "runs/quickstart", "--tasks", "loss", "--data", "tinyshakespeare.txt"
    )
    assert "loss" in evaluated
    newcomer("gpt2-convert", "--from", "runs/quickstart", "--to", "huggingface", "--out", "exports/quickstart")
    code = (
        "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained('exports/quickstart'); "
        "print(sum(p.numel() for p in m.parameters()))"
    )
    assert int(newcomer("python", "-c", code)) > 10_000
