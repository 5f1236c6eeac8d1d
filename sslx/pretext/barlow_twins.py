"""Barlow Twins (arXiv 2103.03230): features of two views that agree, each saying something of its own.

In: two views of each row. Out: one term, of the cross-correlation over the batch of the projections' features: the sum
of (1 - C_ii)² and of ``redundancy`` times C_ij² elsewhere. Features are normalised by the mean and variance of the
whole batch. Guessing costs the width of the projection, and what unrelated views of so many rows correlate by accident;
features that are the same for all rows cost the width alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.models.heads import HeadConfig
from sslx.objective import Out
from sslx.pretext.joint import Given, JointEmbedding, check_number, mean_of, of_all
from sslx.pretext.joint_network import Seen
from sslx.pretext.picture_views import TwoViews
from sslx.pretext.sentence_views import DropoutViews

EPS = 1e-5  # beside the variance, as in the batch normalisation of the authors' code


@dataclasses.dataclass(frozen=True)
class BarlowTwinsConfig:
    """``config.pretext`` of ``name="barlow_twins"``."""

    name: str = "barlow_twins"
    redundancy: float = 0.0051  # weight of what is not on the diagonal
    scale: float = 1.0  # of the whole loss; the authors' code had 0.024 before it had another optimizer
    projector: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=3, hidden=8192, out=8192))
    views: TwoViews | DropoutViews = dataclasses.field(default_factory=TwoViews)

    def __post_init__(self):
        check_number("scale", self.scale)
        check_number("redundancy", self.redundancy, zero=True)


def standardised(x: Float[Array, "batch width"], weights: Float[Array, " batch"]) -> Float[Array, "batch width"]:
    """Each feature with mean 0 and variance 1 over the rows with weight."""
    share = (weights / jnp.maximum(jnp.sum(weights), 1e-6))[:, None]
    x = x - jnp.sum(share * x, axis=0)
    return x * jax.lax.rsqrt(jnp.sum(share * x**2, axis=0) + EPS)


def barlow_loss(
    first: Float[Array, "batch width"],
    second: Float[Array, "batch width"],
    weights: Float[Array, " batch"],
    redundancy: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss of the batch, and the mean correlation of each feature of one view with that of the other."""
    share = (weights / jnp.maximum(jnp.sum(weights), 1e-6))[:, None]
    first, second = (standardised(x, weights) for x in (first, second))
    correlation = jnp.einsum("ni,nj->ij", share * first, second, precision=jax.lax.Precision.HIGHEST)
    own = jnp.diagonal(correlation)
    others = jnp.sum(correlation**2) - jnp.sum(own**2)
    return jnp.sum((1.0 - own) ** 2) + redundancy * others, jnp.mean(own)


@dataclasses.dataclass(frozen=True)
class BarlowTwins(JointEmbedding):
    """The objective of ``config.pretext.name = "barlow_twins"``."""

    pretext_config = BarlowTwinsConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("collapse", "low_rank"),
        "more weight of what differs (config.pretext.redundancy, 0.0051 in the paper), a lower learning rate",
    )
    terms = ("correlation",)
    unit = ""

    pretext: BarlowTwinsConfig

    def compared(self, student: list[Seen], teacher: None, given: Given) -> Out:
        weights = given.weights
        first, second = (view.projection for view in student)
        loss, agreement = barlow_loss(first, second, weights, self.pretext.redundancy)
        term = of_all(loss, weights, self.pretext.scale)
        return Out({"correlation": term}, {"agreement": mean_of(agreement, weights)})

    def chance(self, statistics: Mapping[str, float]) -> float:
        width = self.pretext.projector.width(self.model.features_width)
        squared = 1.0 / (self.rows_compared(statistics) - 1)  # correlation of N unrelated rows
        by_accident = (1.0 + self.pretext.redundancy * (width - 1)) * squared
        return self.pretext.scale * width * (1.0 + by_accident)
