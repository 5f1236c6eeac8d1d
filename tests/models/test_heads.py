"""Projectors and prototypes against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.models.heads import Head, HeadConfig, Prototypes
from sslx.train.sharding import unbox

X = np.random.default_rng(0).normal(2.0, 3.0, (16, 6)).astype(np.float32)


def normal(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def test_a_head_is_dense_layers_normalised_by_the_batch():
    config = HeadConfig(layers=3, hidden=5, out=4, last_norm=True)
    head = Head(config)
    variables = unbox(jax.jit(lambda: head.init(jax.random.key(0), X, deterministic=True))())
    params = jax.tree.map(np.asarray, variables["params"])
    # Normalised layers have no bias of their own; the last norm has no scale.
    assert {name: set(layer) for name, layer in params.items()} == {
        "layer_0": {"kernel"},
        "layer_0_norm": {"scale", "bias"},
        "layer_1": {"kernel"},
        "layer_1_norm": {"scale", "bias"},
        "layer_2": {"kernel"},
    }
    apply = jax.jit(lambda v: head.apply(v, X, deterministic=False, mutable=["batch_stats"]))
    found, moved = apply(variables)
    x = np.float64(X)
    for layer in range(2):
        x = np.maximum(normal(x @ params[f"layer_{layer}"]["kernel"]), 0)
    last = x @ params["layer_2"]["kernel"]
    np.testing.assert_allclose(found, normal(last), atol=2e-4)
    np.testing.assert_allclose(moved["batch_stats"]["layer_2_norm"]["mean"], 0.1 * last.mean(0), atol=1e-4)
    assert config.flops(6) == 2 * (6 * 5 + 5 * 5 + 5 * 4)
    assert config.batch_norm


def test_layers_that_nothing_normalises_have_a_bias_and_no_layers_change_nothing():
    head = Head(HeadConfig(layers=2, hidden=5, out=4, norm=False, activation="gelu"))
    params = jax.eval_shape(lambda: head.init(jax.random.key(0), X, deterministic=True))["params"]
    assert {name: set(layer) for name, layer in params.items()} == {
        "layer_0": {"kernel", "bias"},
        "layer_1": {"kernel", "bias"},
    }
    nothing = HeadConfig(layers=0)
    assert (nothing.width(6), nothing.flops(6), nothing.batch_norm) == (6, 0.0, False)
    np.testing.assert_array_equal(Head(nothing).apply({}, X, deterministic=True), X)
    assert not HeadConfig(layers=1).batch_norm
    with pytest.raises(UserError, match="a head's layers are -1"):
        HeadConfig(layers=-1)
    with pytest.raises(UserError, match="'rel'; did you mean 'relu'"):
        HeadConfig(activation="rel")


def test_prototypes_give_cosines_and_stay_while_they_are_frozen():
    module = Prototypes(3)
    variables = unbox(module.init(jax.random.key(0), X))
    kernel = np.float64(variables["params"]["kernel"])
    expected = (X / np.linalg.norm(X, axis=1, keepdims=True)) @ (kernel / np.linalg.norm(kernel, axis=0))
    np.testing.assert_allclose(module.apply(variables, X), expected, atol=1e-5)

    def gradient(frozen):
        return jax.grad(lambda v: module.apply(v, X, jnp.bool_(frozen))[0, 0])(variables)["params"]["kernel"]

    assert not np.any(gradient(True))
    assert np.any(gradient(False))
