"""EleutherAI's harness: its own `hf` model on exported weights and ours agree, and our tasks are the harness's."""

import json
import re
from pathlib import Path

import jax
import lm_eval
import numpy as np
import pytest
import tiktoken
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gpt2_jax import load
from gpt2_jax.config import GPT2Config, MeshConfig
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import evaluate
from gpt2_jax.evaluation.harness import HarnessModel, run_harness
from gpt2_jax.interop.huggingface import write_huggingface
from gpt2_jax.interop.stored import StoredModel
from gpt2_jax.model import GPT2, init_params
from gpt2_jax.sharding import make_mesh

CONFIG = GPT2Config(vocab_size=50257, block_size=128, n_layer=2, n_head=2, n_embd=32)
# The harness's own tasks, with local files in place of the hub's.
TASKS = {
    "local_hellaswag": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: endings
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "local_lambada": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "local_wikitext": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function preprocess_wikitext.wikitext_detokenizer
process_results: !function preprocess_wikitext.process_results
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """tiktoken's cache, for fixtures of the module."""
    cache = Path(__file__).parents[3] / "shared" / "gpt2_vocab" / "tiktoken_cache"
    if not cache.exists():
        pytest.skip(f"no GPT-2 vocabulary in {cache}")
    copy = tmp_path_factory.mktemp("tiktoken")
    for file in cache.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(copy))
        yield


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def pair(vocabulary, mesh, tmp_path_factory):
    """The harness's `hf` model and ours, with the same random weights."""
    directory = tmp_path_factory.mktemp("export")
    params = jax.tree.map(lambda leaf: 5 * np.asarray(leaf), init_params(GPT2(CONFIG), jax.random.key(0)))

    def read(name):
        tree = params
        for key in name.split("/"):
            tree = tree[key]
        return tree[: CONFIG.vocab_size] if name == "wte/embedding" else tree

    stored = StoredModel("random", CONFIG, read, lambda: tiktoken.get_encoding("gpt2"))
    write_huggingface(stored, directory, "float32")
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)
    return theirs, HarnessModel(load(str(directory), mesh=mesh), mesh=mesh)


def ask(model, kind, *arguments):
    requests = [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Paris."),  # the one before is its beginning
    ("The capital of France is ", "Paris"),  # the space belongs to the continuation
    ("The capital of France is", " Paris"),  # again
    ("", "Hello there"),
    ("A document.<|endoftext|>The next", " one"),
    ("Ωδε και ζωή 🙂", " naïve 🙂🙃"),
    ("word " * 150, "and the end of it"),  # longer than the model
    ("x", " antidisestablishmentarianism"),
]


def test_pairs_have_the_log_probabilities_of_hf(pair):
    theirs, ours = (ask(model, "loglikelihood", *PAIRS) for model in pair)
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in theirs], atol=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_context_of_spaces_belongs_to_the_continuation(pair):
    found, expected = ask(pair[1], "loglikelihood", ("  ", "Hello"), ("", "  Hello"))  # `hf` fails
    assert found == expected


def test_a_greedy_continuation_is_one(pair):
    theirs, ours = pair
    (text,) = ask(ours, "generate_until", ("The capital", {"until": [], "max_gen_toks": 4}))
    for model in (theirs, ours):
        ((_, greedy), (_, other)) = ask(model, "loglikelihood", ("The capital", text), ("The capital", text + " of"))
        assert (greedy, other) == (True, False)


def test_whole_texts_have_the_log_probabilities_of_hf(pair):
    # Not one word again and again: `hf` takes the logits of a window for those of another with the same input.
    texts = [("One two three",), (" ".join(map(str, range(300))),), ("Zoë " * 127 + "b",)]
    theirs, ours = (ask(model, "loglikelihood_rolling", *texts) for model in pair)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("until", [["\n\n"], [" the", "."], "e"])
def test_greedy_text_ends_as_that_of_hf(pair, until):
    prompts = ["Once upon a time", "The", "word " * 150]
    arguments = [(prompt, {"until": until, "max_gen_toks": 12}) for prompt in prompts]
    theirs, ours = (ask(model, "generate_until", *arguments) for model in pair)
    assert ours == theirs


def test_equal_prompts_draw_different_samples(pair):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    first, second = ask(pair[1], "generate_until", ("Once", dict(settings)), ("Once", dict(settings)))
    assert first != second
    assert ask(pair[1], "generate_until", ("Once", dict(settings))) == [first]


@pytest.fixture
def task_manager(shared_data, tmp_path):
    """The harness's tasks on the first examples of the real files."""

    def first(name, count):
        return (shared_data / name).read_text(encoding="utf-8").splitlines()[:count]

    text = (shared_data / "wikitext2_valid.txt").read_text(encoding="utf-8")
    pages = [page[:2000] for page in re.split(r"(?m)^(?= = [^=])", text)[1:4]]
    rows = map(json.loads, first("hellaswag_val_pre.jsonl", 12))
    files = {
        # Our reader removes the few brackets that the file still has.
        "local_hellaswag": [json.dumps(row) for row in rows if "[" not in "".join((row["query"], *row["endings"]))],
        "local_lambada": first("lambada_test.jsonl", 12),
        "local_wikitext": [json.dumps({"page": page}) for page in pages],
    }
    (tmp_path / "preprocess_wikitext.py").write_text("from lm_eval.tasks.wikitext.preprocess_wikitext import *\n")
    for name, lines in files.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        head = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
        )
        (tmp_path / f"{name}.yaml").write_text(head + TASKS[name])
    return TaskManager(include_path=str(tmp_path), include_defaults=False), tmp_path


def test_our_tasks_are_those_of_the_harness(pair, mesh, task_manager, monkeypatch):
    theirs, ours = pair
    manager, directory = task_manager
    monkeypatch.setenv("HF_DATASETS_CACHE", str(directory / "cache"))
    options = {"tasks": list(TASKS), "task_manager": manager, "bootstrap_iters": 0, "verbosity": "ERROR"}
    by_hf, by_us = (lm_eval.simple_evaluate(model, **options) for model in (theirs, ours))
    gpt2 = ours._gpt2
    for task, metrics in by_hf["results"].items():
        name = {"local_hellaswag": "hellaswag", "local_lambada": "lambada", "local_wikitext": "wikitext2"}[task]
        result = evaluate(gpt2.model, gpt2.params, gpt2.tokenizer, name, data=directory / f"{task}.jsonl", mesh=mesh)[
            name
        ]
        numbers = {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float)}
        assert numbers, task
        for key, value in numbers.items():
            assert by_us["results"][task][f"{key},none"] == pytest.approx(value, rel=1e-4)
            if not key.endswith("_stderr"):
                assert result.metrics[key].value == pytest.approx(value, rel=1e-4)
            elif key.startswith("acc"):
                assert result.metrics[key.removesuffix("_stderr")].stderr == pytest.approx(value, rel=1e-4)
    for sample, other in zip(by_hf["samples"]["local_hellaswag"], by_us["samples"]["local_hellaswag"], strict=True):
        found, expected = ([float(answer[0][0]) for answer in one["resps"]] for one in (other, sample))
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.slow
def test_tasks_of_the_harness_beside_ours(pair, mesh, task_manager, monkeypatch):
    manager, directory = task_manager
    monkeypatch.setenv("HF_DATASETS_CACHE", str(directory / "cache"))
    gpt2 = pair[1]._gpt2
    options = {"task_manager": manager, "bootstrap_iters": 0, "verbosity": "ERROR"}
    found = run_harness(gpt2, ["local_hellaswag", "local_wikitext"], mesh, limit=3, **options)
    assert list(found) == ["lm-eval:local_hellaswag", "lm-eval:local_wikitext"]
    acc = found["lm-eval:local_hellaswag"].metrics["acc"]
    assert (acc.count, len(acc.sums)) == (3, 3)  # of each example, for paired differences
    assert found["lm-eval:local_wikitext"].metrics["word_perplexity"].count == 3
    with pytest.raises(UserError, match="lm-eval has no task 'none'"):
        run_harness(gpt2, ["none"], mesh, **options)


def test_mistakes_have_their_line(pair, mesh):
    with pytest.raises(UserError, match="the model gpt2_jax has no argument revision"):
        HarnessModel(pair[1]._gpt2, mesh=mesh, revision="main")
    with pytest.raises(UserError, match="dtype = auto; expected float32, bfloat16, float16"):
        HarnessModel(pair[1]._gpt2, dtype="auto", mesh=mesh)
    with pytest.raises(UserError, match=r"\('unb', 'a'\), whose continuation has no tokens"):
        ask(pair[1], "loglikelihood", ("unb", "a"))
    with pytest.raises(UserError, match="128 new tokens, and the model's block_size is 128"):
        ask(pair[1], "generate_until", ("x", {"until": [], "max_gen_toks": 128}))
