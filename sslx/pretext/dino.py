"""DINO (arXiv 2104.14294): say of any crop what a moving average of oneself says of the large ones.

In: two large crops and some small ones of each row. Out: one term, the cross-entropy between the teacher's shares of
the prototypes for a large crop and the student's for another crop, the mean over all such pairs. The teacher's scores
lose their centre, a running mean over the global batch (or are balanced by Sinkhorn, as DINOv2's), and are sharpened:
centring alone would make all shares alike, which costs ln K as guessing does; sharpening alone would let one prototype
take all, which costs 0. ``teacher_entropy`` tells which: ln K or 0.

Prototypes are unit vectors, on bottleneck vectors of length 1; they take no gradient in the first ``frozen_steps``.
The product is the teacher.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.errors import UserError, choose
from sslx.models.assignment import centre_moved, centred, cross_entropy, entropy, sinkhorn
from sslx.models.heads import HeadConfig
from sslx.models.teacher import MomentumConfig, between
from sslx.objective import Out, Sum
from sslx.pretext.joint import Given, JointEmbedding, check_number, mean_of, of_rows
from sslx.pretext.joint_network import Seen
from sslx.pretext.picture_views import MultiCrop
from sslx.pretext.sentence_views import DropoutViews

STABLE = 0.07  # the highest teacher temperature that trains from the first step (the paper's appendix D)


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """``config.pretext`` of ``name="dino"``."""

    name: str = "dino"
    balance: str = "centre"  # centre | sinkhorn | none, which collapses
    prototypes: int = 65536
    frozen_steps: int = 0  # first updates in which prototypes stay; an epoch in the paper
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    teacher_temperature_start: float = 0.04  # from which it rises in a line
    teacher_temperature_steps: int = 0  # over so many updates; 0: it never changes
    centre_momentum: float = 0.9
    projector: HeadConfig = dataclasses.field(
        default_factory=lambda: HeadConfig(layers=3, hidden=2048, out=256, norm=False, activation="gelu")
    )
    momentum: MomentumConfig = dataclasses.field(default_factory=lambda: MomentumConfig(0.996, 1.0))
    views: MultiCrop | DropoutViews = dataclasses.field(default_factory=MultiCrop)

    def __post_init__(self):
        choose(self.balance, ("centre", "sinkhorn", "none"), "config.pretext.balance")
        check_prototypes(self.prototypes, self.frozen_steps)
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            check_number(name, getattr(self, name))
        if not 0 <= self.centre_momentum < 1:
            raise UserError(f"config.pretext.centre_momentum is {self.centre_momentum}; expected 0 or a share below 1")
        if (
            self.teacher_temperature_start != DinoConfig.teacher_temperature_start
            and not self.teacher_temperature_steps
        ):
            raise UserError(
                f"config.pretext.teacher_temperature_start is {self.teacher_temperature_start:g}, and there are no "
                "config.pretext.teacher_temperature_steps over which it rises; expected some"
            )
        if self.teacher_temperature_steps < 0:
            raise UserError(
                f"config.pretext.teacher_temperature_steps is {self.teacher_temperature_steps}; expected at least 0"
            )
        first = self.teacher_temperature_start if self.teacher_temperature_steps else self.teacher_temperature
        if first > STABLE:
            raise UserError(
                f"the teacher's temperature is {first:g} at first; above {STABLE:g} DINO does not get off the ground: "
                f"expected config.pretext.teacher_temperature_start of at most that, rising over "
                f"config.pretext.teacher_temperature_steps"
            )

    def teacher_temperature_at(self, step: Array) -> Float[Array, ""] | float:
        """The teacher's temperature in an update."""
        if not self.teacher_temperature_steps:
            return self.teacher_temperature
        start, end = self.teacher_temperature_start, self.teacher_temperature
        return between(start, end, step, self.teacher_temperature_steps, "linear")


def check_prototypes(prototypes: int, frozen_steps: int) -> None:
    """Refuses fewer prototypes than there is a choice between.

    Raises:
      UserError: there are, or a negative number of steps.
    """
    if prototypes < 2:
        raise UserError(f"config.pretext.prototypes is {prototypes}; expected at least 2")
    if frozen_steps < 0:
        raise UserError(f"config.pretext.frozen_steps is {frozen_steps}; expected at least 0")


def dino_loss(
    scores: list[Float[Array, "batch prototypes"]],
    targets: list[Float[Array, "batch prototypes"]],
    student_temperature: float,
) -> Float[Array, " batch"]:
    """The mean cross-entropy over all pairs of a target and another view's scores.

    Args:
      scores: The student's, of all views.
      targets: The teacher's shares of the first views.
      student_temperature: Divides the scores.
    """
    pairs = [(q, p) for number, q in enumerate(targets) for other, p in enumerate(scores) if other != number]
    return sum(cross_entropy(q, p / student_temperature) for q, p in pairs) / len(pairs)


@dataclasses.dataclass(frozen=True)
class Dino(JointEmbedding):
    """The objective of ``config.pretext.name = "dino"``."""

    pretext_config = DinoConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("no_learning", "uniform"),
        "a lower config.pretext.teacher_temperature (0.04 or less), a teacher that follows faster in a short run "
        "(config.pretext.momentum.start 0.9 to 0.99), prototypes that stay at first (config.pretext.frozen_steps)",
    ) | dict.fromkeys(
        ("collapse", "low_rank", "peaked"),
        "config.pretext.balance=centre or sinkhorn, a higher config.pretext.teacher_temperature (0.04 to 0.07)",
    )
    terms = ("distillation",)
    together = True
    product = "teacher"
    least_rows = 1

    pretext: DinoConfig

    @property
    def across(self) -> bool:
        return self.pretext.balance == "sinkhorn"

    @property
    def balanced(self) -> bool:
        return self.pretext.balance == "sinkhorn"

    def memory(self, key: PRNGKeyArray) -> dict[str, Any]:
        return {"centre": jnp.zeros(self.pretext.prototypes)} if self.pretext.balance == "centre" else {}

    def targets(
        self, scores: list[Float[Array, "batch prototypes"]], given: Given
    ) -> list[Float[Array, "batch prototypes"]]:
        """The teacher's shares of its views; all of these are balanced at once."""
        temperature = self.pretext.teacher_temperature_at(given.step)
        if self.pretext.balance == "sinkhorn":
            shares = sinkhorn(jnp.concatenate(scores), jnp.tile(given.weights, len(scores)), temperature)
            return jnp.split(shares, len(scores))
        return [centred(each, given.state.get("centre", 0.0), temperature) for each in scores]

    def compared(self, student: list[Seen], teacher: list[Seen], given: Given) -> Out:
        weights = given.weights
        scores = [view.scores for view in teacher]
        targets = self.targets(scores, given)
        losses = dino_loss([view.scores for view in student], targets, self.pretext.student_temperature)
        certain = sum(map(entropy, targets)) / len(targets)
        metrics = {"teacher_entropy": mean_of(certain, weights), "teacher_kl": mean_of(losses - certain, weights)}
        return Out({"distillation": of_rows(losses, weights)}, metrics, self.seen(scores, weights))

    def seen(self, scores: list[Float[Array, "batch prototypes"]], weights: Array) -> dict[str, Sum]:
        """What moves the centre."""
        if self.pretext.balance != "centre":
            return {}
        total = sum(jnp.sum(weights[:, None] * each, axis=0) for each in scores)
        return {"centre": Sum({"total": jax.lax.stop_gradient(total), "count": len(scores) * jnp.sum(weights)})}

    def remembered(self, state: Any, stats: dict[str, Any], step: Array) -> Any:
        if "centre" not in stats:
            return state
        moved = centre_moved(state["centre"], **stats["centre"].value, momentum=self.centre_momentum_at(step))
        return {**state, "centre": moved}

    def centre_momentum_at(self, step: Array) -> Float[Array, ""]:
        """How much of a centre stays in an update: nothing in the first.

        The authors' centre starts at 0 and settles while their learning rate rises over 12,500 updates. In a short
        run what all rows have in common would be the target meanwhile, and taken away once the student has learned it.
        """
        return jnp.where(step == 0, 0.0, self.pretext.centre_momentum)

    def entropies(self) -> Mapping[str, tuple[float, str]]:
        return {"teacher_entropy": (math.log(self.pretext.prototypes), "teacher_kl")}

    def chance(self, statistics: Mapping[str, float]) -> float:
        """Also the loss of shares that are all alike."""
        return math.log(self.pretext.prototypes)
