"""What XLA is asked for: options that it knows, unless the user's flags say otherwise."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx import compiler


@pytest.fixture(autouse=True)
def anew():
    compiler.compiler_options.cache_clear()
    yield
    compiler.compiler_options.cache_clear()


def gradients(image, kernel):
    def loss(image, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout) ** 2)

    return jax.grad(loss, (0, 1))(image, kernel)


def library_convolutions(options):
    shapes = jax.ShapeDtypeStruct((64, 32, 32, 64), jnp.float32), jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
    program = jax.jit(gradients, compiler_options=options).lower(*shapes).compile()
    bodies = re.findall(r"^%\S*fused_computation\S* .*?^}", program.as_text(), re.MULTILINE | re.DOTALL)
    return sum("convolution(" in body for body in bodies)


def test_convolutions_on_cpu_are_not_ynnpacks():
    if jax.__version_info__ < (0, 11):  # what later ones choose by themselves nobody has seen
        assert library_convolutions({}) == 3
    assert library_convolutions(compiler.compiler_options("cpu")) == 0


def test_an_option_that_this_xla_does_not_know_is_left_out(monkeypatch):
    known = {"xla_cpu_enable_fast_min_max": True}
    monkeypatch.setitem(compiler.OPTIONS, "cpu", known | {"xla_cpu_of_another_release": True})
    assert compiler.compiler_options("cpu") == known


def test_what_the_user_has_set_is_left_alone(monkeypatch):
    (name,) = compiler.OPTIONS["cpu"]
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=-individual_dot")
    assert compiler.compiler_options("cpu") == {}


def test_a_platform_that_is_only_planned_for_has_none():
    assert compiler.compiler_options("gpu") == {}
    assert compiler.compiler_options("tpu") == {}


def test_options_change_no_result():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    image = np.random.default_rng(1).normal(size=(2, 16, 16, 8)).astype(np.float32)
    plain = jax.jit(gradients)(image, kernel)
    asked = jax.jit(gradients, compiler_options=compiler.compiler_options("cpu"))(image, kernel)
    for one, other in zip(plain, asked, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4 * np.abs(one).max())
