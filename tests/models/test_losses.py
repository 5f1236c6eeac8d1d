"""Losses against NumPy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.models.losses import softmax_cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 5, (4, 6, 11)).astype(np.float32)
LABELS = RNG.integers(0, 11, (4, 6)).astype(np.int32)


def probabilities(logits):
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_and_its_gradient(smoothing):
    target = (1 - smoothing) * np.eye(11)[LABELS] + smoothing / 11
    expected = -(target * np.log(probabilities(LOGITS))).sum(-1)
    np.testing.assert_allclose(softmax_cross_entropy(LOGITS, LABELS, smoothing), expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda logits: softmax_cross_entropy(logits, LABELS, smoothing).sum())(LOGITS)
    np.testing.assert_allclose(gradient, probabilities(LOGITS) - target, atol=1e-6)


def test_cross_entropy_of_large_logits_is_finite():
    logits = np.array([[1e4, 0.0, -1e4], [-1e9, 0.0, -1e9]], np.float32)
    found = softmax_cross_entropy(logits, np.array([1, 1]))
    np.testing.assert_allclose(found, [1e4, 0.0])


def test_cross_entropy_of_bfloat16_is_float32():
    found = softmax_cross_entropy(jnp.asarray(LOGITS, jnp.bfloat16), LABELS)
    assert found.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(LOGITS, jnp.bfloat16), np.float32)
    expected = -np.log(np.take_along_axis(probabilities(rounded), LABELS[..., None], -1))[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
