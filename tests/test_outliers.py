"""Outliers: which updates are marked, and what is left of those that are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.outliers import pass_over, watch_outliers

WINDOW, Z_SCORE = 8, 4.0


def expected_outliers(losses: np.ndarray, norms: np.ndarray) -> list[bool]:
    """The rule in NumPy and float64: above mean + z standard deviations of the last finite updates, or not finite."""
    seen: list[tuple[float, float]] = []
    marks = []
    for values in zip(losses, norms, strict=True):
        finite = bool(np.isfinite(values).all())
        last = np.array(seen[-WINDOW:], np.float64)
        far = len(seen) >= WINDOW and bool((np.array(values) > last.mean(0) + Z_SCORE * last.std(0)).any())
        marks.append(not finite or far)
        if finite:
            seen.append(values)
    return marks


@pytest.fixture(scope="module")
def series() -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradient norms of 60 updates: noise, spikes of either, a shift, NaN and infinity."""
    rng = np.random.default_rng(0)
    losses, norms = 3 + 0.1 * rng.normal(size=60), 1 + 0.05 * rng.normal(size=60)
    losses[3], losses[20], losses[44:] = 9, 5, losses[44:] + 4  # 3: before the window is full
    norms[30], norms[33], losses[36] = 4, np.inf, np.nan
    return losses.astype(np.float32), norms.astype(np.float32)


def run(series, skip: bool):
    """The marks, and the state and parameters after each update. The gradient's norm is that of the series."""
    optimizer = watch_outliers(optax.adamw(optax.constant_schedule(0.1)), WINDOW, Z_SCORE, skip)
    params = {"w": jnp.ones(4)}
    state = optimizer.init(params)
    marks, history = [], []

    @jax.jit
    def update(params, state, loss, norm):
        updates, state = optimizer.update({"w": jnp.zeros(4).at[0].set(norm)}, state, params, loss=loss)
        return optax.apply_updates(params, updates), state

    for loss, norm in zip(*series, strict=True):
        params, state = update(params, state, loss, norm)
        marks.append(bool(state.outlier))
        history.append(jax.device_get((params, state)))
    return marks, history


def test_outliers_are_those_of_the_rule(series):
    expected = expected_outliers(*series)
    assert [index for index, mark in enumerate(expected) if mark] == [20, 30, 33, 36, 44]
    assert run(series, skip=False)[0] == expected


def test_a_skipped_update_changes_nothing_but_the_counts(series):
    marks, history = run(series, skip=True)
    assert marks == expected_outliers(*series)
    for index, (params, state) in enumerate(history[1:], start=1):
        before_params, before = history[index - 1]
        equal = bool((params["w"] == before_params["w"]).all())
        assert equal == marks[index]
        assert np.isfinite(params["w"]).all()
        counts = [leaf for leaf in jax.tree.leaves(state.inner) if leaf.dtype == jnp.int32]
        assert counts == [index + 1, index + 1]  # of Adam and of the schedule
        if marks[index]:
            for leaf, old in zip(*map(jax.tree.leaves, (state.inner, before.inner)), strict=True):
                assert leaf.dtype == jnp.int32 or (leaf == old).all()


@pytest.mark.parametrize("watched", [True, False])
def test_passing_over_advances_the_counts_only(watched):
    optimizer = optax.adamw(optax.constant_schedule(0.1))
    if watched:
        optimizer = watch_outliers(optimizer, WINDOW, Z_SCORE, skip=False)
    state = optimizer.init({"w": jnp.ones(4)})
    after = pass_over(state)
    counts = [leaf for leaf in jax.tree.leaves(after.inner if watched else after) if leaf.dtype == jnp.int32]
    assert counts == [1, 1]
    if watched:
        assert int(after.seen) == 0
