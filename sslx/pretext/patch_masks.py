"""Which patches of a picture are hidden: exact counts, so that shapes are static and one program serves all masks.

And `MaskedPixels`, what pretext tasks have in common that paint hidden patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sslx.errors import UserError
from sslx.models.pixels import patchify, unpatchify
from sslx.models.vit import VitConfig
from sslx.objective import Batch, Variables
from sslx.picture_sheet import sheet
from sslx.pretext.image import ImagePretext


def hidden_count(patches: int, ratio: float) -> int:
    """How many of so many patches a share is (all but the visible ones, whose number is rounded down, as MAE's)."""
    return patches - int(patches * (1 - ratio))


def split_patches(
    keys: PRNGKeyArray, patches: int, hidden: int
) -> tuple[Int[Array, "batch visible"], Int[Array, "batch hidden"]]:
    """Visible and hidden patches of each row, drawn without replacement and each in reading order.

    MAE shuffles by the order of uniform noise (arXiv 2111.06377); which are kept is what matters, and in reading order
    they need no way back.
    """
    order = jax.vmap(lambda key: jnp.argsort(jax.random.uniform(key, (patches,))))(keys)
    visible, rest = order[:, : patches - hidden], order[:, patches - hidden :]
    return jnp.sort(visible, axis=1), jnp.sort(rest, axis=1)


def block_order(
    keys: PRNGKeyArray, grid: int, aspect: tuple[float, float] = (0.3, 1 / 0.3)
) -> Int[Array, "batch patches"]:
    """All patches of each row, those of a random rectangle first, from its middle outwards.

    The first so many are a block of that many patches, whose width over height is even in its logarithm; at the edge of
    the picture it goes on to the other sides. BEiT (arXiv 2106.08254) and iBOT lay several rectangles over each other
    until there are about as many; here the count is exact.
    """

    def one(key: PRNGKeyArray) -> Int[Array, " patches"]:
        place_key, aspect_key, tie_key = jax.random.split(key, 3)
        row, column = jnp.divmod(jnp.arange(grid**2), grid)
        middle = jax.random.uniform(place_key, (2,), minval=-0.5, maxval=grid - 0.5)
        low, high = (jnp.log(bound) for bound in aspect)
        stretch = jnp.exp(0.5 * jax.random.uniform(aspect_key, minval=low, maxval=high))
        away = jnp.maximum(jnp.abs(row - middle[0]) * stretch, jnp.abs(column - middle[1]) / stretch)
        return jnp.argsort(away + 1e-3 * jax.random.uniform(tie_key, away.shape))

    return jax.vmap(one)(keys)


def check_ratio(ratio: float, patches: int, option: str) -> None:
    """Refuses a share that hides no patch or all.

    Raises:
      UserError: it does.
    """
    if not 0 < ratio < 1 or not 0 < hidden_count(patches, ratio) < patches:
        raise UserError(f"{option} is {ratio} of {patches} patches; expected a share that hides some and leaves some")


def reconstructed(
    batch: Batch, predicted: Float[Array, "batch hidden values"], patch_size: int
) -> dict[str, Float[Array, "batch height width channels"]]:
    """Columns of a sheet: the pictures, these with grey in the hidden places, and with what was predicted there."""
    patches = patchify(batch["image"], patch_size)
    rows = jnp.arange(len(patches))[:, None]
    masked = patches.at[rows, batch["hidden"]].set(0.5)
    painted = patches.at[rows, batch["hidden"]].set(jnp.clip(predicted, 0.0, 1.0))
    pictures = {"picture": patches, "masked": masked, "reconstruction": painted}
    return {name: unpatchify(of, patch_size) for name, of in pictures.items()}


def masked_pictures(
    batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray], patch_size: int
) -> dict[str, np.ndarray]:
    """Columns of a sheet: the picture, its view, and the view with what is hidden in grey."""
    patches = np.array(patchify(viewed["image"], patch_size))
    patches[np.arange(len(patches))[:, None], viewed["hidden"]] = 0.5
    return {"picture": batch["image"], "view": viewed["image"], "masked": np.asarray(unpatchify(patches, patch_size))}


@dataclasses.dataclass(frozen=True)
class MaskedPixels(ImagePretext):
    """A pretext task that paints the patches in ``batch["hidden"]``."""

    unit = ""

    model: VitConfig

    @property
    def module(self) -> Any:
        """The Linen module: from a viewed batch to what is painted in hidden patches."""
        raise NotImplementedError

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        viewed = self.views(batch, key, jnp.zeros((), jnp.int32), train=False)
        params = self.module.init(key, viewed, deterministic=True)["params"]
        return {"params": params | self.whole_encoder(key, viewed), "state": {}}

    def pictures(self, predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"reconstructions": sheet(predictions, across=2)}

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return {"views": sheet(masked_pictures(batch, viewed, self.model.patch_size))}
