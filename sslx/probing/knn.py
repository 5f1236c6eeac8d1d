"""Nearest neighbours on frozen features, as in InstDisc (arXiv 1805.01978) and DINO (arXiv 2104.14294).

In: features and labels of train, features to sort. Out: scores. The ``neighbours`` training rows of the highest cosine
similarity vote for their labels, each with the weight exp(similarity / temperature).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sslx.errors import UserError
from sslx.models.pooling import unit_vectors

ROWS_AT_ONCE = 1024  # whose similarities to all training rows exist together


@dataclasses.dataclass(frozen=True)
class KnnConfig:
    """Who votes, and how much."""

    neighbours: int = 20
    temperature: float = 0.07

    def __post_init__(self):
        if self.neighbours < 1:
            raise UserError(f"config.knn.neighbours is {self.neighbours}; expected at least 1")
        if not self.temperature > 0:
            raise UserError(f"config.knn.temperature is {self.temperature}; expected more than 0")


def knn_scores(
    train: Float[np.ndarray, "rows dim"],
    labels: Int[np.ndarray, " rows"],
    queries: Float[np.ndarray, "queries dim"],
    *,
    classes: int,
    config: KnnConfig,
) -> Float[np.ndarray, "queries classes"]:
    """Summed weights of each class's votes; the class with the most is the answer."""
    neighbours = min(config.neighbours, len(train))
    bank, labels = unit_vectors(jnp.asarray(train)), jnp.asarray(labels)
    voted = jax.jit(functools.partial(vote, neighbours=neighbours, temperature=config.temperature, classes=classes))
    size = min(ROWS_AT_ONCE, len(queries))
    scores = []
    for start in range(0, len(queries), size):
        chunk = queries[start : start + size]
        padded = np.concatenate([chunk, np.zeros((size - len(chunk), queries.shape[1]), queries.dtype)])
        scores.append(np.asarray(voted(bank, labels, jnp.asarray(padded)))[: len(chunk)])
    return np.concatenate(scores)


def vote(
    bank: Float[Array, "rows dim"],
    labels: Int[Array, " rows"],
    queries: Float[Array, "queries dim"],
    *,
    neighbours: int,
    temperature: float,
    classes: int,
) -> Float[Array, "queries classes"]:
    """Shares of the votes, but for one factor a query; the bank's rows are of length 1."""
    similarity, nearest = jax.lax.top_k(unit_vectors(queries) @ bank.T, neighbours)
    # exp(s/T) reaches 1.6e6 at T = 0.07 and overflows at small T; what is subtracted changes no share of a row.
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)
    return jnp.einsum("qk,qkc->qc", weights, jax.nn.one_hot(labels[nearest], classes))
