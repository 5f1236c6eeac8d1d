"""Loss functions over logits that more than one objective uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def softmax_cross_entropy(
    logits: Float[Array, "... classes"], labels: Int[Array, "..."], label_smoothing: float = 0.0
) -> Float[Array, "..."]:
    """Negative log-likelihood of the labels in nats, float32.

    Args:
      logits: Unnormalised log-probabilities.
      labels: Class ids.
      label_smoothing: Share of the target spread evenly over all classes (arXiv 1512.00567).
    """
    logits = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    loss = normaliser - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if label_smoothing:
        uniform = normaliser - jnp.mean(logits, axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return loss
