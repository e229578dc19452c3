"""Scoring in packed rows: equal to the model on each sequence alone, for any number of devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.config import GPT2Config, MeshConfig
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import packing, scoring
from gpt2_jax.evaluation.packing import layout, make_trees, pack
from gpt2_jax.evaluation.requests import Request, Score, disjoint_windows, encode_pair, sliding_windows
from gpt2_jax.evaluation.scoring import Scorer
from gpt2_jax.layers import stack_layers
from gpt2_jax.model import GPT2, init_params
from gpt2_jax.sharding import make_mesh, state_sharding

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=97)
# Float32 logits of about 20 are 2e-6 apart, and the two programs add in another order in every matmul and softmax.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> GPT2:
    return GPT2(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    # Larger than at initialization, so that neighbors and positions matter.
    return jax.tree.map(lambda leaf: 5 * leaf, init_params(model, jax.random.key(0)))


def make_requests(n: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(0, CONFIG.vocab_size, rng.integers(low, high)).tolist()

    return [Request(tokens(1, 40), tuple(tokens(0, 20) for _ in range(rng.integers(1, 5)))) for _ in range(n)]


def score(model, params, requests, devices: int = 1, **mesh: int) -> list[list[Score]]:
    grid = make_mesh(MeshConfig(**mesh), jax.devices()[:devices])
    return Scorer(model, grid).score(jax.device_put(params, state_sharding(grid, params)), requests)


def alone(model, params, request: Request) -> list[Score]:
    """Each continuation in a row of its own, by the logits of the model."""
    scores = []
    for continuation in request.continuations:
        read = [*request.context, *continuation][-CONFIG.block_size - 1 :][:-1] if len(continuation) else []
        if not read:
            scores.append(Score(np.zeros(0, np.float32), np.zeros(0, bool)))
            continue
        padded = jnp.array([read + [0] * (CONFIG.block_size - len(read))])
        logits = np.asarray(_logits(model, params, padded), np.float64)[0, len(read) - len(continuation) : len(read)]
        at_target = logits[np.arange(len(continuation)), np.asarray(continuation)]
        log_probs = at_target - np.log(np.exp(logits - logits.max()).sum(axis=-1)) - logits.max()
        scores.append(Score(log_probs, logits.argmax(axis=-1) == np.asarray(continuation)))
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


def assert_close(found: list[list[Score]], expected: list[list[Score]]) -> None:
    for of_request, wanted in zip(found, expected, strict=True):
        for score, want in zip(of_request, wanted, strict=True):
            np.testing.assert_allclose(score.log_probs, want.log_probs, atol=TOLERANCE, rtol=0)
            np.testing.assert_array_equal(score.greedy, want.greedy)


@pytest.mark.usefixtures("strict_dtypes")
def test_packed_rows_score_as_each_sequence_alone(model, params):
    requests = make_requests(24)
    assert_close(score(model, params, requests), [alone(model, params, request) for request in requests])


def test_contexts_are_cut_only_for_the_continuations_that_need_it(model, params):
    rng = np.random.default_rng(1)
    context = rng.integers(0, 97, 60).tolist()
    endings = tuple(rng.integers(0, 97, size).tolist() for size in (5, 6, 20, 64, 1))  # 5 fits, 6 does not
    request = Request(context, endings)
    assert [len(tree.context) for tree in make_trees([request], 64)] == [60, 59, 45, 1]
    assert_close(score(model, params, [request]), [alone(model, params, request)])


def test_a_continuation_without_room_and_an_empty_context_are_refused(model, params):
    with pytest.raises(UserError, match=r"a continuation of 65 tokens .* block_size of 64"):
        score(model, params, [Request([1], ([2] * 65,))])
    with pytest.raises(UserError, match="no context"):
        score(model, params, [Request([], ([2],))])


@pytest.mark.parametrize("devices", [2, 8])
def test_the_number_of_devices_does_not_change_a_bit(model, params, devices):
    requests = make_requests(37, seed=2)
    one, many = (score(model, params, requests, count) for count in (1, devices))
    for of_request, others in zip(one, many, strict=True):
        for found, other in zip(of_request, others, strict=True):
            np.testing.assert_array_equal(found.log_probs, other.log_probs)
            np.testing.assert_array_equal(found.greedy, other.greedy)


def test_sharded_and_stacked_parameters_score_the_same(model, params):
    requests = make_requests(20, seed=3)
    stacked = model.clone(config=dataclasses.replace(CONFIG, scan_layers=True, remat="full"))
    found = score(stacked, stack_layers(params), requests, 8, fsdp=2)
    assert_close(found, score(model, params, requests))


def test_rows_with_one_text_use_the_attention_backend_of_the_model(model, params, monkeypatch):
    tokens = np.random.default_rng(4).integers(0, 97, 5 * CONFIG.block_size).tolist()
    windows = list(disjoint_windows(tokens, 0, CONFIG.block_size))
    expected = [alone(model, params, request) for request in windows]

    def refuse(*_) -> None:
        raise AssertionError("packed attention is not needed")

    monkeypatch.setattr(packing, "LONGEST_SEARCHED", CONFIG.block_size)
    monkeypatch.setattr("gpt2_jax.model.packed_attention", refuse)
    assert_close(score(model, params, windows), expected)


def test_one_program_scores_everything_and_only_the_last_batch_has_empty_rows(model, params, monkeypatch):
    monkeypatch.setattr(scoring, "CPU_TOKENS_PER_CALL", 512)
    mesh = make_mesh(MeshConfig())
    eight = Scorer(model, mesh)
    filled: list[float] = []
    step = eight._step

    def counted(params, rows, single):
        filled.append((np.asarray(rows.used) > 0).mean())
        return step(params, rows, single=single)

    eight._step = counted
    eight.score(jax.device_put(params, state_sharding(mesh, params)), make_requests(600, seed=5))
    assert len(filled) > 2
    assert set(filled[:-1]) == {1.0}
    assert step._cache_size() == 1


def test_progress_counts_continuations(model, params):
    seen: list[int] = []
    requests = make_requests(10, seed=6)
    Scorer(model, make_mesh(MeshConfig(), jax.devices()[:1])).score(params, requests, seen.append)
    total = sum(len(continuation) > 0 for request in requests for continuation in request.continuations)
    assert seen == list(range(1, total + 1))


# --- packing -------------------------------------------------------------------------------------------

TOKEN = st.integers(0, 96)
REQUESTS = st.lists(
    st.builds(
        lambda context, continuations: Request(context, tuple(continuations)),
        st.lists(TOKEN, min_size=1, max_size=90),
        st.lists(st.lists(TOKEN, max_size=64), min_size=1, max_size=5),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(REQUESTS)
def test_each_target_sees_its_context_and_the_continuation_before_it(requests):
    length, rows = pack(make_trees(requests, 64), 32)
    arrays, scored = layout(rows, length)
    found = set()
    for row, continuations in enumerate(scored):
        target = 0
        for slot, n_tokens in continuations:
            request = requests[slot.request]
            continuation = list(request.continuations[slot.continuation])
            assert n_tokens == len(continuation)
            text = [*request.context, *continuation][-65:]
            found.add(slot)
            for index in range(n_tokens):
                source = arrays.sources[row, target]
                seen = [
                    key
                    for key in range(source + 1)
                    if arrays.segments[row, key] in (arrays.segments[row, source], arrays.parents[row, source])
                ]
                assert arrays.tokens[row, seen].tolist() == text[: len(text) - n_tokens + index]
                assert arrays.positions[row, seen].tolist() == list(range(len(seen)))
                assert arrays.targets[row, target] == continuation[index]
                target += 1
        assert arrays.used[row] == target
    expected = {
        (index, place)
        for index, request in enumerate(requests)
        for place, continuation in enumerate(request.continuations)
        if continuation
    }
    assert found == expected


def test_rows_are_filled():
    rng = np.random.default_rng(7)
    trees = make_trees([Request([0] * rng.integers(20, 80), ([1] * 30,) * 4) for _ in range(500)], 1024)
    length, rows = pack(trees, 768)
    assert sum(tree.size for tree in trees) / (length * len(rows)) > 0.9


# --- texts and documents -------------------------------------------------------------------------------


class Letters:
    """A tokenizer of letters in which a space joins the letter after it, and "ab" is one token."""

    n_vocab = 1 << 16

    def encode_ordinary(self, text: str) -> list[int]:
        return [int.from_bytes(piece.encode(), "big") for piece in re.findall(r" ?ab| ?\w| ", text)]

    def decode_bytes(self, tokens: list[int]) -> bytes:
        raise NotImplementedError


def test_pairs_are_split_as_lm_eval_splits_them():
    encode = Letters().encode_ordinary
    assert encode_pair(Letters(), "x y", " c d") == (encode("x y"), encode(" c d"))
    assert encode_pair(Letters(), "x y  ", "c") == (encode("x y"), encode("  c"))
    # A merge across the border: "x a" and "x ab" both have two tokens, so " c" is left for the continuation.
    assert encode_pair(Letters(), "x a", "b c") == (encode("x a"), encode(" c"))


def contexts_and_targets(windows) -> list[tuple[list[int], list[int]]]:
    return [(np.asarray(window.context).tolist(), window.continuations[0].tolist()) for window in windows]


def test_disjoint_windows_by_hand():
    tokens = list(range(1, 11))
    assert contexts_and_targets(disjoint_windows(tokens, 0, 4)) == [
        ([0], [1, 2, 3, 4]),
        ([4], [5, 6, 7, 8]),
        ([6, 7, 8], [9, 10]),  # four tokens are read: 6, 7, 8 and 9
    ]
    assert contexts_and_targets(disjoint_windows(tokens[:3], 0, 4)) == [([0], [1, 2, 3])]
    assert contexts_and_targets(disjoint_windows([], 0, 4)) == []


def test_sliding_windows_by_hand():
    tokens = list(range(1, 11))
    assert contexts_and_targets(sliding_windows(tokens, 0, 4, 2)) == [
        ([0], [1, 2, 3, 4]),
        ([2, 3, 4], [5, 6]),
        ([4, 5, 6], [7, 8]),
        ([6, 7, 8], [9, 10]),
    ]
    assert contexts_and_targets(sliding_windows(tokens[:9], 0, 4, 3))[1:] == [([3, 4], [5, 6, 7]), ([5, 6, 7], [8, 9])]
