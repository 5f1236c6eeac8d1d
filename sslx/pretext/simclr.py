"""SimCLR (arXiv 2002.05709): tell a picture's other view from those of all other pictures of the batch.

In: two views of each row. Out: one term, NT-Xent over both directions: the cross-entropy, among the 2N - 1 other views
of the whole batch, of the one of the same row, by cosine over ``temperature``. Guessing costs ln(2N - 1). Encoder and
projector see both views as one batch, whose mean and variance normalise them, as in the authors' code.

The projector's last layer has no batch normalisation, as the paper draws it; the authors' code has one there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from sslx.models.contrast import nt_xent
from sslx.models.heads import HeadConfig
from sslx.models.pooling import unit_vectors
from sslx.objective import Out
from sslx.pretext.joint import Given, JointEmbedding, check_number, mean_of, of_rows
from sslx.pretext.joint_network import Seen
from sslx.pretext.picture_views import SIMCLR, TwoViews
from sslx.pretext.sentence_views import DropoutViews


@dataclasses.dataclass(frozen=True)
class SimClrConfig:
    """``config.pretext`` of ``name="simclr"``."""

    name: str = "simclr"
    temperature: float = 0.1
    projector: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=2, hidden=2048, out=128))
    views: TwoViews | DropoutViews = dataclasses.field(default_factory=lambda: TwoViews(SIMCLR, SIMCLR))

    def __post_init__(self):
        check_number("temperature", self.temperature)


@dataclasses.dataclass(frozen=True)
class SimClr(JointEmbedding):
    """The objective of ``config.pretext.name = "simclr"``."""

    pretext_config = SimClrConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("no_learning", "collapse", "low_rank"),
        "another temperature (config.pretext.temperature, mostly 0.1 to 0.5), more rows in a batch, a lower "
        "learning rate",
    )
    terms = ("contrast",)
    together = True

    pretext: SimClrConfig

    def compared(self, student: list[Seen], teacher: None, given: Given) -> Out:
        weights = given.weights
        first, second = (unit_vectors(view.projection) for view in student)
        losses, hits = nt_xent(first, second, weights, self.pretext.temperature)
        return Out({"contrast": of_rows(losses, weights)}, {"accuracy": mean_of(hits, weights)})

    def chance(self, statistics: Mapping[str, float]) -> float:
        """Also the loss of vectors that are all the same."""
        return math.log(2 * self.rows_compared(statistics) - 1)
