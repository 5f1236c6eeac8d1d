"""Contrast between views: NT-Xent and queues against loops in NumPy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.models.contrast import check_queue, info_nce, nt_xent, with_queue


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nt_xent_by_hand(first, second, weights, temperature):
    """Row by row: of each view, the others of all rows with weight; the mean of a row's two cross-entropies."""
    views = [
        (row, side, x)
        for row in range(len(first))
        if weights[row]
        for side, x in enumerate((first, second))
        for x in [x[row]]
    ]
    losses = np.zeros(len(first))
    for row, side, x in views:
        others = [(r, math.exp(x @ y / temperature)) for r, s, y in views if (r, s) != (row, side)]
        right = next(e for r, e in others if r == row)
        losses[row] += 0.5 * math.log(sum(e for _, e in others) / right)
    return losses


def test_nt_xent_tells_a_view_from_all_others_of_rows_with_weight():
    first, second = unit(6, 8), unit(6, 8, seed=1)
    weights = np.array([1, 1, 0, 1, 1, 0], np.float32)
    losses, hits = jax.jit(nt_xent, static_argnums=3)(jnp.float32(first), jnp.float32(second), weights, 0.3)
    expected = nt_xent_by_hand(first, second, weights, 0.3)
    np.testing.assert_allclose(losses * weights, expected, rtol=1e-5, atol=1e-6)
    assert set(np.asarray(hits).tolist()) <= {0.0, 0.5, 1.0}
    same, right = jax.jit(nt_xent, static_argnums=3)(jnp.float32(first), jnp.float32(first), np.ones(6), 0.05)
    assert np.max(same) < 0.1
    assert np.min(right) == 1.0


def test_vectors_that_are_all_the_same_cost_ln_of_the_choices():
    x = jnp.float32(np.tile(unit(1, 8), (6, 1)))
    np.testing.assert_allclose(nt_xent(x, x, np.ones(6, np.float32), 0.1)[0], math.log(11), rtol=1e-5)


def test_negatives_of_a_queue_count_as_far_as_it_is_filled():
    first, second, queue = unit(3, 8), unit(3, 8, seed=1), unit(5, 8, seed=2)
    weights, filled = np.ones(3, np.float32), np.array([1, 1, 1, 0, 0], bool)
    given = map(jnp.float32, (first, second, queue))
    losses, _ = info_nce(*given, weights, 0.2, filled=filled)
    among = np.exp(first @ np.concatenate([second, queue[:3]]).T / 0.2)
    np.testing.assert_allclose(losses, np.log(among.sum(1) / np.diagonal(among)), rtol=1e-5)


def test_new_rows_stand_in_front_and_the_oldest_drop_out():
    state = {"queue": jnp.zeros((4, 1)), "filled": jnp.int32(0), "other": 1}
    for step, filled in enumerate((2, 4, 4)):
        state = with_queue(state, jnp.array([[10.0 * step + 1], [10.0 * step + 2]]))
        assert (int(state["filled"]), state["other"]) == (filled, 1)
    assert state["queue"][:, 0].tolist() == [21.0, 22.0, 11.0, 12.0]


def test_a_queue_that_is_no_whole_number_of_batches_is_refused():
    with pytest.raises(UserError, match=r"queue is 100, no multiple of config\.batch_size 64"):
        check_queue(100, 64)
    check_queue(128, 64)
    check_queue(0, 64)
