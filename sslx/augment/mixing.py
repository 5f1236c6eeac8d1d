"""Mixing pictures with others of the batch, and erasing parts of them; targets become shares of classes.

Row ``i`` is mixed with row ``i + 1`` of the global batch, whose order is a function of the step: the same pairs on any
mesh.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.augment.crop import Bounds, random_box

Images = Float[Array, "batch height width channels"]
Targets = Float[Array, "batch classes"]


def mixup(images: Images, targets: Targets, keys: PRNGKeyArray, alpha: float) -> tuple[Images, Targets]:
    """Blends each picture and its target with the next row's, by a share from Beta(alpha, alpha) (arXiv 1710.09412)."""
    share = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)
    return _mix(images, share[:, None, None, None]), _mix(targets, share[:, None])


def cutmix(images: Images, targets: Targets, keys: PRNGKeyArray, alpha: float) -> tuple[Images, Targets]:
    """Pastes a box of the next row's picture; the target is shared by area (arXiv 1905.04899)."""
    size = jnp.array(images.shape[1:3], jnp.float32)

    def box(key: PRNGKeyArray) -> Array:
        share_key, place_key = jax.random.split(key)
        extent = size * jnp.sqrt(1.0 - jax.random.beta(share_key, alpha, alpha))
        start = jax.random.uniform(place_key, (2,)) * size - extent / 2  # the centre is anywhere in the picture
        return _inside(images.shape[1:3], start, extent)

    inside = jax.vmap(box)(keys)
    mixed = jnp.where(inside[..., None], jnp.roll(images, -1, axis=0), images)
    return mixed, _mix(targets, 1.0 - jnp.mean(inside, axis=(1, 2))[:, None])  # by what was pasted, its edges cut off


def random_erasing(
    images: Images, keys: PRNGKeyArray, area: Bounds = (0.02, 1 / 3), aspect: Bounds = (0.3, 3.3)
) -> Images:
    """Fills a random box of each picture with noise of mean 1/2 and deviation 1/4 (arXiv 1708.04896).

    The box is drawn as the part that a random crop keeps, so all of it is in the picture.
    """

    def one(image: Array, key: PRNGKeyArray) -> Array:
        box_key, noise_key = jax.random.split(key)
        left, top, wide, high = random_box(box_key, image.shape[:2], area, aspect)
        inside = _inside(image.shape[:2], (top, left), (high, wide))
        noise = jnp.clip(0.5 + 0.25 * jax.random.normal(noise_key, image.shape), 0.0, 1.0)
        return jnp.where(inside[..., None], noise, image)

    return jax.vmap(one)(images, keys)


def _inside(shape: tuple[int, int], start: Sequence[Array] | Array, extent: Sequence[Array] | Array) -> Array:
    """bool[height, width]: the pixels whose middles are in a box."""
    rows, columns = (
        (start[axis] <= middle) & (middle < start[axis] + extent[axis])
        for axis, middle in enumerate(jnp.arange(size) + 0.5 for size in shape)
    )
    return rows[:, None] & columns[None, :]


def _mix(array: Array, share: Array) -> Array:
    return share * array + (1.0 - share) * jnp.roll(array, -1, axis=0)
