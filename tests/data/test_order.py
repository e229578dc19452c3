"""Permutations, batch schedules and mixtures, compared with their definitions, a simulation and pinned values."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data.order import PERIOD, BatchSchedule, Mixture, permute


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


def test_permute_is_pinned():
    """These values never change: another data order would make it impossible to resume runs."""
    assert permute(np.arange(10), 10, seed=1337, epoch=0).tolist() == PINNED[0]
    assert permute(np.arange(10), 10, seed=1337, epoch=1).tolist() == PINNED[1]
    assert permute(np.array([0, 1, 10**9]), 10**10, seed=0, epoch=3).tolist() == PINNED[2]


PINNED = [
    [9, 8, 2, 7, 0, 5, 6, 3, 4, 1],
    [6, 9, 1, 2, 4, 0, 3, 7, 8, 5],
    [8248707602, 2631908652, 4193408967],
]


def test_permute_looks_random():
    size = 4096
    orders = [permute(np.arange(size), size, seed, epoch) for seed in range(4) for epoch in range(4)]
    for index, order in enumerate(orders):
        # The rank correlation of random permutations has standard deviation 1 / sqrt(n); five of them are allowed.
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
        for other in orders[:index]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(size)
            assert np.sum(order == other) < 12  # the number of equal places is Poisson(1): 12 has probability 1e-9
        # The distance of neighbours has mean n / 3, and the mean of n has standard deviation 0.24 n / sqrt(n).
        assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 5 * 0.24 / np.sqrt(size)


@given(ramp_tokens=st.lists(st.integers(1, 400), max_size=3), steps=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_the_batch_schedule_equals_a_simulation(ramp_tokens, steps):
    block_size, sizes = 4, [2, 4, 8, 16]
    limits = np.cumsum(ramp_tokens).tolist()
    ramp = tuple(zip(limits, sizes, strict=False))
    schedule = BatchSchedule(16, ramp, block_size)
    consumed = 0
    for update in range(steps):
        size = next((size for tokens, size in ramp if consumed * block_size < tokens), 16)
        assert schedule.at(update) == (consumed, size)
        consumed += size


# Ordinary weights, and ones that are hard to round: none, many or all of them are below 1 / PERIOD.
WEIGHTS = st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=6)


@given(weights=WEIGHTS)
@settings(max_examples=30, deadline=None)
def test_a_mixture_assigns_every_sequence_once_in_proportion_to_the_weights(weights):
    source, own_index = Mixture(weights).assign(np.arange(2 * PERIOD))
    for index, weight in enumerate(weights):
        own = own_index[source == index]
        np.testing.assert_array_equal(own, np.arange(len(own)))  # none is lost or repeated, and they are in order
        share = len(own) / len(source)
        # Off by one turn for rounding, and by one for each source that is rounded up to a turn.
        assert abs(share - weight / sum(weights)) <= (1 + len(weights)) / PERIOD
        assert len(own) >= 2
    for start in (0, 1000, PERIOD - 500):  # any part has these shares too, up to one turn per source
        part = source[start : start + 1000]
        for index, weight in enumerate(weights):
            expected = 1000 * weight / sum(weights)
            assert abs(np.sum(part == index) - expected) <= len(weights) + 1


def test_a_mixture_is_a_function_of_the_index_alone():
    mixture = Mixture([0.7, 0.2, 0.1])
    whole = mixture.assign(np.arange(10 * PERIOD, 10 * PERIOD + 64))
    for index in range(64):
        source, own_index = mixture.assign(np.array([10 * PERIOD + index]))
        assert (source[0], own_index[0]) == (whole[0][index], whole[1][index])
    far = np.array([2**40, 2**40 + 1])
    assert Mixture([1, 1]).assign(far)[1].tolist() == [2**39, 2**39]


def test_mixtures_are_pinned():
    source, own_index = Mixture([0.7, 0.2, 0.1]).assign(np.arange(20))
    assert source.tolist() == PINNED_SOURCES
    assert own_index[-3:].tolist() == PINNED_INDICES
    assert Mixture([5]).assign(np.array([0, 7, 10**12]))[1].tolist() == [0, 7, 10**12]


PINNED_SOURCES = [0, 0, 1, 0, 2, 0, 0, 1, 0, 0, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0]
PINNED_INDICES = [3, 12, 13]
