"""SwAV (arXiv 2006.09882): from one crop, tell the cluster that another crop of the picture was assigned to.

In: two large crops and some small ones of each row. Out: one term, the cross-entropy between a large crop's assignment
and another crop's softmax over cosines with learned prototypes, over ``temperature``, the mean over all such pairs.
Assignments are the same cosines balanced by Sinkhorn over the whole batch, so that all prototypes are used alike:
without (``balance=False``), one takes everything. Guessing costs ln K.

With a ``queue``, projections of the last rows are balanced with those of the batch, from ``queue_start`` on: needed
where a batch has fewer rows than there are prototypes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.errors import UserError
from sslx.models.assignment import entropy, sinkhorn
from sslx.models.contrast import check_queue, with_queue
from sslx.models.heads import HeadConfig, Prototypes
from sslx.models.pooling import unit_vectors
from sslx.objective import Out, Rows
from sslx.pretext.dino import check_prototypes, dino_loss
from sslx.pretext.joint import JointEmbedding, check_number, mean_of, of_rows
from sslx.pretext.joint_network import Seen
from sslx.pretext.picture_views import SIMCLR, MultiCrop
from sslx.pretext.sentence_views import DropoutViews

LARGE = dataclasses.replace(SIMCLR, crop_area=(0.14, 1.0))
SMALL = dataclasses.replace(SIMCLR, crop_area=(0.05, 0.14))
LARGE_CROPS = 2
SHARE = 8  # prototypes to a row that a batch without a queue may have


@dataclasses.dataclass(frozen=True)
class SwavConfig:
    """``config.pretext`` of ``name="swav"``."""

    name: str = "swav"
    prototypes: int = 3000
    frozen_steps: int = 0  # first updates in which prototypes stay; an epoch in the authors' code
    temperature: float = 0.1
    epsilon: float = 0.05  # the assignments' temperature
    iterations: int = 3  # Sinkhorn's
    balance: bool = True  # False: assignments as they are, which collapses
    queue: int = 0  # rows of earlier updates that are balanced with those of the batch; 0: none
    queue_start: int = 0  # updates before they are
    projector: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=2, hidden=2048, out=128))
    views: MultiCrop | DropoutViews = dataclasses.field(
        default_factory=lambda: MultiCrop(LARGE, LARGE, SMALL, local_count=6, local_size=96)
    )

    def __post_init__(self):
        check_prototypes(self.prototypes, self.frozen_steps)
        check_number("temperature", self.temperature)
        check_number("epsilon", self.epsilon)
        if self.iterations < 1:
            raise UserError(f"config.pretext.iterations is {self.iterations}; expected at least 1")
        if min(self.queue, self.queue_start) < 0:
            raise UserError(
                f"config.pretext.queue is {self.queue} from update {self.queue_start} on; expected at least 0 of both"
            )


@dataclasses.dataclass(frozen=True)
class Swav(JointEmbedding):
    """The objective of ``config.pretext.name = "swav"``."""

    pretext_config = SwavConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("no_learning", "uniform"),
        "a lower config.pretext.epsilon (0.03 to 0.05), fewer config.pretext.prototypes or more rows to share them, "
        "prototypes that stay at first (config.pretext.frozen_steps), another learning rate",
    ) | dict.fromkeys(
        ("collapse", "low_rank", "peaked"),
        "config.pretext.balance=True, prototypes that stay at first (config.pretext.frozen_steps), a lower learning "
        "rate",
    )
    terms = ("swapped",)
    together = True

    pretext: SwavConfig

    @property
    def across(self) -> bool:
        return self.pretext.balance

    @property
    def balanced(self) -> bool:
        return self.pretext.balance

    @classmethod
    def check(cls, pretext: SwavConfig, model: Any, config: Mapping[str, Any]) -> None:
        check_queue(pretext.queue, config["batch_size"])
        rows = pretext.queue + config["batch_size"]
        if pretext.balance and not pretext.queue and rows * SHARE < pretext.prototypes:
            raise UserError(
                f"config.batch_size {rows} is too small for config.pretext.prototypes {pretext.prototypes} without a "
                f"queue: balanced over so many, rows get shares that say nothing; expected at most {rows * SHARE} "
                f"prototypes, or config.pretext.queue, such as {15 * config['batch_size']}"
            )

    def memory(self, key: PRNGKeyArray) -> dict[str, Any]:
        if not self.pretext.queue:
            return {}
        width = self.pretext.projector.width(self.model.features_width)
        return {"queue": jnp.zeros((self.pretext.queue, LARGE_CROPS, width)), "filled": jnp.zeros((), jnp.int32)}

    def compared(self, student: list[Seen], teacher: None, given: Given) -> Out:
        weights, large = given.weights, student[:LARGE_CROPS]
        targets = [self.assigned(view.scores, number, given) for number, view in enumerate(large)]
        losses = dino_loss([view.scores for view in student], targets, self.pretext.temperature)
        stats = {}
        if self.pretext.queue:
            kept = [unit_vectors(view.projection) for view in large]
            stats = {"projections": Rows(jax.lax.stop_gradient(jnp.stack(kept, axis=1)))}
        certain = sum(map(entropy, targets)) / len(targets)
        metrics = {"target_entropy": mean_of(certain, weights), "target_kl": mean_of(losses - certain, weights)}
        return Out({"swapped": of_rows(losses, weights)}, metrics, stats)

    def assigned(
        self, scores: Float[Array, "batch prototypes"], number: int, given: Given
    ) -> Float[Array, "batch prototypes"]:
        """A large crop's shares of the prototypes, balanced by itself as in the authors' code; no gradient."""
        pretext, weights = self.pretext, given.weights
        if not pretext.balance:
            return jax.lax.stop_gradient(jax.nn.softmax(scores / pretext.epsilon))
        if not pretext.queue:
            return sinkhorn(scores, weights, pretext.epsilon, pretext.iterations)
        prototypes = Prototypes(pretext.prototypes)
        earlier = prototypes.apply({"params": given.params["prototypes"]}, given.state["queue"][:, number])
        # All of it or none: a part of it would be weighed as if it were all rows that there were.
        ready = (given.state["filled"] == pretext.queue) & (given.step >= pretext.queue_start)
        there = jnp.concatenate([weights, jnp.full(len(earlier), ready, jnp.float32)])
        shares = sinkhorn(jnp.concatenate([scores, earlier]), there, pretext.epsilon, pretext.iterations)
        return shares[: len(scores)]

    def remembered(self, state: Any, stats: dict[str, Any], step: Array) -> Any:
        return with_queue(state, stats["projections"].value) if self.pretext.queue else state

    def entropies(self) -> Mapping[str, tuple[float, str]]:
        return {"target_entropy": (math.log(self.pretext.prototypes), "target_kl")}

    def chance(self, statistics: Mapping[str, float]) -> float:
        """Also the loss of cosines that are all alike, where balanced assignments are, too."""
        return math.log(self.pretext.prototypes)
