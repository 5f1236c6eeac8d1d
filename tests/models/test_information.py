"""Bounds of mutual information: against NumPy, and of Gaussians whose information is known."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.models.information import BOUNDS, donsker_varadhan, infonce, jensen_shannon, nwj

RNG = np.random.default_rng(0)


def softplus(x):
    return np.log1p(np.exp(x))


def test_bounds_are_their_formulas_over_the_rows_with_weight():
    scores = RNG.normal(size=(6, 6, 2))
    weights = np.array([1, 0, 1, 1, 1, 0], np.float32)
    real = scores[weights > 0][:, weights > 0]
    n = len(real)
    own, others = real[np.arange(n), np.arange(n)], real[~np.eye(n, dtype=bool)]
    expected = {
        "infonce": math.log(n) + (own - np.log(np.exp(real).sum(0))).mean(),
        "mine": own.mean() - np.log(np.exp(others).mean()),
        "nwj": own.mean() - np.exp(others - 1).mean(),
        "jsd": -softplus(-own).mean() - softplus(others).mean(),
    }
    for name, bound in BOUNDS.items():
        np.testing.assert_allclose(jax.jit(bound)(jnp.float32(scores), weights), expected[name], rtol=1e-4, atol=1e-5)


def test_of_the_best_critic_they_come_near_the_information_of_gaussians_from_below():
    rho, n = 0.8, 2000
    truth = -0.5 * math.log(1 - rho**2)  # 0.51 nats
    x = RNG.normal(size=n)
    y = rho * x + math.sqrt(1 - rho**2) * RNG.normal(size=n)
    # The logarithm of the densities' ratio.
    apart = (y[None, :] - rho * x[:, None]) ** 2 / (1 - rho**2)
    scores, weights = jnp.float32(truth - 0.5 * apart + 0.5 * y[None, :] ** 2), np.ones(n, np.float32)
    assert float(donsker_varadhan(scores, weights)) == pytest.approx(truth, abs=0.05)
    assert float(nwj(scores + 1.0, weights)) == pytest.approx(truth, abs=0.05)
    assert float(infonce(scores, weights)) == pytest.approx(truth, abs=0.05)


def test_scores_that_are_all_alike_tell_nothing():
    scores, weights = jnp.full((8, 8), 3.0), np.ones(8, np.float32)
    assert float(infonce(scores, weights)) == pytest.approx(0.0, abs=1e-6)
    assert float(donsker_varadhan(scores, weights)) == pytest.approx(0.0, abs=1e-6)
    assert float(nwj(jnp.ones((8, 8)), weights)) == pytest.approx(0.0, abs=1e-6)
    assert float(jensen_shannon(jnp.zeros((8, 8)), weights)) == pytest.approx(-2 * math.log(2), abs=1e-6)
