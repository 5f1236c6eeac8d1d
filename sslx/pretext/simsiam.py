"""SimSiam (arXiv 2011.10566): predict one view's projection from the other's, which takes no gradient.

In: two views of each row. Out: one term, minus the cosine of prediction and target, the mean of both directions. It is
-1 if all vectors are the same, as without ``stop_gradient`` they soon are; so the loss says nothing by itself, and
``projection_std`` is what to watch. The authors train the predictor at a constant learning rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from sslx.models.heads import HeadConfig
from sslx.objective import Out
from sslx.pretext.byol import cosine
from sslx.pretext.joint import Given, JointEmbedding, of_rows
from sslx.pretext.joint_network import Seen
from sslx.pretext.picture_views import SIMCLR, TwoViews
from sslx.pretext.sentence_views import DropoutViews

# SimCLR's with half the jitter and crops of at least a fifth (their appendix A).
WEAKER = dataclasses.replace(
    SIMCLR, crop_area=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.5
)


@dataclasses.dataclass(frozen=True)
class SimSiamConfig:
    """``config.pretext`` of ``name="simsiam"``."""

    name: str = "simsiam"
    stop_gradient: bool = True  # False is the paper's ablation, which collapses (its table 1)
    projector: HeadConfig = dataclasses.field(
        default_factory=lambda: HeadConfig(layers=3, hidden=2048, out=2048, last_norm=True)
    )
    predictor: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=2, hidden=512, out=2048))
    views: TwoViews | DropoutViews = dataclasses.field(default_factory=lambda: TwoViews(WEAKER, WEAKER))


def simsiam_loss(
    predictions: list[Float[Array, "batch width"]], projections: list[Float[Array, "batch width"]]
) -> Float[Array, " batch"]:
    """Minus the cosine between each view's prediction and the other's projection, the mean of both directions."""
    (first, second), (of_first, of_second) = predictions, projections
    return -0.5 * (cosine(first, of_second) + cosine(second, of_first))


@dataclasses.dataclass(frozen=True)
class SimSiam(JointEmbedding):
    """The objective of ``config.pretext.name = "simsiam"``."""

    pretext_config = SimSiamConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("collapse", "low_rank"),
        "config.pretext.stop_gradient=True, config.pretext.predictor.layers=2 at a constant rate, "
        "config.pretext.projector.last_norm=True, a lower learning rate",
    )
    terms = ("similarity",)
    across = False
    unit = ""

    pretext: SimSiamConfig

    def compared(self, student: list[Seen], teacher: None, given: Given) -> Out:
        weights = given.weights
        targets = [view.projection for view in student]
        targets = jax.lax.stop_gradient(targets) if self.pretext.stop_gradient else targets
        losses = simsiam_loss([view.prediction for view in student], targets)
        return Out({"similarity": of_rows(losses, weights)})

    def chance(self, statistics: Mapping[str, float]) -> float:
        """Of vectors that have nothing to do with each other; collapsed ones have -1."""
        return 0.0
