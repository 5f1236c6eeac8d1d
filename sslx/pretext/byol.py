"""BYOL (arXiv 2006.07733): predict, from one view, what a moving average of oneself makes of the other.

In: two views of each row. Out: one term, 2 - 2 cos of prediction and target, *summed* over both directions: averaging
them would halve the gradients. It is 0 if all vectors are the same, which nothing in the loss forbids: what keeps it
from there is the predictor together with a teacher that takes no gradient. So the loss says nothing by itself, and
``projection_std`` is what to watch.

The product is the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.models.heads import HeadConfig
from sslx.models.pooling import unit_vectors
from sslx.models.teacher import MomentumConfig
from sslx.objective import Out
from sslx.pretext.joint import Given, JointEmbedding, of_rows
from sslx.pretext.joint_network import Seen
from sslx.pretext.picture_views import TwoViews
from sslx.pretext.sentence_views import DropoutViews


@dataclasses.dataclass(frozen=True)
class ByolConfig:
    """``config.pretext`` of ``name="byol"``."""

    name: str = "byol"
    projector: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=2, hidden=4096, out=256))
    predictor: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=2, hidden=4096, out=256))
    momentum: MomentumConfig = dataclasses.field(default_factory=lambda: MomentumConfig(0.996, 1.0))
    views: TwoViews | DropoutViews = dataclasses.field(default_factory=TwoViews)


def cosine(one: Float[Array, "batch width"], other: Float[Array, "batch width"]) -> Float[Array, " batch"]:
    """Of each row's two vectors."""
    return jnp.sum(unit_vectors(one) * unit_vectors(other), axis=-1)


def byol_loss(
    predictions: list[Float[Array, "batch width"]], targets: list[Float[Array, "batch width"]]
) -> Float[Array, " batch"]:
    """2 - 2 cos between each view's prediction and the other's target, summed over both directions."""
    (first, second), (of_first, of_second) = predictions, targets
    return 4.0 - 2.0 * (cosine(first, of_second) + cosine(second, of_first))


@dataclasses.dataclass(frozen=True)
class Byol(JointEmbedding):
    """The objective of ``config.pretext.name = "byol"``."""

    pretext_config = ByolConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("collapse", "low_rank"),
        "a teacher that follows more slowly (config.pretext.momentum.start nearer to 1), "
        "config.pretext.predictor.layers=2, batch normalisation in both heads, a lower learning rate",
    )
    terms = ("distance",)
    across = False
    unit = ""

    pretext: ByolConfig

    def compared(self, student: list[Seen], teacher: list[Seen], given: Given) -> Out:
        weights = given.weights
        losses = byol_loss([view.prediction for view in student], [view.projection for view in teacher])
        return Out({"distance": of_rows(losses, weights)})

    def chance(self, statistics: Mapping[str, float]) -> float:
        """Of vectors that have nothing to do with each other; collapsed ones have 0."""
        return 4.0
