"""Losses against NumPy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.models.losses import softmax_cross_entropy, tied_cross_entropy

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


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 7])
def test_the_chunked_tied_loss_and_its_gradients(chunks):
    rng = np.random.default_rng(1)
    x, table = rng.normal(size=(3, 7, 5)).astype(np.float32), rng.normal(size=(16, 5)).astype(np.float32)
    labels, weights = rng.integers(0, 11, (3, 7)), rng.uniform(0, 2, (3, 7)).astype(np.float32)
    logits = np.einsum("bld,vd->blv", x, table[:11]).astype(np.float64)
    likely = np.take_along_axis(probabilities(logits), labels[..., None], -1)[..., 0]
    by_logits = (probabilities(logits) - np.eye(11)[labels]) * weights[..., None]

    def loss(x, table):
        return tied_cross_entropy(x, table, labels, weights, 11, chunks)

    (total, right), backward = jax.vjp(loss, x, table)
    np.testing.assert_allclose(total, -(weights * np.log(likely)).sum(), rtol=1e-5)
    np.testing.assert_allclose(right, (weights * (logits.argmax(-1) == labels)).sum(), rtol=1e-6)
    by_x, by_table = backward((jnp.float32(3.0), jnp.float32(5.0)))
    np.testing.assert_allclose(by_x, 3 * by_logits @ table[:11], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_table[:11], 3 * np.einsum("blv,bld->vd", by_logits, x), rtol=1e-4, atol=1e-5)
    assert not by_table[11:].any()


def test_the_chunked_loss_never_makes_all_logits():
    shapes = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            shapes.extend(tuple(v.aval.shape) for v in equation.outvars)
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    look(inner)

    x, table, labels = jnp.zeros((2, 12, 4)), jnp.zeros((1000, 4)), jnp.zeros((2, 12), jnp.int32)
    step = jax.grad(lambda x, table: tied_cross_entropy(x, table, labels, jnp.ones((2, 12)), 1000, 4)[0], (0, 1))
    look(jax.make_jaxpr(step)(x, table).jaxpr)
    assert max(np.prod(shape) for shape in shapes if 1000 in shape) == 2 * 3 * 1000
