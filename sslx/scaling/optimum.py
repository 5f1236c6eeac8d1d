"""What a fit says of a budget: the best size, its tokens and its loss; and what iso-FLOP rows say of it without a fit.

In: a `Fit`, and the family's sizes with their exact FLOPs per token, between which FLOPs are interpolated in log N.
Out: the optimum with intervals over the bootstrap (Hoffmann et al., arXiv 2203.15556, approaches 3 and 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sslx.scaling.family import Size
from sslx.scaling.fit import Fit, interval

POINTS = 400  # of the search over N

Interval = tuple[float, float, float]  # value, low, high


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The predicted best use of ``flops``."""

    flops: float
    parameters: Interval
    tokens: Interval
    loss: Interval
    size: Size  # the family's member nearest to it
    searched: tuple[float, float]  # the least and the greatest N that were looked at
    at_edge: bool  # the best N, or an end of its interval, is one of them: it may lie beyond


def flops_per_token(
    parameters: Float[np.ndarray, "points"], ladder: Sequence[Size], count: str
) -> Float[np.ndarray, "points"]:
    """Training FLOPs per token of models with these N."""
    known = np.array([[size.parameters(count), size.flops_per_token] for size in ladder])
    return np.exp(np.interp(np.log(parameters), *np.log(known.T)))


def find_optimum(fit: Fit, ladder: Sequence[Size], count: str, flops: float, seed: int = 0) -> Optimum:
    """The best N and D for ``flops``, with intervals; the loss's includes the noise of a single run.

    Args:
      fit: The law.
      ladder: Sizes of the family, wide enough to hold the optimum.
      count: ``total`` or ``non_embedding``.
      flops: C.
      seed: Of the noise.
    """
    counts = [size.parameters(count) for size in ladder]
    n = np.geomspace(min(counts), max(counts), POINTS)
    d = flops / flops_per_token(n, ladder, count)
    best = int(np.argmin(fit.loss(n, d)))
    e, a, b, alpha, beta = (column[:, None] for column in fit.draws.T)
    drawn = np.exp(e) + np.exp(a - alpha * np.log(n)) + np.exp(b - beta * np.log(d))
    chosen = drawn.argmin(axis=1)
    noise = np.random.default_rng(seed).choice(fit.noise, len(chosen))
    parameters = (float(n[best]), *interval(n[chosen]))
    searched = (float(n[0]), float(n[-1]))
    nearest = min(ladder, key=lambda size: abs(np.log(size.parameters(count) / n[best])))
    return Optimum(
        flops=flops,
        parameters=parameters,
        tokens=(float(d[best]), *interval(d[chosen])),
        loss=(float(fit.loss(n[best], d[best])), *interval(drawn.min(axis=1) * np.exp(noise))),
        size=nearest,
        searched=searched,
        at_edge=any(part in searched for part in parameters),
    )


def parabola_minimum(
    parameters: Float[np.ndarray, "sizes"], losses: Float[np.ndarray, "sizes"]
) -> tuple[float, float] | None:
    """N and loss at the lowest point of a parabola in log N through the rows of one FLOP budget.

    Returns:
      None with fewer than three sizes, or where the parabola has no lowest point inside their range.
    """
    x = np.log(parameters)
    if len(x) < 3:
        return None
    curvature, slope, offset = np.polyfit(x, losses, 2)
    lowest = -slope / (2 * curvature) if curvature > 0 else np.inf
    if not x.min() <= lowest <= x.max():
        return None
    return float(np.exp(lowest)), float(np.polyval([curvature, slope, offset], lowest))
