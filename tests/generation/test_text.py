"""Text in, text out from Python: `load(name).generate(text)`."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from torch_gpt2 import torch_gpt2
from transformers import AutoTokenizer

from gpt2_jax import load
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import DataConfig, GPT2Config, ModelConfig
from gpt2_jax.config.toml import to_toml
from gpt2_jax.data.tokenizer import byte_encoding
from gpt2_jax.errors import UserError
from gpt2_jax.generation import LanguageModel, Sampling, generate
from gpt2_jax.interop.keep_tokenizer import write_tokenizer
from gpt2_jax.model import GPT2, init_params

CONFIG = GPT2Config(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)
PROMPTS = ["é is", "One, two", "x"]
N = 50  # new tokens; with one number and short prompts, all greedy tests run the same two compiled programs


def save_run(run, config, data):
    """Writes a run directory. The parameters are larger than initial ones, so that the text varies."""
    params = jax.tree.map(lambda leaf: 5 * leaf, init_params(GPT2(config), jax.random.key(0)))
    run.mkdir()
    (run / "config.toml").write_text(to_toml(ModelConfig(config, data)))
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(5, {"params": params}, {})
    return run


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A model on bytes, loaded from a run directory."""
    return load(str(save_run(tmp_path_factory.mktemp("runs") / "bytes", CONFIG, DataConfig(tokenizer="bytes"))))


@pytest.fixture(scope="module")
def theirs():
    """A model of transformers, with blocks larger than initial ones, so that the text varies."""
    model = torch_gpt2(CONFIG)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter *= 4
    return model


def text_of(tokens):
    return bytes(int(token) for token in tokens if token < 256).decode("utf-8", "replace")


def test_text_from_a_run_is_the_text_of_its_tokens(gpt2):
    assert isinstance(gpt2, LanguageModel)
    for prompt in PROMPTS:
        (tokens,) = generate(gpt2.model, gpt2.params, [list(prompt.encode())], N, Sampling(0, stop=256))
        assert gpt2.generate(prompt, max_new_tokens=N, temperature=0) == prompt + text_of(tokens)
    assert gpt2.tokenizer.encode_ordinary("é") == list("é".encode())
    logits = gpt2.model.apply({"params": gpt2.params}, np.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 257)


def test_greedy_text_equals_that_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    write_tokenizer(byte_encoding(), tmp_path, CONFIG.block_size)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    gpt2 = load(str(tmp_path))
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = theirs.generate(**inputs, max_new_tokens=N, do_sample=False, pad_token_id=256, eos_token_id=256)
        text = gpt2.generate(prompt, max_new_tokens=N, temperature=0)
        assert text == tokenizer.decode(expected[0], skip_special_tokens=True)
        assert len(text) > len(prompt)


def test_generate_generate_batch_and_stream_agree(gpt2):
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 4}
    batch = gpt2.generate_batch(PROMPTS, max_new_tokens=30, samples=2, **options)
    assert len(set(batch)) == 6  # the samples of a prompt differ
    assert [gpt2.generate(prompt, max_new_tokens=30, **options) for prompt in PROMPTS] == batch[::2]
    texts = [prompt for prompt in PROMPTS for _ in range(2)]
    n_pieces = 0
    for pieces in gpt2.stream(PROMPTS, 30, Sampling(samples=2, **options)):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        n_pieces += 1
    assert texts == batch
    assert n_pieces > 2  # text arrives before all of it is drawn
    assert gpt2.generate_batch([]) == []


def test_an_empty_prompt_starts_a_new_text(gpt2, tmp_path):
    (tokens,) = generate(gpt2.model, gpt2.params, [[256]], N, Sampling(0, stop=256))
    assert gpt2.generate("", max_new_tokens=N, temperature=0) == text_of(tokens)
    config, data = dataclasses.replace(CONFIG, vocab_size=3), DataConfig(tokenizer="chars", characters="ab\n")
    chars = load(str(save_run(tmp_path / "chars", config, data)))
    with pytest.raises(UserError, match="the prompt is empty, and this model has no end-of-text token"):
        chars.generate("")
    with pytest.raises(UserError, match="the character 'x', which is not among the 3"):
        chars.generate("x")


def test_by_default_the_text_fills_the_context(gpt2):
    (tokens,) = generate(gpt2.model, gpt2.params, [list(b"None")], 60, Sampling(0, stop=256))
    assert gpt2.generate("None", temperature=0) == "None" + text_of(tokens)
    with pytest.raises(UserError, match=r"4 tokens of prompt and 61 new ones .* max_new_tokens = 60"):
        gpt2.generate("None", max_new_tokens=61)
    with pytest.raises(UserError, match="temperature = -1"):
        gpt2.generate("None", temperature=-1)


def test_a_model_without_a_tokenizer_still_has_its_parameters(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    gpt2 = load(str(tmp_path))
    for use in (lambda: gpt2.generate("x"), lambda: gpt2.stream(["x"]), lambda: gpt2.tokenizer):
        with pytest.raises(UserError, match=r"the tokenizer of .* is not known; put its vocab.json and merges.txt"):
            use()
    (tokens,) = generate(gpt2.model, gpt2.params, [[1, 2, 3]], N, Sampling(0))
    assert len(tokens) == N


# Imports the commands before the API, as a notebook may. Prints the state that they must leave alone.
IMPORTS = """
import json, logging, sys
import absl.logging
levels = {name: logging.getLogger(name).level for name in (None, "absl")}
import gpt2_jax.generate, gpt2_jax.train, gpt2_jax.convert, gpt2_jax.prepare, gpt2_jax.plan
import gpt2_jax
from gpt2_jax import GPT2, GPT2Config, load
from gpt2_jax.generation import generate, stream
print(json.dumps({
    "callable": [callable(name) for name in (GPT2, GPT2Config, load, generate, stream)],
    "modules": [load.__module__, generate.__module__, gpt2_jax.generate.__name__],
    "levels": levels == {name: logging.getLogger(name).level for name in (None, "absl")},
    "imported": [name for name in ("huggingface_hub", "torch", "transformers") if name in sys.modules],
}))
"""


def test_importing_the_commands_leaves_the_api_and_the_loggers_alone():
    output = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == {
        "callable": [True] * 5,
        "modules": ["gpt2_jax.interop", "gpt2_jax.generation.decode", "gpt2_jax.generate"],
        "levels": True,
        "imported": [],  # huggingface_hub reads the verbosity that a command sets when it is imported
    }
