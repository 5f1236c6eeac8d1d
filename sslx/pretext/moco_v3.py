"""MoCo v3 (arXiv 2104.02057): predict a view so that a moving average of oneself knows it among those of all others.

In: two views of each row. Out: one term, the cross-entropy of telling the teacher's projection of the row's other view
from those of all rows of the global batch, by cosine over ``temperature``, times twice that (so that gradients do not
depend on it), summed over both directions. Guessing costs 2 · 2τ · ln N.

With a ``queue``, the projections of the last rows are told apart too (MoCo, arXiv 1911.05722), for batches that are
small: each update puts the teacher's projections of its second views in front. With ``predictor.layers=0`` that is
MoCo v2's loss in both directions, except that the batch is among the negatives as well.

The product is the student. A ViT's patch embedding stays as it began in the paper: ``config.optimizer.freeze``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from sslx.errors import UserError
from sslx.models.contrast import check_queue, info_nce, with_queue
from sslx.models.heads import HeadConfig
from sslx.models.pooling import unit_vectors
from sslx.models.teacher import MomentumConfig
from sslx.objective import Out, Rows
from sslx.pretext.joint import Given, JointEmbedding, check_number, mean_of, of_rows
from sslx.pretext.joint_network import Seen
from sslx.pretext.picture_views import TwoViews
from sslx.pretext.sentence_views import DropoutViews


@dataclasses.dataclass(frozen=True)
class MocoV3Config:
    """``config.pretext`` of ``name="moco_v3"``; the defaults are those for a ResNet."""

    name: str = "moco_v3"
    temperature: float = 1.0  # 0.2 for a ViT
    queue: int = 0  # projections that are kept from earlier updates; 0: none
    projector: HeadConfig = dataclasses.field(
        default_factory=lambda: HeadConfig(layers=2, hidden=4096, out=256, last_norm=True)
    )
    predictor: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=2, hidden=4096, out=256))
    momentum: MomentumConfig = dataclasses.field(default_factory=lambda: MomentumConfig(0.996, 1.0))
    views: TwoViews | DropoutViews = dataclasses.field(default_factory=TwoViews)

    def __post_init__(self):
        check_number("temperature", self.temperature)
        if self.queue < 0:
            raise UserError(f"config.pretext.queue is {self.queue}; expected at least 0")


@dataclasses.dataclass(frozen=True)
class MocoV3(JointEmbedding):
    """The objective of ``config.pretext.name = "moco_v3"``."""

    pretext_config = MocoV3Config
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("no_learning", "collapse", "low_rank"),
        "another temperature (config.pretext.temperature, mostly 0.1 to 0.5), more rows in a batch, a lower "
        "learning rate",
    )
    terms = ("contrast",)

    pretext: MocoV3Config

    @classmethod
    def check(cls, pretext: MocoV3Config, model: Any, config: Mapping[str, Any]) -> None:
        check_queue(pretext.queue, config["batch_size"])

    def memory(self, key: PRNGKeyArray) -> dict[str, Any]:
        if not self.pretext.queue:
            return {}
        width = self.pretext.projector.width(self.model.features_width)
        return {"queue": jnp.zeros((self.pretext.queue, width)), "filled": jnp.zeros((), jnp.int32)}

    def compared(self, student: list[Seen], teacher: list[Seen], given: Given) -> Out:
        weights = given.weights
        queries = [unit_vectors(view.prediction) for view in student]
        keys = [unit_vectors(view.projection) for view in teacher]
        queue, filled, stats = None, None, {}
        if self.pretext.queue:
            queue, filled = given.state["queue"], jnp.arange(self.pretext.queue) < given.state["filled"]
            stats = {"keys": Rows(jax.lax.stop_gradient(keys[1]))}
        tau, losses, hits = self.pretext.temperature, 0.0, 0.0
        for query, key in zip(queries, reversed(keys), strict=True):
            loss, hit = info_nce(query, key, queue, weights, tau, filled=filled)
            losses, hits = losses + 2 * tau * loss, hits + 0.5 * hit
        return Out({"contrast": of_rows(losses, weights)}, {"accuracy": mean_of(hits, weights)}, stats)

    def remembered(self, state: Any, stats: dict[str, Any], step: Array) -> Any:
        return with_queue(state, stats["keys"].value) if self.pretext.queue else state

    def chance(self, statistics: Mapping[str, float]) -> float:
        """Also the loss of vectors that are all the same, once the queue is full."""
        return 4 * self.pretext.temperature * math.log(self.rows_compared(statistics) + self.pretext.queue)
