"""Regression to a teacher's features: distances, how much there is to predict, and how much of that is predicted.

data2vec (arXiv 2202.03555) and I-JEPA (arXiv 2301.08243), on text and on pictures. In: predictions and targets
[batch, places, width] in float32 and a weight for each place.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sslx.objective import Mean

EPS = 1e-5


def normalised(
    x: Float[Array, "batch length width"], segment_ids: Int[Array, "batch length"], kind: str
) -> Float[Array, "batch length width"]:
    """Mean 0 and variance 1 in float32: of each token over the width, or of each feature over the row's real tokens."""
    x = x.astype(jnp.float32)
    if kind == "layer":
        return jax.nn.standardize(x, axis=-1, epsilon=EPS)
    real = (segment_ids > 0).astype(jnp.float32)[..., None]
    count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1.0)
    centred = x - jnp.sum(real * x, axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(jnp.sum(real * centred**2, axis=1, keepdims=True) / count + EPS)


def distance(difference: Float[Array, "..."], smooth_beta: float) -> Float[Array, "..."]:
    """The square or, with a ``smooth_beta``, smooth L1: half the square over it up to there, then a line."""
    if not smooth_beta:
        return difference**2
    size = jnp.abs(difference)
    return jnp.where(size < smooth_beta, 0.5 * size**2 / smooth_beta, size - 0.5 * smooth_beta)


def variance(x: Float[Array, "batch places width"], weights: Float[Array, "batch places"]) -> Float[Array, ""]:
    """The variance over weighted places of each feature, averaged over the features."""
    weights = (weights / jnp.maximum(jnp.sum(weights), 1.0))[..., None]
    mean = jnp.sum(weights * x, axis=(0, 1))
    return jnp.mean(jnp.sum(weights * (x - mean) ** 2, axis=(0, 1)))


def watched(
    predicted: Float[Array, "batch places width"],
    targets: Float[Array, "batch places width"],
    weights: Float[Array, "batch places"],
) -> dict[str, Mean]:
    """Metrics of a regression.

    ``error`` is the mean square. Variances are over the (micro-)batch at hand: both fall to 0 when the teacher
    collapses, that of predictions alone when the student predicts one vector everywhere.
    """
    count = jnp.sum(weights)
    return {
        "error": Mean(jnp.sum(weights * jnp.mean((predicted - targets) ** 2, axis=-1)), count),
        "target_variance": Mean(count * variance(targets, weights), count),
        "prediction_variance": Mean(count * variance(predicted, weights), count),
    }


def explained(metrics: Mapping[str, float]) -> dict[str, float]:
    """The share of the targets' variance that is predicted, 0 for the best constant, and the root of that variance.

    Of targets that are normalised over the width or over places, the root is 1 if all are different and 0 if the
    teacher has collapsed, which makes the loss as small as a good prediction does.
    """
    variance = metrics["target_variance"]
    return {"explained": 1.0 - metrics["error"] / max(variance, 1e-12), "target_std": max(variance, 0.0) ** 0.5}
