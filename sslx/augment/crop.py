"""Crops and flips, cut inside jit from pictures that are small enough to be on the device whole.

Resizing is antialiased bicubic, which is Pillow's ``BICUBIC`` with a ``box``: an output pixel weighs the input under a
kernel that is widened by the scale, and what lies beyond the picture counts nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.augment.chance import chosen, mirrored
from sslx.data.pictures import DRAWS, random_part

Bounds = tuple[float, float]


def random_resized_crop(
    images: Float[Array, "batch height width channels"],
    keys: PRNGKeyArray,
    *,
    size: int,
    area: Bounds,
    aspect: Bounds = (3 / 4, 4 / 3),
) -> Float[Array, "batch size size channels"]:
    """A random part of each picture, brought to ``size`` (Inception's crop, arXiv 1409.4842).

    Args:
      images: Pictures.
      keys: One a row.
      size: Height and width of the result.
      area: Least and largest share of the picture's area.
      aspect: Least and largest width over height, even in its logarithm.
    """
    return jax.vmap(lambda image, key: resized(image, random_box(key, image.shape[:2], area, aspect), size))(
        images, keys
    )


def whole(images: Float[Array, "batch height width channels"], size: int) -> Float[Array, "batch size size channels"]:
    """All of each picture, brought to ``size``."""
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    return jax.vmap(lambda image: resized(image, jnp.array([0.0, 0.0, width, height]), size))(images)


def random_box(key: PRNGKeyArray, shape: tuple[int, int], area: Bounds, aspect: Bounds) -> Float[Array, " 4"]:
    """``left, top, width, height`` of a random part of a picture of ``shape`` (height, width), in pixels."""
    return random_part(jax.random.uniform(key, (DRAWS,)), shape, area, aspect, jnp)


def resized(
    image: Float[Array, "height width channels"], box: Float[Array, " 4"], size: int
) -> Float[Array, "size size channels"]:
    """The part in a box (left, top, width, height) as ``size`` by ``size`` pixels."""
    start, extent = box[:2][::-1], box[2:][::-1]
    scale = size / extent
    out = jax.image.scale_and_translate(
        image, (size, size, image.shape[-1]), (0, 1), scale, -start * scale, method="cubic", antialias=True
    )
    return jnp.clip(out, 0.0, 1.0)  # a cubic kernel overshoots at edges


def random_flip(
    images: Float[Array, "batch height width channels"], keys: PRNGKeyArray, probability: float
) -> Float[Array, "batch height width channels"]:
    """Mirrors left and right with a probability."""
    return mirrored(images, chosen(keys, probability))
