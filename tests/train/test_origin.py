"""Origins of infinities and NaNs: the operation, its line, its pass, its repetition; what is masked away has none."""

from __future__ import annotations

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.train.origin import origins


def origins_of(function, *arguments, names=None):
    leaves = jax.tree.leaves(arguments)
    return origins(jax.make_jaxpr(function)(*arguments), leaves, names or [str(n) for n in range(len(leaves))])


def line_of(function, text):
    """``test_origin.py:12``: where a function has a text."""
    lines, first = inspect.getsourcelines(function)
    return f"test_origin.py:{first + next(n for n, line in enumerate(lines) if text in line)} "


def test_the_first_infinity_is_named_and_where_it_turns_to_nan():
    def loss(x):
        low = jnp.log(x)
        return jnp.sum(low * x)

    (origin,) = origins_of(loss, jnp.array([1.0, 0.0]))
    assert (origin.operation, origin.value, origin.backward) == ("log", "-inf", False)
    assert line_of(loss, "jnp.log(x)") in origin.place
    assert (origin.nan.operation, origin.nan.value) == ("mul", "nan")
    assert line_of(loss, "low * x") in origin.nan.place


def test_a_nan_comes_from_the_operation_that_jax_debug_nans_stops_at():
    def loss(x):
        return jnp.sum(jnp.arccosh(x) + jnp.sqrt(x - 2.0))

    x = jnp.array([3.0, 1.5])
    (origin,) = origins_of(loss, x)
    with jax.debug_nans(True), jax.disable_jit(), pytest.raises(FloatingPointError, match=r"encountered in (\w+)") as e:
        loss(x)
    assert f"encountered in {origin.operation}" in str(e.value)
    assert origin.operation == "sqrt"


def test_what_is_masked_away_is_no_origin_in_the_forward_pass_and_one_in_the_backward_pass():
    def loss(x):
        return jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0.0))

    x = jnp.array([4.0, 0.0])
    assert origins_of(lambda x: jnp.sum(jnp.where(x > 0, jnp.log(x), 0.0)), x) == [None]
    value, gradient = origins_of(jax.value_and_grad(loss), x)
    assert value is None
    # The derivative of sqrt is infinite at 0, and where sends it a gradient of 0.
    assert (gradient.value, gradient.nan.value, gradient.nan.backward) == ("inf", "nan", True)
    assert line_of(loss, "jnp.sqrt(x)") in gradient.nan.place


def test_the_repetition_of_a_scan_is_named_in_both_passes():
    def run(x):
        def layer(carry, n):
            return carry + 1.0 / (2.0 - n), None

        return jax.lax.scan(layer, x, jnp.arange(4.0))[0]

    (origin,) = origins_of(run, jnp.float32(0.0))
    assert (origin.operation, origin.repeats) == ("div", (2,))
    assert line_of(run, "1.0 / (2.0 - n)") in origin.place

    def powers(x):
        def layer(carry, n):
            return carry + jnp.sqrt(carry * (n - 1.0)), carry

        carry, _ = jax.lax.scan(layer, x, jnp.array([2.0, 1.0, 3.0]))
        return carry

    value, gradient = origins_of(jax.value_and_grad(powers), jnp.float32(1.0))
    assert value is None
    assert gradient.repeats == (1,)


def test_a_jitted_function_is_named_by_the_call_that_broke_and_not_by_its_first():
    def loss(x):
        well = jax.nn.logsumexp(x)
        badly = jax.nn.logsumexp(x * jnp.inf)
        return well + badly

    (origin,) = origins_of(loss, jnp.array([1.0, -1.0]))
    assert line_of(loss, "x * jnp.inf") in origin.place

    def twice(x):
        well = jnp.linalg.norm(x)
        badly = jnp.log(jnp.var(x * 0.0))
        return well + badly + jnp.log(jnp.var(x))

    (origin,) = origins_of(twice, jnp.array([1.0, -1.0]))
    assert line_of(twice, "x * 0.0") in origin.place


def with_own_gradient(function):
    wrapped = jax.custom_jvp(function)
    wrapped.defjvps(lambda tangent, result, x: tangent)
    return wrapped


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, with_own_gradient], ids=["jit", "remat", "custom_jvp"])
def test_operations_inside_others_are_named(wrap):
    inner = wrap(lambda x: jnp.sum(1.0 / x))
    (origin,) = origins_of(lambda x: inner(x) + 1.0, jnp.zeros(3))
    assert (origin.operation, origin.value) == ("div", "inf")


def test_the_branch_that_was_taken_is_looked_at():
    def loss(x, which):
        return jax.lax.switch(which, [lambda x: x, lambda x: jnp.log(-x), jnp.log], x)

    assert origins_of(loss, jnp.float32(1.0), jnp.int32(0)) == [None]
    (origin,) = origins_of(loss, jnp.float32(1.0), jnp.int32(1))
    assert (origin.operation, origin.value) == ("log", "nan")


def test_modules_are_named_in_both_passes():
    class Root(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sum(nn.Dense(2, name="head")(x))

    x = jnp.full((1, 2), 3e38)
    params = {"params": {"head": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}}
    value, *gradients = origins_of(jax.value_and_grad(lambda p, x: Root().apply(p, x)), params, x)
    assert (value.operation, value.module, value.backward) == ("dot_general", "Root/head", False)
    assert gradients == [None, None]


def test_a_given_value_that_is_not_finite_is_named_as_given():
    first, second = origins_of(
        lambda a, b: (a + 1.0, b + 1.0), jnp.array([1.0, np.nan]), jnp.ones(2), names=["parameter w", "batch x"]
    )
    assert (first.operation, first.value, first.module) == ("argument", "nan", "parameter w")
    assert second is None
