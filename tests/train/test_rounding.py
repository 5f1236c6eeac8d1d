"""Rounding at random: between the two neighbours, right on average, on any mesh; moments that are kept so."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sslx.errors import UserError
from sslx.settings import OptimizerConfig
from sslx.train.optimizer import check_optimizer, make_optimizer
from sslx.train.rounding import rounded_at_random

CONFIG = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, clip_norm=None, moments="bfloat16")


def test_a_number_becomes_one_of_its_neighbours_and_is_right_on_average():
    draw = np.random.default_rng(0)
    x = (draw.normal(size=8) * 10.0 ** draw.integers(-20, 20, 8)).astype(np.float32)
    many = np.repeat(x[:, None], 40_000, axis=1)
    found = np.asarray(jax.jit(rounded_at_random)(many, jax.random.key(0)).astype(jnp.float32))
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # nearer to 0
    above = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    assert ((found == below[:, None]) | (found == above[:, None])).all()
    share = (x.astype(np.float64) - below) / (above.astype(np.float64) - below)
    np.testing.assert_allclose((found == above[:, None]).mean(axis=1), share, atol=4 * 0.5 / 40_000**0.5)


def test_what_bfloat16_holds_stays_and_keys_differ():
    x = np.random.default_rng(1).normal(size=(64, 64)).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(rounded_at_random(x, jax.random.key(0)), x)
    np.testing.assert_array_equal(rounded_at_random(jnp.float32(0.5), jax.random.key(0)), 0.5)
    one, other = (rounded_at_random(x + 1e-3, jax.random.key(seed)) for seed in (0, 1))
    assert 0.1 < np.mean(np.asarray(one) != np.asarray(other)) < 0.9


def test_eight_devices_round_as_one():
    x = np.random.default_rng(2).normal(size=(64, 24)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    rounded = jax.jit(rounded_at_random)
    np.testing.assert_array_equal(rounded(split, jax.random.key(3)), rounded(x, jax.random.key(3)))


def test_moments_in_bfloat16_follow_those_in_float32_where_rounding_to_the_nearest_would_stop():
    gradients = np.random.default_rng(3).normal(1.0, 0.02, (1500, 512)).astype(np.float32)
    states = {}
    for kept in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(CONFIG, moments=kept), optax.constant_schedule(1e-3), BOXED)
        params = {"head": {"kernel": jnp.zeros(512)}}
        train = jax.jit(
            lambda state, optimizer=optimizer, params=params: jax.lax.scan(step(optimizer), state, gradients)
        )
        (params, state), _ = train((params, optimizer.init(params)))
        adam = next(part for part in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(part))
        assert {leaf.dtype.name for leaf in jax.tree.leaves((adam.mu, adam.nu))} == {kept}
        states[kept] = [np.float32(jax.tree.leaves(of)[0]) for of in (params, adam.mu, adam.nu)]
    (params, _, nu), (rounded_params, _, rounded_nu) = states["float32"], states["bfloat16"]
    np.testing.assert_allclose(rounded_nu.mean(), nu.mean(), rtol=5e-3)  # an average over 512 numbers
    np.testing.assert_allclose(rounded_nu, nu, rtol=0.2)
    apart = rounded_params / params - 1
    assert abs(apart.mean()) < 2e-3
    assert apart.std() < 0.02
    # To the nearest, a mean of squares of 1 does not come far: a thousandth of what is missing is below half a step.
    stuck = np.zeros(512, ml_dtypes.bfloat16)
    for gradient in gradients:
        stuck = (np.float32(0.999) * stuck.astype(np.float32) + np.float32(0.001) * gradient**2).astype(stuck.dtype)
    assert stuck.astype(np.float32).mean() < 0.5 * nu.mean()


BOXED = {"head": {"kernel": jax.ShapeDtypeStruct((512,), jnp.float32)}}


def is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)


def step(optimizer):
    def one(carry, gradient):
        params, state = carry
        updates, state = optimizer.update({"head": {"kernel": gradient}}, state, params)
        return (optax.apply_updates(params, updates), state), None

    return one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments": "bfloat"}, "unknown config.optimizer.moments 'bfloat'; did you mean 'bfloat16'"),
        ({"name": "lars"}, "moments is bfloat16, and lars has momentum alone; expected float32"),
    ],
)
def test_moments_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_optimizer(dataclasses.replace(CONFIG, **changes))
