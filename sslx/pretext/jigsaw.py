"""Jigsaw (Noroozi and Favaro, arXiv 1603.09246): in which order have nine pieces of the picture been laid?

In: pictures. Views: a random crop cut in nine with gaps and jitter, each piece brought to the encoder's size and to one
mean and spread, in one of a fixed set of far apart permutations. Out: one cross-entropy term over permutations. All
pieces go through the same encoder, which sees no other; a small network on their features names the permutation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from sslx.augment.pieces import SIDE, cut_pieces, distant_permutations
from sslx.augment.policy import AugmentConfig
from sslx.errors import UserError
from sslx.picture_sheet import sheet
from sslx.pretext.image import ContextTask
from sslx.pretext.relative_patch import PieceComparison, check_pieces, standardised


@dataclasses.dataclass(frozen=True)
class JigsawConfig:
    """``config.pretext`` of ``name="jigsaw"``."""

    name: str = "jigsaw"
    permutations: int = 1000
    piece_share: float = 0.85  # side of a piece as a share of its ninth: theirs are 64 pixels of 75
    head_width: int = 256
    augment: AugmentConfig = dataclasses.field(default_factory=lambda: AugmentConfig(grey=0.3))

    def __post_init__(self):
        check_pieces(self.piece_share, self.head_width)
        if not 2 <= self.permutations <= 5000:
            raise UserError(f"config.pretext.permutations is {self.permutations}; expected 2 to 5000")


@functools.cache
def permutations(count: int) -> Int[np.ndarray, "count 9"]:
    """The set of a run: a function of its size alone."""
    return distant_permutations(count)


@dataclasses.dataclass(frozen=True)
class Jigsaw(ContextTask):
    """The objective of ``config.pretext.name = "jigsaw"``."""

    pretext_config = JigsawConfig
    remedies: ClassVar[Mapping[str, str]] = {
        "no_learning": "fewer config.pretext.permutations, more steps, a learning rate ten times higher or lower"
    }

    pretext: JigsawConfig

    encoded = SIDE**2

    @property
    def module(self) -> PieceComparison:
        """The Linen module."""
        return PieceComparison(self.model, self.pretext.head_width, self.pretext.permutations)

    def pieces(self, images: Array, keys: PRNGKeyArray) -> tuple[Array, Array]:
        cut_keys, pick_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        pieces = cut_pieces(images, cut_keys, size=self.model.image_size, share=self.pretext.piece_share)
        table = jnp.asarray(permutations(self.pretext.permutations))
        answer = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(table)))(pick_keys)
        laid = jnp.take_along_axis(standardised(pieces), table[answer][..., None, None, None], axis=1)
        return laid, answer[:, None]

    def chance(self, statistics: Mapping[str, float]) -> float:
        return math.log(self.pretext.permutations)

    def head_flops(self, rows: int) -> float:
        width = self.encoded * self.model.features_width + self.pretext.permutations
        return 2.0 * rows * self.pretext.head_width * width

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        pieces = {str(place + 1): viewed["pieces"][:, place] for place in range(SIDE**2)}
        return {"views": sheet({"picture": batch["image"], **pieces})}
