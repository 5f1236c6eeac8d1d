"""Fits loss as a function of parameters and tokens, with intervals.

``L(N, D) = E + A / N^alpha + B / D^beta`` by approach 3 of Hoffmann et al. (arXiv 2203.15556): Huber loss (delta 1e-3)
of ``log L``, the terms as a log-sum-exp of ``(e, a - alpha log N, b - beta log D)``, L-BFGS from a grid of starts.
Besiroglu et al. (arXiv 2404.10102) found that fit stopped early, from a mean in place of a sum; here it is a sum, in
units of delta squared, over centred logarithms, with tight tolerances. Intervals are percentiles over fits to rows
drawn with replacement.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize, nnls
from threadpoolctl import threadpool_limits

from sslx.errors import UserError

DELTA = 1e-3
MIN_ROWS = 6  # one more than there are parameters
MIN_LEVELS = 3  # sizes, and token counts: two points of a power law with an offset fix nothing
EXPONENTS = (0.02, 3.0)
STARTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.1, 1.6, 2.2)
CONFIDENCE = 0.95
DRAWS = 300


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law, and the same fitted to resampled rows.

    Attributes:
      values: ``e, a, b, alpha, beta``, at the logarithms' own origin: ``E = exp(e)`` and so on.
      draws: float[draws, 5], the same of each resample.
      noise: log residuals of the rows, widened for the degrees of freedom that the fit has used.
      parameters: N of the rows.
      tokens: D of the rows.
      losses: What was fitted.
    """

    values: Float[np.ndarray, "5"]
    draws: Float[np.ndarray, "draws 5"]
    noise: Float[np.ndarray, "rows"]
    parameters: Float[np.ndarray, "rows"]
    tokens: Float[np.ndarray, "rows"]
    losses: Float[np.ndarray, "rows"]

    def loss(self, parameters: Float[np.ndarray, "points"], tokens: Float[np.ndarray, "points"]) -> np.ndarray:
        """The fitted loss."""
        return np.exp(_log_loss(self.values, np.log(parameters), np.log(tokens)))

    def constants(self) -> dict[str, tuple[float, float, float]]:
        """``E, A, B, alpha, beta`` and the exponent of the best size, each as (value, low, high)."""
        named = {}
        for index, name in enumerate(("E", "A", "B", "alpha", "beta")):
            transform = np.exp if index < 3 else np.asarray
            named[name] = (float(transform(self.values[index])), *interval(transform(self.draws[:, index])))
        share = lambda values: values[..., 4] / (values[..., 3] + values[..., 4])  # noqa: E731
        named["best_size_exponent"] = (float(share(self.values)), *interval(share(self.draws)))
        return named

    def predict(self, parameters: float, tokens: float, seed: int = 0) -> tuple[float, float, float]:
        """The loss of a new run with its prediction interval: the fits' spread and the rows' residual noise."""
        at = np.log(parameters), np.log(tokens)
        noise = np.random.default_rng(seed).choice(self.noise, len(self.draws))
        spread = np.array([_log_loss(draw, *at) for draw in self.draws]) + noise
        return float(np.exp(_log_loss(self.values, *at))), *interval(np.exp(spread))

    def misfit(self) -> float:
        """Root mean square of the rows' relative distances from the law: noise, and what the law cannot say."""
        return float(np.sqrt(np.mean((np.log(self.losses / self.loss(self.parameters, self.tokens))) ** 2)))

    def weaknesses(self) -> list[str]:
        """What the rows do not pin down; [] where everything is identified."""
        found, constants = [], self.constants()
        for index, name in ((3, "alpha"), (4, "beta")):
            value, low, high = constants[name]
            if _at_bound(self.values[index], EXPONENTS):
                found.append(f"{name} is at the edge of what is searched ({value:.2g})")
            elif high > 3 * low:
                found.append(f"{name} is not pinned down ({low:.2f} to {high:.2f})")
        value, low, _ = constants["E"]
        if low < 0.1 * self.losses.min():
            found.append(f"the irreducible loss E is not told from 0 (interval from {low:.2g})")
        return found


# Matrices of a few numbers: threads of BLAS would spend their time waiting for one another, tenfold on a busy machine.
@threadpool_limits.wrap(limits=1)
def fit_law(
    parameters: Float[np.ndarray, "rows"],
    tokens: Float[np.ndarray, "rows"],
    losses: Float[np.ndarray, "rows"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Fit:
    """Fits the law and bootstraps it over rows.

    Args:
      parameters: N.
      tokens: D.
      losses: Final held-out losses.
      draws: Resamples.
      seed: Of the resamples.

    Raises:
      UserError: what `shortage` finds.
    """
    n, d, y = (np.asarray(values, float) for values in (parameters, tokens, losses))
    if problem := shortage(n, d, "finished rows"):
        raise UserError(problem)
    values = _fit(n, d, y, starts=6)
    rng, drawn = np.random.default_rng(seed), []
    while len(drawn) < draws:
        rows = rng.integers(0, len(y), len(y))
        # A resample that could not be fitted by itself says nothing of how the fit would vary.
        few = len(set(rows)) < MIN_ROWS - 1 or min(_levels(n[rows]), _levels(d[rows])) < MIN_LEVELS
        if few or _one_curve(n[rows], d[rows]):
            continue
        drawn.append(_fit(n[rows], d[rows], y[rows], starts=1, also=values))
    residuals = np.log(y) - _log_loss(values, np.log(n), np.log(d))
    noise = residuals * np.sqrt(len(y) / (len(y) - 5))
    return Fit(values, np.array(drawn), noise, n, d, y)


def shortage(parameters: Float[np.ndarray, "rows"], tokens: Float[np.ndarray, "rows"], rows: str = "rows") -> str:
    """Why rows of these N and D cannot be fitted, whatever their losses, or ""; ``rows`` is what they are called."""
    n, d = np.asarray(parameters, float), np.asarray(tokens, float)
    if len(n) < MIN_ROWS or _levels(n) < MIN_LEVELS or _levels(d) < MIN_LEVELS:
        return (
            f"too few {rows} to fit: {len(n)} with {_levels(n)} sizes and {_levels(d)} token counts; expected at least "
            f"{MIN_ROWS} with {MIN_LEVELS} different sizes and {MIN_LEVELS} different token counts"
        )
    if _one_curve(n, d):
        return (
            f"the {rows} cannot be fitted: each size has one token count, and these only rise or only fall with the "
            "size, as in a single FLOP budget; expected at least two budgets"
        )
    return ""


def fit_frontier(
    flops: Float[np.ndarray, "rows"], losses: Float[np.ndarray, "rows"], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """``L = c C^-k`` on the rows that no cheaper row beats, by least squares of the logarithms.

    Returns:
      ``c`` and ``k`` as (value, low, high).

    Raises:
      UserError: there are too few rows, or too few such rows; resampled, they would all give the same line.
    """

    def law(c: np.ndarray, y: np.ndarray) -> np.ndarray | None:
        on = frontier(c, y)
        if len(on) < MIN_LEVELS:
            return None
        slope, offset = np.polyfit(np.log(c[on]), np.log(y[on]), 1)
        return np.array([np.exp(offset), -slope])

    c, y = np.asarray(flops, float), np.asarray(losses, float)
    if len(y) < MIN_ROWS:
        raise UserError(f"no compute frontier: too few finished rows ({len(y)}; {MIN_ROWS} needed)")
    value, rng = law(c, y), np.random.default_rng(seed)
    if value is None:
        raise UserError(f"no compute frontier: too few rows on it ({len(frontier(c, y))}; {MIN_LEVELS} needed)")
    resampled = (law(c[rows], y[rows]) for rows in rng.integers(0, len(y), (draws, len(y))))
    drawn = np.array([found for found in resampled if found is not None])
    return {name: (float(value[i]), *interval(drawn[:, i])) for i, name in enumerate(("c", "k"))}


def frontier(flops: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the rows that no row of as many or fewer FLOPs beats, by rising FLOPs."""
    on, best = [], np.inf
    for index in np.lexsort((losses, flops)):
        if losses[index] < best:
            best = losses[index]
            on.append(index)
    return np.array(on, int)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central `CONFIDENCE` of some draws."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _levels(values: np.ndarray) -> int:
    """How many different values, those within 1 % counted as one: budgets are met to the nearest step."""
    ordered = np.sort(np.log(values))
    return 1 + int(np.sum(np.diff(ordered) > 0.01)) if len(values) else 0


def _one_curve(n: np.ndarray, d: np.ndarray) -> bool:
    """Whether D follows from N and only rises or only falls with it: then A, B and E are not told apart."""
    order = np.lexsort((d, n))
    log_n, log_d = np.log(n[order]), np.log(d[order])
    steps = np.diff(log_d)[np.diff(log_n) > 0.01]
    spread = np.diff(log_d)[np.diff(log_n) <= 0.01]
    return bool((np.abs(spread) <= 0.01).all() and ((steps > 0).all() or (steps < 0).all()))


def _at_bound(value: float, bounds: tuple[float, float]) -> bool:
    return bool(np.isclose(value, bounds, rtol=1e-2).any())


def _terms(values: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
    e, a, b, alpha, beta = values
    terms = np.empty((3, *np.shape(log_n)))
    terms[0], terms[1], terms[2] = e, a - alpha * log_n, b - beta * log_d
    return terms


def _log_loss(values: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
    return np.log(np.sum(np.exp(_terms(values, log_n, log_d)), axis=0))


def _objective(values: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_y: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of Huber losses in units of delta squared, and its gradient."""
    terms = np.exp(_terms(values, log_n, log_d))  # the bounds keep it far from overflow
    total = terms.sum(axis=0)
    z = (np.log(total) - log_y) / DELTA
    clipped = np.minimum(np.maximum(z, -1), 1)
    shares = terms * (clipped / total)
    gradient = np.array([*shares.sum(axis=1), -(shares[1] @ log_n), -(shares[2] @ log_d)]) / DELTA
    return float(np.sum(clipped * (z - clipped / 2))), gradient


def _fit(n: np.ndarray, d: np.ndarray, y: np.ndarray, *, starts: int, also: np.ndarray | None = None) -> np.ndarray:
    """The best of L-BFGS from ``starts`` points of a grid over the exponents and from ``also``.

    For given exponents the law is linear in E, A and B, so that the grid needs only two of five dimensions.
    """
    log_n, log_d, log_y = np.log(n), np.log(d), np.log(y)
    middle_n, middle_d = log_n.mean(), log_d.mean()  # centred: else A and alpha are one direction to the search
    log_n, log_d = log_n - middle_n, log_d - middle_d
    top = log_y.max() + 2
    bounds = [(log_y.min() - 7, log_y.min()), (log_y.min() - 9, top), (log_y.min() - 9, top), EXPONENTS, EXPONENTS]
    low, high = np.array(bounds).T
    candidates = []
    if also is not None:
        shift = np.array([0, -also[3] * middle_n, -also[4] * middle_d, 0, 0])
        candidates.append(np.clip(also + shift, low, high))
    grid, exponents = [], STARTS if also is None else STARTS[1::3]
    for alpha in exponents:
        for beta in exponents:
            columns = np.stack([np.ones_like(y), np.exp(-alpha * log_n), np.exp(-beta * log_d)], axis=1)
            linear, _ = nnls(columns / y[:, None], np.ones_like(y))
            start = np.clip([*np.log(np.maximum(linear, 1e-12)), alpha, beta], low, high)
            grid.append((_objective(start, log_n, log_d, log_y)[0], start))
    grid.sort(key=lambda scored: scored[0])
    candidates += [start for _, start in grid[:starts]]
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-7, "maxcor": 20}
    found = [
        minimize(_objective, start, (log_n, log_d, log_y), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        for start in candidates
    ]
    best = min(found, key=lambda result: result.fun).x
    return best + np.array([0, best[3] * middle_n, best[4] * middle_d, 0, 0])
