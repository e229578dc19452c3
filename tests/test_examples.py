"""The notebooks of examples/: clean as stored, their commands exist, and all cells run, with small settings."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from commands import check_command
from transformers import GPT2Config, GPT2LMHeadModel
from xla_flags import FAST_COMPILE

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
COMMAND = re.compile(r"^ *!python -m gpt2_jax\.(\w+) (.*)", re.MULTILINE)


def read(name: str):
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def tagged(notebook, tag: str) -> int:
    """The index of the cell with a tag."""
    (index,) = [n for n, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", ())]
    return index


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_commands_have_the_flags_that_are_shown(name):
    notebook = read(name)
    settings: dict = {}
    exec(notebook.cells[tagged(notebook, "parameters")].source, settings)
    commands = [match for cell in notebook.cells for match in COMMAND.findall(cell.source.replace("\\\n", " "))]
    assert {command for command, _ in commands} >= {"train", "generate"}
    for command, words in commands:
        check_command(command, shlex.split(words.format(EXPORT="export", **settings)))


def execute(name: str, directory: Path, monkeypatch, only: str = "", **settings) -> str:
    """Runs all cells but the installation, with other settings, and returns what the commands printed.

    Args:
        only: the one command to run; by default all run.
    """
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILE)  # one device
    monkeypatch.delenv("CI", raising=False)  # it turns progress bars off
    notebook = read(name)
    cells = []
    for index, cell in enumerate(notebook.cells):
        commands = COMMAND.findall(cell.source)
        if index == tagged(notebook, "install") or (only and "!python" in cell.source and only not in dict(commands)):
            continue
        cells.append(cell)
        if index == tagged(notebook, "parameters"):
            cells.append(nbformat.v4.new_code_cell("\n".join(f"{key} = {value!r}" for key, value in settings.items())))
        if commands:
            cells.append(nbformat.v4.new_code_cell("assert not _exit_code, _exit_code"))
    notebook.cells = cells
    where = {"metadata": {"path": directory}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", ()) for output in outputs)  # the plot
    printed = "".join(output.text for output in outputs if output.output_type == "stream").replace("\r\n", "\n")
    assert "\x1b" not in printed  # a notebook would keep every state of a progress bar
    return printed


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("to be or not to be, " * 500)
    flags = "--data.text text.txt --model.n_layer 1 --model.n_embd 24 --eval.tokens 1000"
    printed = execute("quickstart", tmp_path, monkeypatch, STEPS=4, FLAGS=flags)
    assert "run       runs/quickstart: config.toml, metrics.jsonl, loss.png, checkpoints/4" in printed
    assert "\nimport " in printed


@pytest.mark.slow
def test_fine_tuning_runs_and_resumes(tmp_path, monkeypatch, gpt2_vocabulary):
    """A tiny model of transformers in place of gpt2. The session is cut after two updates; then all cells run again."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("ROMEO: to be or not to be?\n" * 200)
    flags = "--batch_size 2 --micro_batch_size 2 --optimizer.decay_steps 4 --eval.sample_tokens 5"
    flags += " --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 64"
    settings = {"MODEL": "model", "TEXT": "text.txt", "SAVE_EVERY": 2, "PROMPT": "ROMEO", "FLAGS": flags}
    settings["NEW_TOKENS"] = 5
    printed = execute("finetune", tmp_path, monkeypatch, "train", STEPS=2, **settings)
    assert "2 updates, 256 tokens, from model\n" in printed
    printed = execute("finetune", tmp_path, monkeypatch, STEPS=4, **settings)
    assert "4 updates, 512 tokens, from model, resumed after update 2" in " ".join(printed.split())
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "runs/finetune-export-4").iterdir()}
