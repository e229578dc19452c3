"""Real examples through `transformers` and torch, one sequence at a time, as lm-eval scores them."""

import json
import math
import re

import jax
import numpy as np
import pytest
import tiktoken
import torch
from torch_gpt2 import as_params, torch_gpt2

from gpt2_jax.config import GPT2Config, MeshConfig
from gpt2_jax.data.tokenizer import byte_encoding
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import TASKS, Evaluator
from gpt2_jax.evaluation.examples import load_examples, locate
from gpt2_jax.evaluation.task import Setting
from gpt2_jax.evaluation.wikitext import detokenize
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import make_mesh

END = 50256
# The flags of other tests compile fast. Here the code has to be fast: the vocabulary is GPT-2's.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
pytestmark = pytest.mark.usefixtures("gpt2_vocabulary")


class Pair:
    """The same random weights in both models."""

    def __init__(self, block_size):
        config = GPT2Config(block_size=block_size, n_layer=2, n_head=2, n_embd=32, attention="xla")
        self.block_size, self.torch = block_size, torch_gpt2(config)
        with torch.no_grad():
            for parameter in self.torch.parameters():  # far from a uniform distribution
                parameter *= 5
        self.model, self.params = GPT2(config), as_params(self.torch.state_dict(), config)

    def evaluate(self, tasks, data, **options):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        tokenizer = tiktoken.get_encoding("gpt2")
        return Evaluator(self.model, tokenizer, tasks, mesh, data=[data], options=OPTIMIZED, **options)(self.params)

    @torch.no_grad()
    def score(self, context, continuation):
        """Log-probability and whether each token is the most probable one. The context is cut on the left."""
        tokens = [*context, *continuation][-self.block_size - 1 :]
        logits = self.torch(torch.tensor([tokens[:-1]]), logits_to_keep=len(continuation)).logits[0].double()
        targets = torch.tensor(tokens[-len(continuation) :])
        log_probs = logits.log_softmax(-1).gather(1, targets[:, None])
        return float(log_probs.sum()), (logits.argmax(-1) == targets).tolist()

    def rolling(self, tokens, size):
        """The log-probability of a document: each token once, the last `size` of a longer context."""
        before, total = [END, *tokens], 0.0
        for start in range(0, len(tokens), size):
            stop = min(start + size, len(tokens))
            total += self.score(before[: start + 1], tokens[start:stop])[0]
        return total


@pytest.fixture(scope="module")
def pair():
    return Pair(80)  # shorter than some contexts with their endings


def encode_pair(encoding, context, continuation):
    length = len(encoding.encode_ordinary(context))
    tokens = encoding.encode_ordinary(context + continuation)
    return tokens[:length], tokens[length:]


def lines(path, count):
    """Lines from the whole file: the first of HellaSwag are short."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows[:: len(rows) // count]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def check_choices(result, expected, labels, normalized):
    """Log-probabilities within 1e-3, and the same choices but for ties."""
    found = np.array([[score.total for score in scores] for scores in result.scores])
    np.testing.assert_allclose(found, expected, atol=1e-3)
    for name, values in (("acc", expected), ("acc_norm", normalized)):
        order = np.sort(values, axis=1)
        clear = order[:, -1] - order[:, -2] > 2e-3
        assert clear.mean() > 0.9
        right = values.argmax(axis=1) == labels
        assert (result.metrics[name].sums[clear] == right[clear]).all()


def check_hellaswag(pair, shared_data, tmp_path, count):
    encoding, rows = tiktoken.get_encoding("gpt2"), lines(shared_data / "hellaswag_val_pre.jsonl", count)
    rows = [row for row in rows if "[" not in "".join((row["query"], *row["endings"]))]  # which would be removed
    cleaned = write(tmp_path / "hellaswag_val_pre.jsonl", rows)
    raw = write(tmp_path / "hellaswag_val.jsonl", [{**row, "ctx": row["query"]} for row in rows])
    labels = np.array([row["label"] for row in rows])
    pairs = [[encode_pair(encoding, row["query"], " " + end) for end in row["endings"]] for row in rows]
    assert max(len(context) + len(ending) for group in pairs for context, ending in group) > pair.block_size + 1
    sums = np.array([[pair.score(*both)[0] for both in group] for group in pairs])
    characters = np.array([[len(end) for end in row["endings"]] for row in rows])
    result = pair.evaluate("hellaswag", cleaned)["hellaswag"]
    check_choices(result, sums, labels, sums / characters)

    tokens = np.array([[len(ending) for _, ending in group] for group in pairs])
    result = pair.evaluate("hellaswag-completion", raw)["hellaswag-completion"]
    check_choices(result, sums, labels, sums / tokens)


def check_lambada(pair, shared_data, tmp_path, count):
    encoding, rows = tiktoken.get_encoding("gpt2"), lines(shared_data / "lambada_test.jsonl", count)
    log_probs, greedy = [], []
    for row in rows:
        words = row["text"].split(" ")
        both = pair.score(*encode_pair(encoding, " ".join(words[:-1]), " " + words[-1]))
        log_probs.append(both[0])
        greedy.append(both[1])
    assert max(map(len, greedy)) > 1
    result = pair.evaluate("lambada", write(tmp_path / "lambada_test.jsonl", rows))["lambada"]
    np.testing.assert_allclose([scores[0].total for scores in result.scores], log_probs, atol=1e-3)
    assert [scores[0].greedy.tolist() for scores in result.scores] == greedy
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(-np.mean(log_probs)), rel=1e-4)
    assert result.metrics["acc"].value == np.mean([all(tokens) for tokens in greedy])


def check_wikitext(pair, shared_data, tmp_path, count):
    encoding, text = tiktoken.get_encoding("gpt2"), (shared_data / "wikitext2_valid.txt").read_text(encoding="utf-8")
    pages = sorted(re.split(r"(?m)^(?= = [^=])", text)[1:], key=len)[:count]
    pages = [page.removesuffix("\n") for page in pages]
    path = write(tmp_path / "pages.jsonl", [{"page": page} for page in pages])
    tokens = [encoding.encode_ordinary(detokenize(page)) for page in pages]
    nats = -sum(pair.rolling(page, pair.block_size) for page in tokens)
    result = pair.evaluate("wikitext2", path)["wikitext2"].metrics
    n_words, n_bytes = sum(len(re.split(r"\s+", page)) for page in pages), sum(len(page.encode()) for page in pages)
    assert result["word_perplexity"].value == pytest.approx(math.exp(nats / n_words), rel=1e-4)
    assert result["byte_perplexity"].value == pytest.approx(math.exp(nats / n_bytes), rel=1e-4)
    assert result["bits_per_byte"].value == pytest.approx(nats / n_bytes / math.log(2), rel=1e-4)
    return pages


def check_sliding(pair, pages, tmp_path, limit):
    encoding, stride = tiktoken.get_encoding("gpt2"), pair.block_size // 2
    path = tmp_path / "wiki.test.raw"
    path.write_text("\n".join(pages), encoding="utf-8")
    tokens = encoding.encode_ordinary("\n".join(map(detokenize, pages)))
    before, total, start = [END, *tokens], 0.0, 0
    for _ in range(limit):
        stop = start + (stride if start else pair.block_size)
        total -= pair.score(before[: start + 1], tokens[start:stop])[0]
        start = stop
    assert start < len(tokens)
    result = pair.evaluate("wikitext2-sliding", path, limit=limit)["wikitext2-sliding"].metrics
    assert result["token_perplexity"].value == pytest.approx(math.exp(total / start), rel=1e-4)
    words = start * len("\n".join(pages).split()) / len(tokens)
    assert result["word_perplexity"].value == pytest.approx(math.exp(total / words), rel=1e-4)


def test_a_few_real_examples(pair, shared_data, tmp_path):
    check_hellaswag(pair, shared_data, tmp_path, 5)
    check_lambada(pair, shared_data, tmp_path, 10)
    check_sliding(pair, check_wikitext(pair, shared_data, tmp_path, 1), tmp_path, 2)


@pytest.mark.slow
def test_more_real_examples(shared_data, tmp_path):
    pair = Pair(80)
    check_hellaswag(pair, shared_data, tmp_path, 40)
    check_lambada(pair, shared_data, tmp_path, 60)
    check_sliding(pair, check_wikitext(pair, shared_data, tmp_path, 3), tmp_path, 12)


def test_what_published_figures_compare_with(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" = A = \n b")
    (tmp_path / "mine.txt").write_text(" = A = \n b")
    write(tmp_path / "lambada_test.jsonl", [{"text": "a b"}] * 5153)
    openai, gpt2 = GPT2Config(), tiktoken.get_encoding("gpt2")

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def comparable(task="wikitext2", config=openai, tokenizer=gpt2, data=tmp_path, **options):
        return Evaluator(GPT2(config), tokenizer, task, mesh, data=[data], **options).references()

    assert comparable()
    assert comparable("lambada")
    assert comparable("lambada", limit=10)  # a line in the plot, and no figure beside the result
    assert not comparable(data=tmp_path / "mine.txt")
    assert not comparable(tokenizer=byte_encoding())
    assert not comparable(config=GPT2Config(block_size=512))
    write(tmp_path / "lambada_test.jsonl", [{"text": "a b"}] * 5152)
    assert not comparable("lambada")


def test_too_many_spaces_are_an_error(pair, tmp_path):
    path = write(tmp_path / "lambada_test.jsonl", [{"text": "a" + " " * 1_000_000 + "b"}])
    with pytest.raises(UserError, match=r"lambada, example 1 has more than 999,998 spaces in a row"):
        pair.evaluate("lambada", path)


@pytest.mark.slow
def test_the_whole_files_are_read(shared_data):
    """Every example of the public files becomes requests that fit into GPT-2's block_size."""
    setting = Setting(tiktoken.get_encoding("gpt2"), 1024)
    for name in ("hellaswag", "lambada"):
        examples = load_examples(TASKS[name], locate(TASKS[name], [shared_data]))
        assert len(examples) == TASKS[name].n_examples
        prepared = TASKS[name].prepare(examples, setting)
        assert len(prepared.requests) == len(examples)  # all endings share their context
        assert max(len(tokens) for request in prepared.requests for tokens in request.continuations) < 200
    pages = load_examples(TASKS["wikitext2"], locate(TASKS["wikitext2"], [shared_data / "wikitext2_valid.txt"]))
    assert len(pages) == 60
