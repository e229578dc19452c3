"""The model card of an export: what the hub reads of it, and what people do."""

import math

import numpy as np
import pytest
from huggingface_hub import ModelCard

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.stored import StoredModel, parameter_shapes
from gpt2_jax.reports.card import model_card, run_of


def model(step=40):
    config = GPT2Config(vocab_size=50, n_layer=1, n_embd=8, n_head=2, block_size=16)
    shapes = parameter_shapes(config)
    stored = StoredModel("somewhere", config, lambda name: np.ones(shapes[name], np.float32), lambda: None, step)
    stored = stored.with_fingerprint()
    assert len(list(stored.parameters())) == len(shapes)
    return stored


def test_the_hub_reads_the_evaluations_of_the_update(make_run):
    card = ModelCard(model_card(model(step=30), "mine", run_of(str(make_run("run")))))
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    (result,) = card.data.eval_results
    found = (result.dataset_type, result.metric_type, result.metric_value)
    assert found == ("hellaswag", "acc", 0.25 + 30 / 1000)
    assert "| hellaswag/acc | 0.2800 | 0.2892 (lm-evaluation-harness" in card.text
    assert "| tokens | 123k |" in card.text
    assert "| updates | 30 of 40 |" in card.text
    assert f"| validation loss | {8.5 / 30 + 1:.4f} nats per token |" in card.text
    assert "## Samples" not in card.text  # there are none at this update


def test_samples_are_those_of_the_update(make_run):
    text = model_card(model(), "mine", run_of(str(make_run("run"))))
    assert "    Hello <script>alert(1)</script>" in text
    assert text.count("    Hello") == 1


def test_a_model_of_unknown_origin():
    stored = model(step=0)
    text = model_card(stored, "a: 'name'", None)
    card = ModelCard(text)
    assert card.data.eval_results is None
    n_params = sum(map(math.prod, parameter_shapes(stored.config).values()))
    assert f"A GPT-2 with {n_params:,} parameters: 1 layers" in card.text
    assert f"`{stored.fingerprint}`" in card.text
    assert "Training" not in card.text


@pytest.mark.parametrize("source", ["run", "run/checkpoints/40"])
def test_a_run_is_found_by_its_directory_and_by_a_checkpoint(make_run, tmp_path, source):
    make_run("run")
    assert run_of(str(tmp_path / source)).name == "run"
    for other in (
        "gpt2",
        str(tmp_path),
        str(tmp_path / "run" / "checkpoints"),
        str(tmp_path / "run" / "exports" / "hf"),
    ):
        assert run_of(other) is None
