"""Exports in the programs that docs/serving.md names: CTranslate2 and llama.cpp write our greedy text."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from model_files import save_run

from gpt2_jax import load
from gpt2_jax.config import GPT2Config
from gpt2_jax.convert import convert, main
from gpt2_jax.generation import Sampling, generate
from gpt2_jax.model import GPT2, init_params

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
CONFIG = GPT2Config(vocab_size=257, block_size=128, n_layer=2, n_head=2, n_embd=64)
PROMPTS = ("import ", "def é(x):", "\n\n")


@pytest.fixture(scope="module")
def ctranslate2():
    return pytest.importorskip("ctranslate2")


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on bytes. Its parameters are large, so that the most probable token is not one of many like it."""
    params = jax.tree.map(lambda leaf: 5 * leaf, init_params(GPT2(CONFIG), jax.random.key(0)))
    return save_run(tmp_path_factory.mktemp("runs") / "quickstart", CONFIG, params)


@pytest.fixture(scope="module")
def expected(run):
    """The tokens that we write greedily after each prompt."""
    gpt2 = load(str(run))
    prompts = [gpt2.tokenizer.encode_ordinary(prompt) for prompt in PROMPTS]
    return [row.tolist() for row in generate(gpt2.model, gpt2.params, prompts, 60, Sampling(temperature=0.0))]


def test_ctranslate2_writes_the_same_text_in_float32(ctranslate2, run, expected, tmp_path):
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    export = convert(str(run), "huggingface", tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(export)
    TransformersConverter(str(export)).convert(str(tmp_path / "ct2"), quantization="float32")
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
    prompts = [tokenizer.convert_ids_to_tokens(tokenizer.encode(prompt)) for prompt in PROMPTS]
    results = generator.generate_batch(prompts, max_length=60, sampling_topk=1, include_prompt_in_result=False)
    assert [result.sequences_ids[0] for result in results] == expected


def test_llama_cpp_writes_the_same_text_in_float32(llama_cpp, run, expected, tmp_path):
    file = convert(str(run), "gguf", tmp_path / "out") / "model.gguf"
    kind = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(str(file), n_ctx=0, type_k=kind, type_v=kind, verbose=False)
    assert llama.n_ctx() >= CONFIG.block_size
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        llama.reset()
        written = llama.generate(llama.tokenize(prompt.encode(), add_bos=False), temp=0.0)
        assert list(itertools.islice(written, 60)) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("module", ["ctranslate2", "llama_cpp"])
def test_the_page_serves_the_quickstart(request, tmp_path, monkeypatch, module):
    """Runs the commands of the page's section, as far as they are installed, and its Python."""
    request.getfixturevalue(module)
    run = request.getfixturevalue("run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(run)
    section = next(part for part in PAGE.split("\n## ") if f"```python {module}\n" in part)
    for line in re.findall(r"^(?:python -m gpt2_jax\.convert|ct2-\S+) .*$", section, re.MULTILINE):
        command, *words = shlex.split(line)
        if command == "python":
            assert main(words[2:]) == 0
        else:
            subprocess.run([Path(sys.executable).parent / command, *words], check=True, capture_output=True)
    (code,) = re.findall(rf"^```python {module}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    assert len(names["text"]) > 3
