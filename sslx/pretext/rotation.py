"""Rotation (RotNet, arXiv 1803.07728): by how many quarters has the picture been turned?

In: pictures. Views: a random crop, in all four turns, which stay together as in the published code. Out: one
cross-entropy term over four classes, a mean over turns and pictures. To tell, one has to know what is depicted and how
it usually stands; where up is no different from down, nothing can be learned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.augment.policy import AugmentConfig
from sslx.models.image import ImageModel
from sslx.models.layers import Dense
from sslx.objective import Batch
from sslx.picture_sheet import sheet
from sslx.pretext.image import ContextTask

TURNS = 4


@dataclasses.dataclass(frozen=True)
class RotationConfig:
    """``config.pretext`` of ``name="rotation"``."""

    name: str = "rotation"
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)


class RotationModel(nn.Module):
    """Encoder and a dense layer on its features."""

    config: ImageModel

    def setup(self):
        self.encoder = self.config.encoder()
        self.head = Dense(TURNS, ("embed", "types"))

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch 4 classes"]:
        turned = batch["pieces"].reshape(-1, *batch["pieces"].shape[2:])
        logits = self.head(self.encoder.features({"image": turned}, deterministic=deterministic))
        return logits.reshape(-1, TURNS, TURNS).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Rotation(ContextTask):
    """The objective of ``config.pretext.name = "rotation"``."""

    pretext_config = RotationConfig

    pretext: RotationConfig

    encoded = TURNS

    @property
    def module(self) -> RotationModel:
        """The Linen module."""
        return RotationModel(self.model)

    def pieces(self, images: Array, keys: PRNGKeyArray) -> tuple[Array, Array]:
        turned = jnp.stack([jnp.rot90(images, turn, axes=(1, 2)) for turn in range(TURNS)], axis=1)
        return turned, jnp.broadcast_to(jnp.arange(TURNS), turned.shape[:2])

    def chance(self, statistics: Mapping[str, float]) -> float:
        return math.log(TURNS)

    def head_flops(self, rows: int) -> float:
        return 2.0 * rows * TURNS * self.model.features_width * TURNS

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        turns = {f"{90 * turn} degrees": viewed["pieces"][:, turn] for turn in range(TURNS)}
        return {"views": sheet({"picture": batch["image"], **turns})}
