"""What XLA is asked for: options that it knows, unless the user's flags say otherwise."""

from __future__ import annotations

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


def convolve(image, kernel, stride=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image, kernel, (stride, stride), "SAME", dimension_numbers=layout)


def test_convolutions_on_cpu_are_not_ynnpacks():
    shapes = jax.ShapeDtypeStruct((8, 32, 32, 16), jnp.float32), jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32)
    options = compiler.compiler_options("cpu")
    assert options
    program = jax.jit(convolve, compiler_options=options).lower(*shapes).compile().as_text()
    assert "convolution(" in program
    assert "ynn_fusion" not in program


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

    def gradient(image, kernel):
        def loss(image, kernel):
            out = jax.lax.conv_general_dilated(
                image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.sum(out**2)

        return jax.grad(loss, (0, 1))(image, kernel)

    plain = jax.jit(gradient)(image, kernel)
    asked = jax.jit(gradient, compiler_options=compiler.compiler_options("cpu"))(image, kernel)
    for one, other in zip(plain, asked, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4 * np.abs(one).max())
