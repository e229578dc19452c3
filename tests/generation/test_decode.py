"""Generation against `transformers`' `generate`, against the full forward pass, and against distributions by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_gpt2 import as_params, torch_gpt2
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt2_jax.config import GPT2Config, MeshConfig
from gpt2_jax.errors import UserError
from gpt2_jax.generation import generate
from gpt2_jax.generation.decode import bucket, cache_slots, left_padded, stream
from gpt2_jax.generation.sampling import Sampling, mask_top_k_top_p, sample_categorical
from gpt2_jax.layers import stack_layers
from gpt2_jax.model import GPT2, init_cache, init_params
from gpt2_jax.sharding import make_mesh, state_sharding

CONFIG = GPT2Config(vocab_size=300, block_size=256, n_layer=2, n_head=4, n_embd=64, attention="xla")


@pytest.fixture(scope="module")
def pair():
    """A model of transformers with random weights, and ours with the same.

    The blocks' are larger than initial ones, or the tied head would repeat each token for ever.
    """
    theirs = torch_gpt2(CONFIG)
    with torch.no_grad():
        for parameter in theirs.transformer.h.parameters():
            parameter *= 4
    return theirs, GPT2(CONFIG), jax.tree.map(jnp.asarray, as_params(theirs.state_dict(), CONFIG))


def prompt(length, seed=0, vocab_size=300):
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


@pytest.mark.parametrize("length", [17, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 7, 16, 56))])
def test_greedy_equals_transformers_over_200_tokens(pair, length):
    theirs, model, params = pair
    ids = torch.tensor([prompt(length)])
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        min_new_tokens=200,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    (tokens,) = generate(model, params, [prompt(length)], 200, Sampling(0))
    assert tokens.tolist() == expected[0, length:].tolist()
    assert len(set(tokens.tolist())) > 20  # not one token for ever


def test_a_model_for_splash_attention_writes_the_same(pair):
    model = GPT2(dataclasses.replace(CONFIG, attention="splash"))  # its queries come scaled, to the cache as well
    ours, theirs = (generate(one, pair[2], [prompt(17)], 50, Sampling(0))[0] for one in (model, pair[1]))
    assert ours.tolist() == theirs.tolist()


def test_cached_logits_equal_those_of_the_full_forward_at_every_position(pair):
    model, params = pair[1], jax.tree.map(jnp.asarray, as_params(torch_gpt2(CONFIG).state_dict(), CONFIG))
    tokens = np.array([prompt(256), prompt(256, seed=1)], np.int32)
    expected = jax.jit(model.apply)({"params": params}, tokens)
    decode = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache, method="decode"))
    cache = init_cache(model, jnp.zeros(2, jnp.int32), 256)
    for position in range(256):
        logits, cache = decode(tokens[:, position : position + 1], cache)
        # float32 with a logit spread of 0.6: sums of up to 256 products in another order
        np.testing.assert_allclose(logits, expected[:, position], atol=1e-5)


@pytest.mark.slow  # the batches of prompts below are padded too
def test_several_tokens_at_a_time_and_padding_change_nothing(pair):
    _, model, params = pair
    sequences = [np.array(prompt(length, seed=length), np.int32) for length in (9, 30, 1)]
    tokens, pad = left_padded(sequences, 32)
    cache = init_cache(model, jnp.asarray(pad), 40)
    _, cache = model.apply({"params": params}, tokens[:, :20], cache, method="decode")
    logits, cache = model.apply({"params": params}, tokens[:, 20:], cache, method="decode")
    assert int(cache.slot) == 32
    for row, sequence in zip(logits, sequences, strict=True):
        np.testing.assert_allclose(row, model.apply({"params": params}, sequence[None])[0, -1], atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8, top_k=20, top_p=0.9),
        *(pytest.param(sampling, marks=pytest.mark.slow) for sampling in (Sampling(0), Sampling())),
    ],
)
def test_a_batch_gives_the_tokens_of_each_prompt_alone(pair, sampling):
    _, model, params = pair
    prompts = [prompt(length, seed=length) for length in (3, 60, 16)]
    together = generate(model, params, prompts, 40, dataclasses.replace(sampling, samples=2, seed=5))
    assert len(together) == 6
    for index, one in enumerate(prompts):
        alone = generate(model, params, [one], 40, dataclasses.replace(sampling, samples=2, seed=5))
        for ours, theirs in zip(together[2 * index : 2 * index + 2], alone, strict=True):
            assert ours.tolist() == theirs.tolist()
            assert ours.dtype == np.int32
    same = together[0].tolist() == together[1].tolist()
    assert same == (sampling == Sampling(0))  # samples of one prompt differ


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_draw_from_their_own_logits(pair, dtype):
    _, model, params = pair
    rounded = model.clone(dtype=dtype)
    tokens = generate(rounded, params, [prompt(40)], 60, Sampling(0))[0].tolist()
    sequence = np.array([prompt(40) + tokens], np.int32)
    logits = np.asarray(rounded.apply({"params": params}, sequence))[0, 39:-1]
    exact = np.asarray(model.apply({"params": params}, sequence))[0, 39:-1]
    # With the cache logits are as far from the exact ones as without, so what was drawn, and what is the maximum here,
    # differ by at most twice that on both sides. (In bfloat16 that is much; most tokens are the maximum.)
    behind = logits.max(axis=-1) - logits[np.arange(60), tokens]
    assert behind.max() <= 4 * np.abs(logits - exact).max()
    assert np.count_nonzero(behind) < 20


def test_the_seed_decides(pair):
    _, model, params = pair
    first, again, other = (
        generate(model, params, [prompt(5)], 30, Sampling(seed=seed))[0].tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_stacked_and_sharded_parameters_give_the_same(pair):
    _, model, params = pair
    expected = generate(model, params, [prompt(5)], 20, Sampling(0))[0].tolist()
    scanned = GPT2(dataclasses.replace(CONFIG, scan_layers=True, remat="full"))
    assert generate(scanned, stack_layers(params), [prompt(5)], 20, Sampling(0))[0].tolist() == expected
    mesh = make_mesh(MeshConfig(2, 2), jax.devices()[:4])
    sharded = jax.device_put(params, state_sharding(mesh, params))
    assert generate(model, sharded, [prompt(5)], 20, Sampling(0))[0].tolist() == expected


@pytest.mark.parametrize(  # a length that is not a bucket of the cache, and one that is
    "block_size", [36, pytest.param(32, marks=pytest.mark.slow)]
)
def test_sliding_equals_a_plain_loop_over_the_last_tokens(tiny_config, block_size):
    model = GPT2(dataclasses.replace(tiny_config, block_size=block_size))
    # Larger than initial ones, or the tied head would repeat each token for ever.
    params = jax.tree.map(lambda leaf: 5 * leaf, init_params(model, jax.random.key(0)))
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    for length in (1, block_size, 40):
        sequence = prompt(length, vocab_size=65)
        for _ in range(50):
            window = sequence[-block_size:]
            padded = np.array([window + [0] * (block_size - len(window))], np.int32)
            sequence.append(int(np.argmax(apply(padded)[0, len(window) - 1])))
        prompts = [prompt(length, vocab_size=65), prompt(3, vocab_size=65)]
        tokens, other = generate(model, params, prompts, 50, Sampling(0, slide=True))
        assert tokens.tolist() == sequence[length:]
        assert other.tolist() == generate(model, params, prompts[1:], 50, Sampling(0, slide=True))[0].tolist()


def test_a_sequence_ends_before_its_stop_token(pair):
    _, model, params = pair
    prompts = [prompt(4, seed=seed) for seed in range(3)]
    free = generate(model, params, prompts, 60, Sampling(seed=3))
    stop = int(free[0][25])
    stopped = generate(model, params, prompts, 60, Sampling(seed=3, stop=stop))
    for row, whole in zip(stopped, free, strict=True):
        whole = whole.tolist()
        assert row.tolist() == whole[: whole.index(stop) if stop in whole else None]
    assert len(stopped[0]) <= 25
    chunks = list(stream(model, params, prompts[:1], 60, Sampling(seed=3, stop=stop)))
    assert sum(chunk.shape[1] for chunk in chunks) < 60  # and the work ends with the last sequence


def test_only_tokens_below_vocab_size_are_drawn(pair):
    _, model, params = pair
    (tokens,) = generate(model, params, [prompt(4)], 100, Sampling(5.0, vocab_size=10))
    assert max(tokens) < 10


# --- distributions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 5, 1.0), (1.0, 0, 0.7), (0.7, 30, 0.9), (1.3, 1, 1.0), (1.0, 0, 1e-6), (1.0, 400, 0.999), (2.0, 300, 1.0)],
)
def test_what_is_left_after_top_k_and_top_p_is_what_transformers_leaves(temperature, top_k, top_p):
    logits = 3 * np.random.default_rng(0).standard_normal((8, 300)).astype(np.float32)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = LogitsProcessorList(warpers)(None, torch.from_numpy(logits)).numpy()
    kept = jnp.int32(top_k) if top_k else None
    left = mask_top_k_top_p(jnp.asarray(logits) / temperature, kept, jnp.float32(top_p) if top_p < 1 else None)
    np.testing.assert_array_equal(np.isfinite(left), np.isfinite(expected))
    np.testing.assert_allclose(left, expected, rtol=1e-6)  # a division more or less


def test_top_k_and_top_p_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]))

    def left(top_k, top_p):
        return np.isfinite(mask_top_k_top_p(logits, top_k, top_p)).tolist()

    tied = [True] * 4  # equally probable tokens stay together
    assert left(2, None) == [[False, True, True, False], tied]
    assert left(None, jnp.float32(0.39)) == [[False, True, False, False], tied]
    assert left(None, jnp.float32(0.5)) == [[False, True, True, False], tied]
    assert left(None, jnp.float32(0.85)) == [[False, True, True, True], tied]
    # Top-p after top-k: of 0.4 and 0.3 the first alone has 0.57.
    assert left(2, jnp.float32(0.5)) == [[False, True, False, False], tied]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.5, top_k=7, top_p=0.9),
        *(
            pytest.param(sampling, marks=pytest.mark.slow)
            for sampling in (Sampling(1.5, top_k=7), Sampling(1.0, top_p=0.6), Sampling(), Sampling(0.5))
        ),
    ],
)
def test_samples_follow_the_distribution(sampling):
    """Chi-square of 4,000 first tokens against probabilities by hand, in NumPy and float64."""
    config = GPT2Config(vocab_size=20, block_size=16, n_layer=1, n_head=1, n_embd=16, attention="xla")
    model = GPT2(config)
    params = jax.tree.map(lambda leaf: 4 * leaf, init_params(model, jax.random.key(1)))
    logits = np.asarray(model.apply({"params": params}, jnp.array([[3]])))[0, 0].astype(np.float64)
    probs = np.exp(logits / sampling.temperature)
    if sampling.top_k:
        probs[np.argsort(probs)[: -sampling.top_k]] = 0
    probs /= probs.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probs)
        n_kept = int(np.searchsorted(np.cumsum(probs[order]), sampling.top_p)) + 1
        probs[order[n_kept:]] = 0
        probs /= probs.sum()
    n = 4000
    drawn = np.concatenate(generate(model, params, [[3]], 1, dataclasses.replace(sampling, samples=n, seed=11)))
    counts = np.bincount(drawn, minlength=20)
    assert counts[probs == 0].sum() == 0
    often = n * probs >= 5  # where the chi-square approximation holds; the rest is one class
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(n * probs[often], n * probs[~often].sum())
    kept = expected > 0
    assert kept.sum() > 2
    chi_square = float(np.sum((observed[kept] - expected[kept]) ** 2 / expected[kept]))
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # its mean and 4 of its standard deviations


# --- compilations and mistakes -------------------------------------------------------------------------


def test_prompts_of_a_bucket_share_the_compiled_programs(pair):
    _, model, params = pair
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    try:
        generate(model, params, [prompt(33)], 30, Sampling(0.9, top_p=0.8))
        assert compiled  # the listener hears them
        compiled.clear()
        for length in (34, 48):
            for temperature in (0.5, 1.0):
                sampling = Sampling(temperature, top_p=0.7)
                generate(model, params, [prompt(length)], 30, dataclasses.replace(sampling, seed=length))
            for top_k in (3, 9):
                generate(model, params, [prompt(length)], 30, Sampling(0.8, top_k, 0.7))
        n_settings = len(compiled)  # the two programs with top-k beside top-p, at the first length
        assert n_settings == 2
        compiled.clear()
        generate(model, params, [prompt(49)], 30, Sampling(0.9, top_p=0.8))
        assert len(compiled) == 1  # a prefill of 64; with 29 more both 48 and 64 have room in a cache of 96
    finally:
        jax.monitoring.clear_event_listeners()


def test_buckets():
    assert [bucket(length) for length in (1, 16, 17, 24, 25, 33, 48, 49, 65, 1000, 1025)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 96, 1024, 1536,
    ]  # fmt: skip
    assert all(length <= bucket(length) <= max(16, 1.5 * length) for length in range(1, 3000))


def test_the_cache_has_room_for_every_prompt_of_a_bucket():
    for block_size in (1, 5, 16, 33, 36, 64, 100, 128):
        for longest in range(1, block_size + 1):
            for new in (1, 2, 10, 50, 500):
                length = min(bucket(longest), block_size)
                drawn = min(new, block_size - longest + 1)  # the first from the prompt, and the last is not read
                assert cache_slots(length, new, block_size) >= length + drawn - 1


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1], []], 5, "a prompt has no tokens"),
        ([[1, 300]], 5, "the token 300; the model's vocabulary is 0 to 299"),
        ([[-1]], 5, "the token -1"),
        (
            [[1] * 200],
            57,
            "200 tokens of prompt and 57 new ones .* 256; take max_new_tokens = 56, or --slide",
        ),
        ([[1] * 300], 1, "shorten the prompt"),
        ([[1.5]], 5, "tokens of float64; expected integers"),
        ([[1]], 0, "max_new_tokens = 0; expected at least 1"),
    ],
)
def test_mistakes_have_their_message(pair, prompts, new, message):
    _, model, params = pair
    with pytest.raises(UserError, match=message):
        generate(model, params, prompts, new)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"samples": 0},
        {"seed": -1},
        {"vocab_size": 0},
    ],
)
def test_impossible_sampling_is_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)


def test_no_prompts_give_nothing(pair):
    _, model, params = pair
    assert generate(model, params, [], 5) == []


@pytest.mark.slow
def test_sliding_compiles_by_buckets_too(tiny):
    model, params = tiny
    generate(model, params, [prompt(3, vocab_size=65)], 2, Sampling(0.5, slide=True))  # JAX's programs around ours
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    try:
        for length in (17, 20, 24):
            generate(model, params, [prompt(length, vocab_size=65)], 37, Sampling(0.5, slide=True))
            assert len(compiled) <= 3  # a prefill, a loop, and a prefill of the whole window, at the first length
    finally:
        jax.monitoring.clear_event_listeners()


def test_a_rounding_does_not_change_what_is_drawn():
    """At GPT-2's vocabulary, where sums over all tokens have the most roundings."""
    rng = np.random.default_rng(0)
    logits = -1.5 * np.log(np.arange(1, 50258)) + rng.standard_normal((200, 50257))
    logits = rng.permuted(logits, axis=1).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    tokens = sample_categorical(keys, jnp.asarray(logits))
    assert len(np.unique(tokens)) > 120
    rounded = logits + 1e-5 * rng.standard_normal(logits.shape).astype(np.float32)
    # Two Gumbel maxima lie closer than 1e-5 in about one of 1e5 draws.
    np.testing.assert_array_equal(sample_categorical(keys, jnp.asarray(rounded)), tokens)


def test_the_coldest_temperatures_are_greedy(pair):
    _, model, params = pair
    tokens = [generate(model, params, [prompt(5)], 20, Sampling(heat))[0].tolist() for heat in (0, 1e-40, 1e-5)]
    assert tokens[0] == tokens[1] == tokens[2]
