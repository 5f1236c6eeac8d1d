"""Teachers: their schedules and how they follow."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.models.teacher import MomentumConfig, between, followed


def test_momentum_rises_along_half_a_cosine_to_its_end():
    momentum = MomentumConfig(0.99, 1.0)
    for step in (0, 25, 50, 100, 1000):
        expected = 1.0 - 0.01 * (math.cos(math.pi * min(step / 100, 1.0)) + 1) / 2  # BYOL's formula
        assert float(momentum.at(step, 100)) == pytest.approx(expected, abs=1e-6)
    assert float(MomentumConfig(0.9, 1.0, "linear", steps=10).at(5, 100)) == pytest.approx(0.95)
    assert float(between(1.0, 0.0, 3, 4, "linear")) == pytest.approx(0.25)


def test_a_teacher_copies_first_and_follows_then_and_takes_only_what_it_has():
    student = {"a": {"w": jnp.float32([2.0])}, "predictor": {"w": jnp.float32([7.0])}}
    teacher = {"a": {"w": jnp.float32([100.0])}}
    teacher = followed(teacher, student, 0.9, jnp.int32(0))
    assert float(teacher["a"]["w"][0]) == 2.0
    teacher = followed(teacher, {"a": {"w": jnp.float32([3.0])}}, 0.9, jnp.int32(1))
    assert set(teacher) == {"a"}
    np.testing.assert_allclose(teacher["a"]["w"], [0.9 * 2 + 0.1 * 3], rtol=1e-6)


def test_momenta_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"momentum.start is 1: the teacher would never move"):
        MomentumConfig(1.0)
    with pytest.raises(UserError, match=r"momentum.end is 1.5; expected 0 to 1"):
        MomentumConfig(0.9, 1.5)
    with pytest.raises(UserError, match="'cosin'; did you mean 'cosine'"):
        MomentumConfig(schedule="cosin")
