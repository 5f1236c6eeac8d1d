"""The linear probe against scikit-learn's optimum of the same loss, and its choice on validation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from sslx.errors import UserError
from sslx.probing.linear import LinearProbeConfig, linear_probe


def drawn(rows, seed, spread):
    """Features around one centre a class, far from the origin and of unequal scales."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % 3
    centres = np.random.default_rng(9).normal(size=(3, 8))
    x = centres[labels] + spread * rng.normal(size=(rows, 8))
    return (x * np.logspace(-2, 2, 8) + 5).astype(np.float32), labels.astype(np.int32)


def test_each_weight_decay_reaches_the_optimum_of_scikit_learn():
    (x, y), (held, held_y) = drawn(90, 0, 1.5), drawn(60, 1, 1.5)
    standard = (x - x.mean(0)) / x.std(0)
    for decay in (1e-2, 1e-1):
        config = LinearProbeConfig(learning_rates=(0.05,), weight_decays=(decay,), steps=600)
        found = linear_probe(x, y, held, held_y, classes=3, config=config)
        peer = LogisticRegression(C=1 / (decay * len(x)), tol=1e-8, max_iter=5000).fit(standard, y)
        np.testing.assert_allclose(found.kernel, peer.coef_.T, atol=2e-3)
        # scikit-learn's bias is free up to a constant.
        np.testing.assert_allclose(found.bias - found.bias.mean(), peer.intercept_ - peer.intercept_.mean(), atol=2e-3)
        guesses = found.logits(held).argmax(-1)
        np.testing.assert_array_equal(guesses, peer.predict((held - x.mean(0)) / x.std(0)))
        assert found.validation_accuracy == pytest.approx((guesses == held_y).mean())


def test_separable_features_are_told_apart_without_an_error():
    (x, y), (held, held_y), (test, test_y) = (drawn(60, seed, 0.05) for seed in range(3))
    for batch_size in (4096, 16):
        config = LinearProbeConfig(steps=100, batch_size=batch_size)
        found = linear_probe(x, y, held, held_y, classes=3, config=config)
        assert found.validation_accuracy == 1
        assert (found.logits(test).argmax(-1) == test_y).all()


def test_the_grid_is_chosen_on_validation():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 30)).astype(np.float32), np.arange(40, dtype=np.int32) % 2
    held, held_y = drawn_with_one_direction(200)
    x[:, 0] = 2 * y - 1 + 0.8 * rng.normal(size=40)
    decays, alone = (0.0, 0.3), {}
    for decay in decays:
        config = LinearProbeConfig((0.05,), (decay,), 200)
        alone[decay] = linear_probe(x, y, held, held_y, classes=2, config=config).validation_accuracy
    together = linear_probe(x, y, held, held_y, classes=2, config=LinearProbeConfig((0.05,), decays, 200))
    assert len(set(alone.values())) > 1  # or nothing would be chosen
    assert together.validation_accuracy == max(alone.values())
    assert together.weight_decay == max(alone, key=alone.get)


def drawn_with_one_direction(rows):
    rng = np.random.default_rng(1)
    y = np.arange(rows, dtype=np.int32) % 2
    x = rng.normal(size=(rows, 30)).astype(np.float32)
    x[:, 0] = 2 * y - 1 + 0.8 * rng.normal(size=rows)
    return x, y


def test_a_feature_that_never_changes_does_no_harm():
    (x, y), (held, held_y) = drawn(60, 0, 0.05), drawn(60, 1, 0.05)
    x[:, 3] = held[:, 3] = 7.0
    found = linear_probe(x, y, held, held_y, classes=3, config=LinearProbeConfig(steps=50))
    assert found.validation_accuracy == 1
    assert np.isfinite(found.kernel).all()


def test_grids_that_cannot_be():
    for options in ({"learning_rates": ()}, {"learning_rates": (0.0,)}, {"weight_decays": (-1.0,)}, {"steps": 0}):
        with pytest.raises(UserError, match=f"config.linear.{next(iter(options))}"):
            LinearProbeConfig(**options)
