"""VICReg (arXiv 2105.04906): two views' features agree, each varies over the batch, and none says what another says.

In: two views of each row. Out: three terms. ``invariance`` is the mean square between the views; ``variance`` the mean,
over features and both views, of what a feature's deviation over the batch lacks of 1; ``covariance`` the sum of the
squared covariances of different features, over the width, of both views. They are weighed 25, 25 and 1. If all vectors
are the same, only ``variance`` is left, at nearly 1 and so 25 in all. ``projection_deviation`` is to be watched: what
collapses here shrinks, which lengths that are brought to 1 do not show.
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
from sslx.pretext.joint import Given, JointEmbedding, check_number, mean_of, of_all, of_rows
from sslx.pretext.joint_network import Seen
from sslx.pretext.picture_views import TwoViews
from sslx.pretext.sentence_views import DropoutViews

EPS = 1e-4  # beside the variance


@dataclasses.dataclass(frozen=True)
class VicregConfig:
    """``config.pretext`` of ``name="vicreg"``."""

    name: str = "vicreg"
    invariance: float = 25.0
    variance: float = 25.0  # 0 is the paper's ablation, which collapses (its table 7)
    covariance: float = 1.0
    projector: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=3, hidden=8192, out=8192))
    views: TwoViews | DropoutViews = dataclasses.field(default_factory=TwoViews)

    def __post_init__(self):
        for name in ("invariance", "variance", "covariance"):
            check_number(name, getattr(self, name), zero=True)


def regularisers(
    x: Float[Array, "batch width"], weights: Float[Array, " batch"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """One view's part of the variance term, the mean hinge, and of the covariance term; and its mean deviation.

    Variances are over one row less than there are, as PyTorch's.
    """
    count = jnp.sum(weights)
    weights = weights[:, None]
    x = x - jnp.sum(weights * x, axis=0) / jnp.maximum(count, 1e-6)
    less = jnp.maximum(count - 1.0, 1.0)
    covariance = jnp.einsum("ni,nj->ij", weights * x, x, precision=jax.lax.Precision.HIGHEST) / less
    variance = jnp.diagonal(covariance)
    hinge = jnp.mean(jax.nn.relu(1.0 - jnp.sqrt(variance + EPS)))
    others = (jnp.sum(covariance**2) - jnp.sum(variance**2)) / x.shape[-1]
    return hinge, others, jnp.mean(jnp.sqrt(jnp.maximum(jax.lax.stop_gradient(variance), 0.0)))


@dataclasses.dataclass(frozen=True)
class Vicreg(JointEmbedding):
    """The objective of ``config.pretext.name = "vicreg"``."""

    pretext_config = VicregConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("no_learning", "collapse", "low_rank"),
        "config.pretext.variance as high as config.pretext.invariance (25 in the paper), a lower learning rate",
    )
    terms = ("invariance", "variance", "covariance")
    spreads = ("projection_std", "projection_deviation")
    unit = ""

    pretext: VicregConfig

    def compared(self, student: list[Seen], teacher: None, given: Given) -> Out:
        pretext, weights = self.pretext, given.weights
        first, second = (view.projection for view in student)
        hinges, covariances, deviations = zip(*(regularisers(x, weights) for x in (first, second)), strict=True)
        apart = jnp.mean((first - second) ** 2, axis=-1)
        several = weights * (jnp.sum(weights) >= 2)  # one row has no deviation
        return Out(
            {
                "invariance": of_rows(apart, weights, pretext.invariance),
                "variance": of_all(sum(hinges) / 2, weights, pretext.variance),
                "covariance": of_all(sum(covariances), weights, pretext.covariance),
            },
            {"projection_deviation": mean_of(jnp.full(weights.shape, sum(deviations) / 2), several)},
        )

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """Of vectors that are all the same; None without ``variance``, where that costs nothing."""
        if not self.pretext.variance:
            return None
        return self.pretext.variance * (1.0 - EPS**0.5)
