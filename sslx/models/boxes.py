"""Boxes as numbers: how far two agree, and which of many guesses at one object are kept.

A box is left, top, right, bottom. ``iou`` and ``suppressed`` are for the host, ``giou`` is differentiable.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

EPS = 1e-7


def iou(boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of each of the boxes with each of the others."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    areas, other_areas = (np.prod(of[:, 2:] - of[:, :2], axis=-1) for of in (boxes, others))
    return shared / np.maximum(areas[:, None] + other_areas[None] - shared, EPS)


def giou(boxes: Float[Array, "... 4"], others: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Generalised intersection over union of boxes with their counterparts (arXiv 1902.09630), -1 to 1.

    It is the IoU less the share of the smallest box around both that neither covers, so that boxes that do not touch
    have a gradient towards each other.
    """

    def extent(low: Array, high: Array) -> Array:
        return jnp.prod(jnp.maximum(high - low, 0.0), axis=-1)

    (low, high), (other_low, other_high) = ((of[..., :2], of[..., 2:]) for of in (boxes, others))
    shared = extent(jnp.maximum(low, other_low), jnp.minimum(high, other_high))
    union = extent(low, high) + extent(other_low, other_high) - shared
    around = extent(jnp.minimum(low, other_low), jnp.maximum(high, other_high))
    return shared / jnp.maximum(union, EPS) - (around - union) / jnp.maximum(around, EPS)


def suppressed(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
    *,
    threshold: float,
) -> Bool[np.ndarray, " n"]:
    """Which boxes are no less sure a guess at an object that another box of the class has: non-maximum suppression.

    From the highest score down, each box that is kept drops those of its class whose IoU with it is above
    ``threshold``. Of equal scores the first is kept.

    Returns:
      True for those that are dropped.
    """
    clash = (iou(boxes, boxes) > threshold) & (classes[:, None] == classes[None])
    dropped = np.zeros(len(boxes), bool)
    order = np.argsort(-scores, kind="stable")
    for place, one in enumerate(order):
        if not dropped[one]:
            later = order[place + 1 :]
            dropped[later] |= clash[one, later]
    return dropped
