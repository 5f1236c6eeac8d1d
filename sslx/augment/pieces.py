"""A picture cut in nine, for tasks that ask how its parts belong together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sslx.augment.crop import resized

SIDE = 3  # pieces along a side
CANDIDATES = 20_000  # permutations that the distant ones are chosen from


def cut_pieces(
    images: Float[Array, "batch height width channels"], keys: PRNGKeyArray, *, size: int, share: float
) -> Float[Array, "batch 9 size size channels"]:
    """Nine pieces in reading order, each brought to ``size``.

    Args:
      images: Square pictures.
      keys: One a row.
      size: Height and width of a piece in the result.
      share: Side of a piece as a share of its cell. It lies anywhere in the cell: the gap and the jitter keep edges
        that run on, and a place that is always the same, from giving the answer away (arXiv 1505.05192).
    """
    cell = images.shape[1] / SIDE
    side = cell * share

    def one(image: Array, key: PRNGKeyArray) -> Array:
        jitter = jax.random.uniform(key, (SIDE**2, 2)) * (cell - side)
        corners = jnp.stack(jnp.divmod(jnp.arange(SIDE**2), SIDE)[::-1], axis=-1) * cell + jitter
        boxes = jnp.concatenate([corners, jnp.full((SIDE**2, 2), side)], axis=-1)
        return jax.vmap(lambda box: resized(image, box, size))(boxes)

    return jax.vmap(one)(images, keys)


def distant_permutations(count: int, pieces: int = SIDE**2, seed: int = 0) -> Int[np.ndarray, "count pieces"]:
    """Permutations that are far from each other in Hamming distance, no two the same.

    Chosen one after the other, each the farthest from those before (arXiv 1603.09246, algorithm in its section 3.2):
    in the distance to the nearest of them, then in the mean distance. The candidates are a sample of all 9!.
    """
    draw = np.random.default_rng(seed)
    sample = draw.permuted(np.tile(np.arange(pieces, dtype=np.uint8), (max(CANDIDATES, 4 * count), 1)), axis=1)
    nearest, total = np.full(len(sample), pieces), np.zeros(len(sample), np.int64)
    chosen = [0]
    for _ in range(count - 1):
        distance = (sample != sample[chosen[-1]]).sum(axis=1)
        nearest, total = np.minimum(nearest, distance), total + distance
        chosen.append(int(np.argmax(nearest * (pieces * count + 1) + total)))
    return sample[chosen].astype(np.int32)
