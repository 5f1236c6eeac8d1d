"""What data2vec and I-JEPA on pictures share: a teacher of the whole encoder, and targets made of its features.

The teacher is a moving average of the student's encoder and takes no gradient; there is no chance value, as what a
constant errs by moves with the teacher (see `latent_targets.explained`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from sslx.data.images import ImageConfig
from sslx.models.teacher import followed
from sslx.models.vit import VitConfig
from sslx.objective import Batch, Variables
from sslx.pretext.image import ImagePretext
from sslx.pretext.latent_targets import explained


@dataclasses.dataclass(frozen=True)
class LatentPictures(ImagePretext):
    """Prediction of a teacher's features; ``pretext`` has ``momentum`` and ``augment``, ``module`` an ``encoder``."""

    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("collapse", "low_rank"),
        "a teacher that follows more slowly (config.pretext.momentum.start nearer to 1), a lower learning rate",
    )
    spreads = ("target_std",)
    unit = ""

    model: VitConfig
    steps: int = 1  # of the schedule

    @classmethod
    def _built(cls, config: Mapping[str, Any]) -> tuple[Self, ImageConfig]:
        objective, data = super()._built(config)
        # A run that goes on longer keeps the schedule that it was started with.
        steps = config["optimizer"]["schedule_steps"] or config["steps"]
        return dataclasses.replace(objective, steps=steps), data

    @property
    def module(self) -> Any:
        """The Linen module of what is trained."""
        raise NotImplementedError

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        viewed = self.views(batch, key, jnp.zeros((), jnp.int32), train=False)
        params = self.module.init(key, viewed, deterministic=True)["params"] | self.whole_encoder(key, viewed)
        # A copy: the step donates both, and one buffer cannot be given twice.
        return {"params": params, "state": {"teacher": jax.tree.map(jnp.copy, params["encoder"])}}

    def after_update(self, params: Any, state: Any, stats: dict, key: PRNGKeyArray, step: Array) -> Any:
        momentum = self.pretext.momentum.at(step, self.steps)
        return {"teacher": followed(state["teacher"], params["encoder"], momentum, step)}

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return explained(metrics)
