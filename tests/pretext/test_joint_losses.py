"""Loss functions of joint embedding against NumPy, in float64 and from their papers' formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sslx.pretext.barlow_twins import barlow_loss
from sslx.pretext.byol import byol_loss
from sslx.pretext.dino import dino_loss
from sslx.pretext.joint import directions, spread
from sslx.pretext.simsiam import simsiam_loss
from sslx.pretext.vicreg import regularisers

RNG = np.random.default_rng(0)
A, B, C, D = RNG.normal(1.0, 2.0, (4, 8, 5))
WEIGHTS = np.array([1, 1, 1, 0, 1, 1, 1, 0], np.float32)  # two rows only fill up the batch
REAL = WEIGHTS > 0


def f32(*arrays):
    return [jnp.float32(array) for array in arrays]


def cos(x, y):
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def test_byol_sums_its_two_directions_and_simsiam_takes_their_mean():
    expected = (2 - 2 * cos(A, D)) + (2 - 2 * cos(B, C))  # first view's prediction with the second's target
    np.testing.assert_allclose(byol_loss(f32(A, B), f32(C, D)), expected, rtol=1e-5)
    np.testing.assert_allclose(simsiam_loss(f32(A, B), f32(C, D)), -(cos(A, D) + cos(B, C)) / 2, rtol=1e-5)
    np.testing.assert_allclose(byol_loss(f32(A, A), f32(A, A)), 0.0, atol=1e-6)
    np.testing.assert_allclose(simsiam_loss(f32(A, A), f32(A, A)), -1.0, rtol=1e-6)


def test_barlow_twins_compares_correlations_over_the_rows_with_weight():
    a, b = ((x[REAL] - x[REAL].mean(0)) / np.sqrt(x[REAL].var(0) + 1e-5) for x in (A, B))
    c = a.T @ b / REAL.sum()
    expected = ((1 - np.diag(c)) ** 2).sum() + 0.0051 * (c[~np.eye(5, dtype=bool)] ** 2).sum()
    loss, agreement = jax.jit(barlow_loss, static_argnums=3)(*f32(A, B), WEIGHTS, 0.0051)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(agreement, np.diag(c).mean(), rtol=1e-4)


def test_vicreg_regularises_each_view_over_the_rows_with_weight():
    x = 0.2 * A + 0.05 * A[:, :1]  # deviations on both sides of 1 and features that share something
    covariance = np.cov(x[REAL].T)  # over one row less than there are
    hinge = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
    off = (covariance[~np.eye(5, dtype=bool)] ** 2).sum() / 5
    found = jax.jit(regularisers)(jnp.float32(x), WEIGHTS)
    np.testing.assert_allclose(found, (hinge, off, x[REAL].std(0, ddof=1).mean()), rtol=1e-4)
    same = jax.jit(regularisers)(jnp.ones((8, 5)), WEIGHTS)
    np.testing.assert_allclose(same, (0.99, 0.0, 0.0), atol=1e-6)


def test_dino_pairs_every_target_with_every_other_view():
    scores = RNG.uniform(-1, 1, (4, 3, 6))
    targets = RNG.dirichlet(np.ones(6), (2, 3))
    expected, pairs = 0.0, 0
    for number in range(2):
        for other in range(4):
            if other == number:
                continue
            e = np.exp(scores[other] / 0.1)
            expected = expected - (targets[number] * np.log(e / e.sum(1, keepdims=True))).sum(1)
            pairs += 1
    assert pairs == 6
    np.testing.assert_allclose(dino_loss(f32(*scores), f32(*targets), 0.1), expected / pairs, rtol=1e-4)


def test_spread_is_1_all_over_the_sphere_and_0_in_one_place():
    everywhere = RNG.normal(size=(4096, 8))
    ones = np.ones(4096, np.float32)
    np.testing.assert_allclose(spread(jnp.float32(everywhere), ones), 1.0, atol=0.02)
    np.testing.assert_allclose(spread(jnp.ones((4, 8)), np.ones(4, np.float32)), 0.0, atol=1e-6)
    unit = A[REAL] / np.linalg.norm(A[REAL], axis=1, keepdims=True)
    np.testing.assert_allclose(spread(jnp.float32(A), WEIGHTS), unit.std(0).mean() * 5**0.5, rtol=1e-4)


def test_directions_are_the_participation_ratio_of_the_covariance_whatever_its_scale():
    x = A * np.array([3.0, 1.0, 1.0, 0.3, 0.1])
    values = np.linalg.eigvalsh(np.cov(x[REAL].T))
    for scale in (1.0, 1e-9):
        found = jax.jit(directions)(jnp.float32(scale * x), WEIGHTS)
        np.testing.assert_allclose(found, values.sum() ** 2 / (values**2).sum(), rtol=1e-4)
    of_one_vector, of_one_place = np.outer(A[:, 0], A[0]), np.ones((8, 5))
    for alike in (of_one_vector, of_one_place, np.zeros((8, 5))):
        np.testing.assert_allclose(jax.jit(directions)(jnp.float32(alike), WEIGHTS), 1.0, rtol=1e-4)
