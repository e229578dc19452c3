"""The generate command as a user runs it, and text from tokens as they come."""

import io
import re
import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt2_jax import generate as command
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import DataConfig, GPT2Config, ModelConfig
from gpt2_jax.config.toml import to_toml
from gpt2_jax.data.tokenizer import CharTokenizer, TextStream, byte_encoding
from gpt2_jax.errors import UserError
from gpt2_jax.generation import LanguageModel, Sampling, generate
from gpt2_jax.interop import open_model
from gpt2_jax.interop.stored import StoredModel
from gpt2_jax.model import GPT2, init_params
from gpt2_jax.planning import shortage

CONFIG = GPT2Config(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of a model on bytes, with its model and parameters."""
    out = tmp_path_factory.mktemp("runs") / "bytes"
    model = GPT2(CONFIG)
    params = jax.tree.map(lambda leaf: 5 * leaf, init_params(model, jax.random.key(0)))
    out.mkdir()
    (out / "config.toml").write_text(to_toml(ModelConfig(CONFIG, DataConfig(tokenizer="bytes"))))
    with Checkpoints(out / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(5, {"params": params}, {})
    return out, model, params


def text_of(tokens):
    return bytes(int(token) for token in tokens if token < 256).decode("utf-8", "replace")


def expected(model, params, prompt, n, **options):
    rows = generate(model, params, [list(prompt.encode())], n, Sampling(stop=256, **options))
    return [prompt + text_of(row) for row in rows]


def test_continues_a_prompt(run, capsys):
    out, model, params = run
    args = ["--model", str(out), "--prompt", "é is", "--max-new-tokens", "40", "--temperature", "0"]
    assert command.main(args) == 0
    assert capsys.readouterr() == (expected(model, params, "é is", 40, temperature=0)[0] + "\n", "")


def test_bfloat16_computes_in_bfloat16_and_warns_on_a_cpu(run, capsys):
    out, model, params = run
    command.main(["--model", str(out), "--prompt", "é is", "--max-new-tokens", "40", "--dtype", "bfloat16"])
    printed = capsys.readouterr()
    rounded = expected(model.clone(dtype=jax.numpy.bfloat16), params, "é is", 40)[0]
    assert printed.out == rounded + "\n"
    assert rounded != expected(model, params, "é is", 40)[0]
    assert printed.err.startswith("warning: writing text in bfloat16 is slow on a CPU")
    assert printed.err.endswith("type --dtype float32\n")
    assert printed.err.count("\n") == 1


def test_several_samples_are_all_shown(run, capsys):
    out, model, params = run
    flags = ["--samples", "3", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "4"]
    assert command.main(["--model", str(out), "--prompt", "One", "--max-new-tokens", "30", *flags]) == 0
    first, second, third = expected(model, params, "One", 30, temperature=0.9, top_k=50, top_p=0.95, samples=3, seed=4)
    printed = capsys.readouterr().out
    assert printed == f"{first}\n\n--- sample 2 ---\n{second}\n\n--- sample 3 ---\n{third}\n"


def test_the_prompt_may_come_from_a_file_or_from_standard_input(run, tmp_path, monkeypatch, capsys):
    out, model, params = run
    line = expected(model, params, "From\nhere", 10, temperature=0)[0] + "\n"
    (tmp_path / "prompt.txt").write_text("From\nhere")
    args = ["--model", str(out), "--max-new-tokens", "10", "--temperature", "0"]
    command.main([*args, "--prompt-file", str(tmp_path / "prompt.txt")])
    assert capsys.readouterr().out == line
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"From\nhere")))
    command.main(args)
    assert capsys.readouterr().out == line


def test_an_empty_prompt_starts_after_end_of_text(run, capsys):
    out, model, params = run
    command.main(["--model", str(out), "--prompt", "", "--max-new-tokens", "10", "--temperature", "0"])
    (row,) = generate(model, params, [[256]], 10, Sampling(0, stop=256))
    assert capsys.readouterr().out == text_of(row) + "\n"


def test_as_many_tokens_as_there_is_room_for_by_default(run, capsys):
    out, model, params = run
    command.main(["--model", str(out), "--prompt", "None", "--temperature", "0"])
    assert capsys.readouterr().out == expected(model, params, "None", 60, temperature=0)[0] + "\n"


def test_slide_goes_past_block_size(run, capsys):
    out, model, params = run
    args = ["--model", str(out), "--prompt", "Far", "--max-new-tokens", "80", "--temperature", "0"]
    with pytest.raises(UserError, match=r"3 tokens of prompt and 80 new ones .* max_new_tokens = 61, or --slide"):
        command.main(args)
    assert capsys.readouterr().out == ""
    command.main([*args, "--slide"])
    assert capsys.readouterr().out == expected(model, params, "Far", 80, temperature=0, slide=True)[0] + "\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "x"], "--model"),
        (["--model", "runs/none", "--prompt", "x", "--top-k", "many"], "--top-k"),
        (["--model", "runs/none", "--prompt", "x", "--temperature", "-1"], "temperature = -1"),
        (["--model", "runs/none", "--prompt", "x", "--samples", "0"], "samples = 0; expected at least 1"),
        (["--model", "runs/none", "--prompt", "x", "--samples", "9" * 400], "samples = 9+; expected .* at most 65,536"),
        (["--model", "runs/none", "--prompt", "x", "--prompt-file", "y"], "are both given; give one of them"),
        (["--model", "runs/none", "--prompt-file", "y"], "--prompt-file y: No such file"),
        (["--model", "./none", "--prompt", "x"], "./none does not exist; expected a run directory"),
    ],
)
def test_mistakes_have_their_line(args, message):
    with pytest.raises(UserError, match=message) as error:
        command.main(args)
    assert "\n" not in str(error.value)


def test_a_mistake_ends_with_one_line_and_exit_code_2():
    args = [sys.executable, "-m", "gpt2_jax.generate", "--model", "./none", "--prompt", "x"]
    process = subprocess.run(args, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ./none does not exist")
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""


def test_a_reader_that_has_enough_is_no_error(run):
    args = f"{sys.executable} -m gpt2_jax.generate --model {run[0]} --prompt abc --slide --max-new-tokens 100 | true"
    process = subprocess.run(["bash", "-c", args], capture_output=True, text=True, check=False)
    assert process.stderr == ""


def test_text_commands_no_terminal_and_is_raw_in_a_pipe(run, monkeypatch, capsys):
    args = ["--model", str(run[0]), "--prompt", "a\x1b[2J\r\x07\n\té", "--max-new-tokens", "2", "--temperature", "0"]
    command.main(args)
    assert capsys.readouterr().out.startswith("a\x1b[2J\r\x07\n\té")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command.main(args)
    shown = "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\n\té"
    line, _, text = capsys.readouterr().out.rpartition("\x1b[2K")  # a line about what is loaded, and its removal
    assert text.startswith(shown)
    assert "\n\té" not in line


@pytest.mark.parametrize("where", ["load", "stream"])
def test_without_memory_the_largest_number_of_samples_that_fits_is_named(run, monkeypatch, where):
    """The memory is such that 8 samples need it all, with the tenth part of it for what an allocator cannot use."""
    out, _, _ = run

    def required(samples):
        work = command._Work(open_model(str(out)), "float32", 3, 40, Sampling(samples=samples))
        return work._required()

    sizes = {samples: required(samples) for samples in (8, 64)}
    # Each sequence has a cache: keys and values of both layers for 64 slots, the bucket of 3 tokens and 40 new ones.
    cache = 2 * CONFIG.n_layer * CONFIG.n_embd * 64 * 4
    assert (sizes[64] - sizes[8]) / 56 == pytest.approx(cache, rel=0.5)
    available = sizes[8] / 0.9
    assert sizes[8] < 0.95 * available < sizes[64]

    def fail(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(StoredModel if where == "load" else LanguageModel, where, fail)
    monkeypatch.setattr(shortage, "available_memory", lambda device: available)
    needed = sizes[64] / 2**30, available / 2**30
    message = f"^writing text needs {needed[0]:.3g} of {needed[1]:.3g} GiB on cpu; type --samples 8$"
    with pytest.raises(UserError, match=message):
        command.main(["--model", str(out), "--prompt", "abc", "--max-new-tokens", "40", "--samples", "64"])


@pytest.mark.slow
def test_memory_that_really_runs_out_is_one_line(run):
    """65,536 samples need 3.3 GiB beside Python and JAX, and the shell lets the process have 4 GB of addresses."""
    args = ["--model", str(run[0]), "--prompt", "a", "--samples", "65536", "--temperature", "0"]
    command = shlex.join([sys.executable, "-m", "gpt2_jax.generate", *args])
    done = subprocess.run(["bash", "-c", f"ulimit -v 4000000; {command}"], capture_output=True, text=True, check=False)
    line = r"error: .*writing text needs [\d.]+ of [\d.]+ GiB.* type --samples 32768\n"
    assert re.fullmatch(line, done.stderr), done.stderr
    assert done.returncode == 2


def test_parameters_are_read_in_the_dtype_of_the_matmuls(run, monkeypatch, capsys):
    """The parameters of gpt2-xl are 3.1 GB in bfloat16, instead of 6.2 GB in float32 and then 3.1 GB more."""
    out, _, _ = run
    dtypes = set()
    place = StoredModel.place

    def record(self, abstract):
        params = place(self, abstract)
        dtypes.update((leaf.ndim, str(leaf.dtype)) for leaf in jax.tree.leaves(params))
        return params

    monkeypatch.setattr(StoredModel, "place", record)
    command.main(["--model", str(out), "--prompt", "a", "--max-new-tokens", "2", "--dtype", "bfloat16"])
    assert dtypes == {(1, "float32"), (2, "bfloat16")}


@pytest.mark.slow
def test_ctrl_c_while_text_is_written_ends_with_130(run):
    args = [
        "-m",
        "gpt2_jax.generate",
        "--model",
        str(run[0]),
        "--prompt",
        "abc",
        "--slide",
        "--max-new-tokens",
        "1000000",
    ]
    process = subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(10).startswith(b"abc")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"interrupted\n")


def test_text_is_whole_characters_as_it_comes():
    tokens = np.frombuffer("aé€😀b".encode(), np.uint8)
    text = TextStream(byte_encoding(), (256,))
    pieces = [text.add(tokens[index : index + 1]) for index in range(len(tokens))]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert text.end() == ""
    text = TextStream(byte_encoding(), (256,))
    assert text.add(np.array([0xF0, 0x9F])) == ""
    assert text.end() == "\N{REPLACEMENT CHARACTER}"
    text = TextStream(byte_encoding(), (256,))
    assert text.add(np.array([65, 256, 66])) + text.add(np.array([256, 66])) + text.end() == "A"
    assert text.ended
    text = TextStream(byte_encoding(), (256, 10))
    assert text.add(np.array([65, 10, 66, 256])) == "A"
    text = TextStream(CharTokenizer("ab"), ())
    assert text.add(np.array([1, 0])) == "ba"
