"""Pictures as numbers: pixels in [0, 1], and as patches in reading order."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sslx.errors import UserError


def unit(image: Array) -> Float[Array, "..."]:
    """Pixels as float32 in [0, 1]; what is no integer is taken to be that already."""
    return image.astype(jnp.float32) / 255.0 if jnp.issubdtype(image.dtype, jnp.integer) else image


def normalised(image: Array, mean: Sequence[float], std: Sequence[float]) -> Float[Array, "..."]:
    """Pixels, float32, less the mean of their channel and over its deviation (or one of each for all channels)."""
    return (unit(image) - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def check_pixels(channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuses ``config.model.pixel_mean`` and ``pixel_std`` that do not fit the channels.

    Raises:
      UserError: they do not, or a deviation is not above 0.
    """
    for name, values in {"pixel_mean": mean, "pixel_std": std}.items():
        if len(values) not in (1, channels):
            raise UserError(f"config.model.{name} has {len(values)} values for {channels} channels")
    if not min(std) > 0:
        raise UserError(f"config.model.pixel_std is {tuple(std)}; expected more than 0")


def patchify(
    image: Float[Array, "batch height width channels"], size: int
) -> Float[Array, "batch patches size*size*channels"]:
    """Square patches in reading order, each flattened by row, column and channel."""
    batch, height, width, channels = image.shape
    grid = image.reshape(batch, height // size, size, width // size, size, channels)
    return grid.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


def unpatchify(
    patches: Float[Array, "batch patches size*size*channels"], size: int
) -> Float[Array, "batch height width channels"]:
    """The square image of patches in reading order."""
    batch, count, values = patches.shape
    side, channels = round(count**0.5), values // size**2
    grid = patches.reshape(batch, side, side, size, size, channels)
    return grid.swapaxes(2, 3).reshape(batch, side * size, side * size, channels)


def take_patches(
    x: Shaped[Array, "batch patches ..."], which: Int[Array, "batch some"]
) -> Shaped[Array, "batch some ..."]:
    """Some of each row's patches."""
    return jnp.take_along_axis(x, which.reshape(*which.shape, *(1,) * (x.ndim - 2)), axis=1)
