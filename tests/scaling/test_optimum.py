"""The best size for a budget, against the closed form where FLOPs are 6 N D, and the parabola through iso-FLOP rows."""

import numpy as np
import pytest

from sslx.scaling.family import Size
from sslx.scaling.fit import Fit
from sslx.scaling.optimum import find_optimum, flops_per_token, parabola_minimum

E, A, B, ALPHA, BETA = 1.7, 400.0, 410.0, 0.34, 0.28


def six_n(parameters):
    return Size(
        width=1, layers=1, heads=1, mlp_width=1, total=parameters, non_embedding=1, flops_per_token=6 * parameters
    )


LADDER = [six_n(parameters) for parameters in (10**5, 10**6, 10**7, 10**9)]
CUT = [six_n(parameters) for parameters in (10**5, 10**6, 13 * 10**6)]  # between the best size and its interval's end


def law(spread=0.0):
    values = np.array([np.log(E), np.log(A), np.log(B), ALPHA, BETA])
    draws = np.tile(values, (50, 1))
    draws[:, 3] += spread * np.linspace(-1, 1, 50)
    return Fit(values, draws, np.zeros(16), np.ones(16), np.ones(16), np.ones(16))


@pytest.mark.parametrize("flops", [1e15, 1e17])
def test_the_optimum_is_the_closed_forms(flops):
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    n = g * (flops / 6) ** (BETA / (ALPHA + BETA))
    d = (flops / 6) / n
    found = find_optimum(law(), LADDER, "total", flops)
    assert found.parameters[0] == pytest.approx(n, rel=0.03)
    assert found.tokens[0] == pytest.approx(d, rel=0.03)
    assert found.loss[0] == pytest.approx(E + A / n**ALPHA + B / d**BETA, rel=1e-4)
    assert not found.at_edge


def test_intervals_follow_the_spread_of_the_fits():
    certain, unsure = (find_optimum(law(spread), LADDER, "total", 1e16) for spread in (0.0, 0.03))
    assert certain.parameters[1] == certain.parameters[0] == certain.parameters[2]
    assert unsure.parameters[1] < unsure.parameters[0] < unsure.parameters[2]
    assert unsure.loss[1] < unsure.loss[0] < unsure.loss[2]


def test_an_optimum_beyond_the_sizes_looked_at_is_told():
    assert find_optimum(law(), LADDER[:2], "total", 1e20).at_edge


def test_an_interval_that_ends_with_the_sizes_looked_at_is_told_too():
    inside, cut = (find_optimum(law(0.03), ladder, "total", 1e16) for ladder in (LADDER, CUT))
    assert not inside.at_edge
    assert inside.parameters[0] < CUT[-1].total < inside.parameters[2]
    assert cut.at_edge
    assert cut.parameters[2] == cut.searched[1] == pytest.approx(CUT[-1].total)
    assert cut.searched[0] < cut.parameters[0] < cut.searched[1]  # the best itself is inside


def test_flops_between_sizes_are_interpolated_and_exact_at_them():
    n = np.array([10**5, 3 * 10**6])
    assert flops_per_token(n, LADDER, "total") == pytest.approx(6 * n)


def test_a_parabolas_lowest_point_is_found_inside_the_sizes_only():
    n = np.geomspace(1e5, 1e7, 5)
    loss = 3 + 0.1 * (np.log(n) - np.log(8e5)) ** 2
    assert parabola_minimum(n, loss) == pytest.approx((8e5, 3.0))
    assert parabola_minimum(n[2:], loss[2:]) is None
    assert parabola_minimum(n, 6 - loss) is None
    assert parabola_minimum(n[:2], loss[:2]) is None
