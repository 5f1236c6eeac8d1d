"""The fit: it recovers laws it is given, ends in the minimum, covers what it should and says what it cannot know."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from sslx.errors import UserError
from sslx.scaling.fit import DELTA, Fit, fit_frontier, fit_law, frontier, shortage

LAW = dict(E=1.7, A=90.0, B=420.0, alpha=0.34, beta=0.41)


def loss(n, d, E, A, B, alpha, beta):
    """The law as it is written in the paper, with no logarithm in it."""
    return E + A / n**alpha + B / d**beta


def grid(sizes=5, budgets=5):
    n, d = np.meshgrid(np.geomspace(5e4, 5e6, sizes), np.geomspace(4e5, 4e7, budgets))
    return n.ravel(), d.ravel()


def noisy(sigma, seed, **shape):
    n, d = grid(**shape)
    return n, d, loss(n, d, **LAW) * np.exp(sigma * np.random.default_rng(seed).normal(size=len(n)))


def test_an_exact_law_is_recovered():
    n, d = grid()
    found = fit_law(n, d, loss(n, d, **LAW), draws=3).constants()
    for name, value in LAW.items():
        assert found[name][0] == pytest.approx(value, rel=1e-3), name
    assert found["best_size_exponent"][0] == pytest.approx(0.41 / 0.75, rel=1e-3)


def test_a_noisy_law_is_recovered_with_intervals_that_hold_it():
    fit = fit_law(*noisy(0.003, seed=0), draws=40)
    for name in ("alpha", "beta", "E"):
        value, low, high = fit.constants()[name]
        assert value == pytest.approx(LAW[name], rel=0.15)
        assert low < LAW[name] < high
    assert fit.weaknesses() == []


def test_one_broken_row_hardly_moves_the_fit():
    n, d, y = noisy(0.0, seed=0)
    y[7] *= 1.2
    fit = fit_law(n, d, y, draws=3)
    assert fit.loss(n, d)[[3, 20]] == pytest.approx(loss(n, d, **LAW)[[3, 20]], rel=2e-3)
    assert fit.misfit() == pytest.approx(np.log(1.2) / 5, rel=0.02)  # one of 25 rows


@pytest.mark.parametrize("seed", range(4))
def test_the_search_ends_in_the_minimum(seed):
    """A trust region method over raw constants, from the truth and from what was found, finds nothing lower."""
    n, d, y = noisy(0.01, seed=seed, sizes=4, budgets=4)

    def residuals(values):
        e, a, b, alpha, beta = values
        return np.log(loss(n, d, np.exp(e), np.exp(a), np.exp(b), alpha, beta) / y) / DELTA

    def cost(values):
        z = np.abs(residuals(values))
        return np.sum(np.where(z <= 1, z**2 / 2, z - 0.5))

    found = fit_law(n, d, y, draws=2).values
    truth = np.array([*np.log([LAW["E"], LAW["A"], LAW["B"]]), LAW["alpha"], LAW["beta"]])
    for start in (found, truth):
        other = least_squares(residuals, start, loss="huber", x_scale=[0.1, 1, 1, 0.1, 0.1], max_nfev=3000)
        assert cost(found) <= other.cost * (1 + 1e-4)


def test_prediction_intervals_hold_new_larger_runs_about_as_often_as_they_say():
    inside = 0
    for seed in range(8):
        fit = fit_law(*noisy(0.005, seed=seed, sizes=4, budgets=4), draws=25, seed=seed)
        run = loss(1.5e7, 1.2e8, **LAW) * np.exp(0.005 * np.random.default_rng(1000 + seed).normal())
        _, low, high = fit.predict(1.5e7, 1.2e8)
        inside += low <= run <= high
    assert inside >= 6


def test_a_prediction_interval_holds_the_noise_of_a_run_even_where_the_fits_agree():
    n, d = grid()
    values = np.array([*np.log([LAW["E"], LAW["A"], LAW["B"]]), LAW["alpha"], LAW["beta"]])
    noise = 0.02 * np.random.default_rng(0).normal(size=len(n))
    value, low, high = Fit(values, np.tile(values, (300, 1)), noise, n, d, loss(n, d, **LAW)).predict(1e6, 1e7)
    assert value == pytest.approx(loss(1e6, 1e7, **LAW))
    assert 0.03 < np.log(high / low) < 0.1


def test_too_few_rows_sizes_or_token_counts_are_refused():
    n, d = grid(2, 4)
    with pytest.raises(UserError, match=r"8 with 2 sizes and 4 token counts; expected at least 6 with 3 different"):
        fit_law(n, d, loss(n, d, **LAW))
    with pytest.raises(UserError, match=r"too few finished rows to fit: 5 with 5 sizes and 5"):
        fit_law(n[:5] * np.arange(1, 6), d[:5] * np.arange(1, 6), np.ones(5))
    with pytest.raises(UserError, match="too few finished rows to fit: 0"):
        fit_law(np.array([]), np.array([]), np.array([]))


def test_losses_that_do_not_depend_on_tokens_are_told_as_not_identified():
    n, d = grid(4, 4)
    y = (1.0 + 50 / n**0.3) * np.exp(0.003 * np.random.default_rng(1).normal(size=16))
    assert any("beta" in weakness for weakness in fit_law(n, d, y, draws=15).weaknesses())


def test_the_frontier_holds_the_rows_that_no_cheaper_row_beats():
    flops = np.array([4.0, 1.0, 2.0, 2.0, 3.0, 5.0])
    losses = np.array([2.0, 5.0, 4.0, 3.5, 3.6, 2.1])
    assert frontier(flops, losses).tolist() == [1, 3, 0]


def test_the_frontiers_power_law_is_recovered():
    flops = np.geomspace(1e12, 1e16, 9)
    noise = np.exp(0.002 * np.random.default_rng(0).normal(size=9))
    found = fit_frontier(np.tile(flops, 2), np.concatenate([30 * flops**-0.06 * noise, 40 * flops**-0.06]))
    assert found["k"][0] == pytest.approx(0.06, rel=0.02)
    assert found["k"][1] < 0.06 < found["k"][2]
    with pytest.raises(UserError, match=r"no compute frontier: too few finished rows \(5; 6 needed\)"):
        fit_frontier(flops[:5], 30 * flops[:5] ** -0.06)
    flat = np.array([3.0, 2.0, 2.0, 2.5, 2.5, 2.5])
    with pytest.raises(UserError, match=r"no compute frontier: too few rows on it \(2; 3 needed\)"):
        fit_frontier(np.geomspace(1e12, 1e13, 6), flat)


def iso_flop(sizes, budgets):
    """N and D of FLOP budgets, which no two rows share a D in."""
    n, c = np.meshgrid(np.geomspace(5e4, 5e6, sizes), np.geomspace(1e13, 1e14, budgets))
    return n.ravel(), (c / (6 * n)).ravel()


def test_one_flop_budget_cannot_be_fitted_and_two_with_four_sizes_can():
    n, d = iso_flop(sizes=7, budgets=1)
    assert shortage(n, d).startswith("the rows cannot be fitted: each size has one token count")
    assert shortage(n, 20 * n) == shortage(n[::-1], d[::-1]) == shortage(n, d)
    with pytest.raises(UserError, match="the finished rows cannot be fitted: each size has one token count"):
        fit_law(n, d, loss(n, d, **LAW))
    n, d = iso_flop(sizes=4, budgets=2)
    assert shortage(n, d) == ""
    assert len(fit_law(n, d, loss(n, d, **LAW), draws=3).losses) == 8
    n, d = grid(sizes=4, budgets=2)
    assert shortage(n, d) == (
        "too few rows to fit: 8 with 4 sizes and 2 token counts; expected at least 6 with 3 different sizes and 3 "
        "different token counts"
    )
