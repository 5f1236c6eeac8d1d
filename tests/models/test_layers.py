"""Layers against NumPy float64, and the statistics of dropout's hashed mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from sslx.models.layers import Dense, Norm, activation, dropout, dropout_mask
from sslx.train.sharding import unbox

X = np.random.default_rng(0).normal(2.0, 3.0, (3, 5, 16)).astype(np.float32)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms(kind, use_bias):
    rng = np.random.default_rng(1)
    params = {"scale": rng.normal(size=16).astype(np.float32)}
    if kind == "layernorm" and use_bias:
        params["bias"] = rng.normal(size=16).astype(np.float32)
    norm = Norm(kind, eps=1e-3, use_bias=use_bias)
    assert set(unbox(norm.init(jax.random.key(0), X)["params"])) == set(params)
    x = X.astype(np.float64)
    if kind == "layernorm":
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
    expected = expected * params["scale"] + params.get("bias", 0)
    np.testing.assert_allclose(norm.apply({"params": params}, X), expected, atol=1e-5)


def test_layernorm_keeps_its_precision_far_from_zero():
    x = X.astype(np.float64) * 0.01 + 300.0
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    found = Norm().apply({"params": {"scale": np.ones(16), "bias": np.zeros(16)}}, x.astype(np.float32))
    # float32 of 300 has steps of 3e-5, against a spread of 0.03.
    np.testing.assert_allclose(found, expected, atol=5e-3)


def exact_gelu(x):
    return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def test_gelu_is_exact_with_its_derivative():
    x = np.linspace(-8, 8, 2001, dtype=np.float32)
    wide = x.astype(np.float64)
    gelu = activation("gelu")
    np.testing.assert_allclose(gelu(x), exact_gelu(wide), atol=2e-6)
    derivative = scipy.stats.norm.cdf(wide) + wide * scipy.stats.norm.pdf(wide)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda v: gelu(v).sum()))(x), derivative, atol=2e-6)
    assert gelu(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu_tanh", lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("relu", lambda x: np.maximum(x, 0)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_activations(name, formula):
    x = np.linspace(-8, 8, 501, dtype=np.float32)
    np.testing.assert_allclose(activation(name)(x), formula(x.astype(np.float64)), atol=2e-6)


def test_dense_and_its_gradients():
    rng = np.random.default_rng(2)
    params = {"kernel": rng.normal(size=(16, 7)).astype(np.float32), "bias": rng.normal(size=7).astype(np.float32)}
    weight = rng.normal(size=(3, 5, 7)).astype(np.float32)
    dense = Dense(7, ("embed", "mlp"))
    loss = lambda params, x: jnp.sum(weight * dense.apply({"params": params}, x))  # noqa: E731
    np.testing.assert_allclose(
        dense.apply({"params": params}, X), np.float64(X) @ params["kernel"] + params["bias"], atol=1e-4
    )
    by_params, by_x = jax.grad(loss, argnums=(0, 1))(params, X)
    np.testing.assert_allclose(by_params["kernel"], np.einsum("bli,blo->io", np.float64(X), weight), atol=1e-4)
    np.testing.assert_allclose(by_params["bias"], weight.sum((0, 1)), atol=1e-4)
    np.testing.assert_allclose(by_x, np.float64(weight) @ params["kernel"].T, atol=1e-4)


SHAPE = (64, 40, 96)


@pytest.fixture(scope="module")
def masks():
    return {key: np.asarray(dropout_mask(jax.random.key(key), SHAPE, 0.1)) for key in (0, 1)}


def correlation(a, b):
    """In units of its standard deviation under independence."""
    return np.corrcoef(a.ravel(), b.ravel())[0, 1] * np.sqrt(a.size)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(rate):
    x = jnp.ones(SHAPE)
    y = np.asarray(dropout(x, rate, jax.random.key(3)))
    np.testing.assert_allclose(y[y > 0], 1 / (1 - rate), rtol=1e-6)
    kept = (y > 0).mean()
    assert abs(kept - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / x.size)
    gradient = np.asarray(jax.grad(lambda x: dropout(x, rate, jax.random.key(3)).sum())(x))
    np.testing.assert_array_equal(gradient, y)  # the backward pass draws the same mask


def test_dropout_is_even_over_every_axis(masks):
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        share = masks[0].mean(axis=others)
        deviation = np.sqrt(0.09 / (masks[0].size / SHAPE[axis]))
        assert np.abs(share - 0.9).max() < 5 * deviation
        assert 0.5 < share.std() / deviation < 1.6


def test_dropout_masks_are_independent(masks):
    mask = masks[0]
    assert abs(correlation(mask, masks[1])) < 5  # between keys
    for axis in range(3):
        for distance in (1, 2, 16):  # between neighbours
            a = np.moveaxis(mask, axis, 0)
            assert abs(correlation(a[distance:], a[:-distance])) < 5
    rows = mask.reshape(SHAPE[0], -1)
    pairs = np.corrcoef(rows)[np.triu_indices(SHAPE[0], 1)] * np.sqrt(rows.shape[1])
    assert np.abs(pairs).max() < 5.5
    assert 0.9 < pairs.std() < 1.1


@pytest.mark.parametrize("shape", [(1000,), (100, 100), (8, 4, 16, 16)])
def test_dropout_of_any_rank(shape):
    mask = np.asarray(dropout_mask(jax.random.key(0), shape, 0.5))
    assert mask.shape == shape
    assert abs(mask.mean() - 0.5) < 5 * 0.5 / np.sqrt(mask.size)


def test_dropout_masks_are_the_same_on_one_device_and_on_eight(masks):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec("a", None, "b"))
    found = jax.jit(lambda key: dropout_mask(key, SHAPE, 0.1), out_shardings=sharding)(jax.random.key(0))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_array_equal(found, masks[0])
