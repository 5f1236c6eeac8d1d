"""Assignments to prototypes: Sinkhorn as the published code has it, centring, entropies."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from sslx.models.assignment import centre_moved, centred, cross_entropy, entropy, sinkhorn


def sinkhorn_by_hand(scores, epsilon, iterations):
    """The published algorithm, in float64 and without logarithms."""
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= k
        q /= q.sum(axis=0, keepdims=True)
        q /= b
    return (q * b).T


def test_sinkhorn_is_the_published_one_and_leaves_out_rows_without_weight():
    scores = np.random.default_rng(0).uniform(-1, 1, (7, 5))
    weights = np.array([1, 1, 1, 0, 1, 1, 0], np.float32)
    shares = jax.jit(sinkhorn, static_argnums=(2, 3))(jnp.float32(scores), weights, 0.05, 3)
    expected = sinkhorn_by_hand(scores[weights > 0], 0.05, 3)
    np.testing.assert_allclose(np.asarray(shares)[weights > 0], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.sum(shares, axis=1), 1.0, rtol=1e-5)


def test_after_many_rounds_every_prototype_has_as_much():
    scores = np.random.default_rng(0).uniform(-1, 1, (8, 4))
    shares = jax.jit(sinkhorn, static_argnums=(2, 3))(jnp.float32(scores), np.ones(8, np.float32), 0.2, 200)
    np.testing.assert_allclose(np.sum(shares, axis=0), 2.0, rtol=1e-4)


def test_small_temperatures_do_not_overflow_and_nothing_is_learned_through_the_targets():
    scores = jnp.float32([[1.0, -1.0], [1.0, -0.9]])
    shares = sinkhorn(scores, np.ones(2, np.float32), 1e-3)
    np.testing.assert_allclose(shares[0], [1.0, 0.0], atol=1e-6)
    assert 0.7 < shares[1, 1] < 1.0  # though it fits the other, which the first row needs more
    assert not np.any(jax.grad(lambda s: sinkhorn(s, np.ones(2, np.float32), 0.05)[0, 0])(scores))
    assert not np.any(jax.grad(lambda s: centred(s, jnp.zeros(2), 0.05)[0, 0])(scores))


def test_a_centre_takes_away_what_all_rows_have():
    scores, centre = np.array([[5.0, 1.0], [4.0, 1.0]], np.float32), np.array([4.5, 1.0], np.float32)
    e = np.exp((scores - centre) / 0.5)
    np.testing.assert_allclose(centred(scores, centre, 0.5), e / e.sum(1, keepdims=True), rtol=1e-6)
    moved = centre_moved(jnp.float32(centre), jnp.float32([18.0, 4.0]), 4.0, 0.9)
    np.testing.assert_allclose(moved, 0.9 * centre + 0.1 * np.array([4.5, 1.0]), rtol=1e-6)


def test_entropies_are_in_nats():
    shares = jnp.float32([[0.25] * 4, [1.0, 0, 0, 0]])
    np.testing.assert_allclose(entropy(shares), [math.log(4), 0.0], atol=1e-6)
    logits = jnp.float32([[0.0] * 4, [9.0, 0, 0, 0]])
    expected = [math.log(4), math.log(math.exp(9) + 3) - 9]
    np.testing.assert_allclose(cross_entropy(shares, logits), expected, rtol=1e-4, atol=1e-6)
