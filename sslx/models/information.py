"""Lower bounds of mutual information from a critic's scores of all pairs of a batch, in nats.

In: scores T[i, j, ...] of what belongs to row i with what belongs to row j; those of a row with itself are drawn
from the joint distribution, the rest from the product of the marginals. Further axes are averaged over. Rows without
weight take no part.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.models.layers import NEVER

Scores = Float[Array, "rows rows ..."]


def own(scores: Scores, weights: Float[Array, " rows"]) -> tuple[Float[Array, "rows ..."], Float[Array, ""]]:
    """Scores of rows with themselves, and their mean."""
    diagonal = jnp.moveaxis(jnp.diagonal(scores, axis1=0, axis2=1), -1, 0)
    return diagonal, _mean(diagonal, weights)


def infonce(scores: Scores, weights: Float[Array, " rows"]) -> Float[Array, ""]:
    """``ln N`` less the cross-entropy of telling a column's own row from all N (CPC, 1807.03748); at most ln N."""
    there = (weights > 0).reshape(-1, *(1,) * (scores.ndim - 1))
    diagonal, _ = own(scores, weights)
    likelihood = diagonal - jax.nn.logsumexp(jnp.where(there, scores, NEVER), axis=0)
    return jnp.log(jnp.sum(weights > 0)) + _mean(likelihood, weights)


def donsker_varadhan(scores: Scores, weights: Float[Array, " rows"]) -> Float[Array, ""]:
    """E_joint[T] - ln E_marginals[exp T] (MINE, arXiv 1801.04062), whose gradient from a batch is biased."""
    return own(scores, weights)[1] - _log_mean_exp_of_others(scores, weights)


def nwj(scores: Scores, weights: Float[Array, " rows"]) -> Float[Array, ""]:
    """E_joint[T] - E_marginals[exp(T - 1)] (Nguyen, Wainwright and Jordan, arXiv 0809.0853)."""
    return own(scores, weights)[1] - jnp.exp(_log_mean_exp_of_others(scores, weights) - 1.0)


def jensen_shannon(scores: Scores, weights: Float[Array, " rows"]) -> Float[Array, ""]:
    """Twice the Jensen-Shannon divergence less 2 ln 2, no bound of the information but rising with it (1808.06670)."""
    diagonal, _ = own(scores, weights)
    pairs = _pairs(scores, weights)
    others = jnp.sum(pairs * jax.nn.softplus(scores)) / jnp.maximum(jnp.sum(pairs), 1e-6)
    return _mean(-jax.nn.softplus(-diagonal), weights) - others


def _pairs(scores: Scores, weights: Array) -> Float[Array, "rows rows ..."]:
    """1 for pairs of different rows with weight."""
    there = (weights > 0).astype(jnp.float32)
    pairs = there[:, None] * there[None, :] * (1.0 - jnp.eye(len(there)))
    return jnp.broadcast_to(pairs.reshape(*pairs.shape, *(1,) * (scores.ndim - 2)), scores.shape)


def _log_mean_exp_of_others(scores: Scores, weights: Array) -> Float[Array, ""]:
    pairs = _pairs(scores, weights)
    return jax.nn.logsumexp(jnp.where(pairs > 0, scores, NEVER)) - jnp.log(jnp.maximum(jnp.sum(pairs), 1.0))


def _mean(values: Float[Array, "rows ..."], weights: Array) -> Float[Array, ""]:
    """Over rows by weight, and over all else."""
    by_row = jnp.mean(values.reshape(len(values), -1), axis=1)
    return jnp.sum(weights * by_row) / jnp.maximum(jnp.sum(weights), 1e-6)


BOUNDS = {"infonce": infonce, "mine": donsker_varadhan, "nwj": nwj, "jsd": jensen_shannon}
