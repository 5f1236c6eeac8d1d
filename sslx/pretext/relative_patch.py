"""Relative patch position (Doersch et al., arXiv 1505.05192): where does this piece lie, seen from the middle one?

In: pictures. Views: a random crop cut in nine with gaps and jitter, each piece brought to the encoder's size and to one
mean and spread; the middle piece and one of its eight neighbours. Out: one cross-entropy term over eight places. Both
pieces go through the same encoder; a small network compares their features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.augment.pieces import SIDE, cut_pieces
from sslx.augment.policy import AugmentConfig
from sslx.errors import UserError
from sslx.models.image import ImageModel
from sslx.models.layers import Dense
from sslx.objective import Batch
from sslx.picture_sheet import sheet
from sslx.pretext.image import ContextTask

NEIGHBOURS = SIDE**2 - 1
MIDDLE = NEIGHBOURS // 2
LEAST = 0.02  # deviation of a piece on which there is something to see


@dataclasses.dataclass(frozen=True)
class RelativePatchConfig:
    """``config.pretext`` of ``name="relative_patch"``."""

    name: str = "relative_patch"
    piece_share: float = 0.67  # side of a piece as a share of its ninth: theirs of 96 pixels lie 48 apart
    head_width: int = 256
    # Greys hide the shift between the colours of a lens, from which a network can tell the place (their section 3.1);
    # theirs drop colours of all pictures. Two thirds keep the encoder used to colours (arXiv 1901.09005's code).
    augment: AugmentConfig = dataclasses.field(default_factory=lambda: AugmentConfig(grey=0.66))

    def __post_init__(self):
        check_pieces(self.piece_share, self.head_width)


def check_pieces(share: float, head_width: int) -> None:
    """Refuses what both tasks on pieces have no use for.

    Raises:
      UserError: a share that is none, or a head without width.
    """
    if not 0 < share <= 1:
        raise UserError(f"config.pretext.piece_share is {share}; expected a share above 0, at most 1")
    if head_width < 1:
        raise UserError(f"config.pretext.head_width is {head_width}; expected at least 1")


def standardised(pieces: Array) -> Array:
    """Each piece with mean 1/2 and deviation 1/4: else brightness and contrast tell which pieces are neighbours.

    The noise of a nearly blank piece, one with a deviation below `LEAST`, is not blown up to that.
    """
    mean, spread = (of(pieces, axis=(2, 3), keepdims=True) for of in (jnp.mean, jnp.std))
    return 0.5 + 0.25 * (pieces - mean) / jnp.maximum(spread, LEAST)


class PieceComparison(nn.Module):
    """The encoder on every piece, and a network on all their features together."""

    config: ImageModel
    head_width: int
    classes: int

    def setup(self):
        self.encoder = self.config.encoder()
        self.hidden = Dense(self.head_width, ("embed", "mlp"))
        self.head = Dense(self.classes, ("mlp", "types"))

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch 1 classes"]:
        pieces = batch["pieces"]
        x = self.encoder.features({"image": pieces.reshape(-1, *pieces.shape[2:])}, deterministic=deterministic)
        x = nn.relu(self.hidden(x.reshape(pieces.shape[0], -1)))
        return self.head(x)[:, None].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class RelativePatch(ContextTask):
    """The objective of ``config.pretext.name = "relative_patch"``."""

    pretext_config = RelativePatchConfig

    pretext: RelativePatchConfig

    encoded = 2

    @property
    def module(self) -> PieceComparison:
        """The Linen module."""
        return PieceComparison(self.model, self.pretext.head_width, NEIGHBOURS)

    def pieces(self, images: Array, keys: PRNGKeyArray) -> tuple[Array, Array]:
        cut_keys, pick_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        pieces = cut_pieces(images, cut_keys, size=self.model.image_size, share=self.pretext.piece_share)
        place = jax.vmap(lambda key: jax.random.randint(key, (), 0, NEIGHBOURS))(pick_keys)
        neighbour = place + (place >= MIDDLE)
        pair = jnp.stack([jnp.full_like(neighbour, MIDDLE), neighbour], axis=1)
        return standardised(jnp.take_along_axis(pieces, pair[..., None, None, None], axis=1)), place[:, None]

    def chance(self, statistics: Mapping[str, float]) -> float:
        return math.log(NEIGHBOURS)

    def head_flops(self, rows: int) -> float:
        return 2.0 * rows * self.pretext.head_width * (self.encoded * self.model.features_width + NEIGHBOURS)

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        pieces = viewed["pieces"]
        return {"views": sheet({"picture": batch["image"], "middle": pieces[:, 0], "neighbour": pieces[:, 1]})}

    def preview(self, batch: Mapping[str, Any], viewed: Mapping[str, Any]) -> list[dict[str, str]]:
        names = [f"{down} {across}".strip() for down in ("above", "", "below") for across in ("left", "", "right")]
        del names[MIDDLE]
        return [{"neighbour lies": names[int(place)]} for place in viewed["answer"][:, 0]]
