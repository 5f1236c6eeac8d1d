"""What keeps assignments to prototypes from all being the same: a centre that is taken away, or Sinkhorn's balance.

Both look at all rows of the global batch: the step is one program over global arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.models.layers import NEVER


def sinkhorn(
    scores: Float[Array, "rows prototypes"],
    weights: Float[Array, " rows"],
    temperature: Array | float,
    iterations: int = 3,
) -> Float[Array, "rows prototypes"]:
    """Assignments that share out the rows evenly over the prototypes (SwAV, arXiv 2006.09882; Cuturi, 1306.0895).

    In logarithms, where the published code exponentiates and overflows at small temperatures. Its factors of 1 / rows
    and 1 / prototypes drop out, as each row is brought to a sum of 1 at the end.

    Args:
      scores: Higher for what fits better.
      weights: Rows with 0 take no part and get even shares.
      temperature: Of the softmax that is balanced (epsilon).
      iterations: How often prototypes and rows are normalised in turn.

    Returns:
      Shares of each row, no gradient; their sum is 1.
    """
    there = weights[:, None] > 0
    logs = jax.lax.stop_gradient(scores).astype(jnp.float32) / temperature

    def once(_: int, logs: Array) -> Array:
        logs = jnp.where(there, logs, NEVER)
        logs = logs - jax.nn.logsumexp(logs, axis=0, keepdims=True)
        return logs - jax.nn.logsumexp(logs, axis=1, keepdims=True)

    # A loop: written out, many iterations would take the compiler minutes.
    logs = jax.lax.fori_loop(0, iterations, once, logs)
    return jnp.where(there, jnp.exp(logs), 1.0 / scores.shape[1])


def centred(
    scores: Float[Array, "... prototypes"], centre: Float[Array, " prototypes"], temperature: Array | float
) -> Float[Array, "... prototypes"]:
    """DINO's targets (arXiv 2104.14294): a sharp softmax of what is left of the scores without their centre."""
    return jax.lax.stop_gradient(jax.nn.softmax((scores - centre) / temperature, axis=-1))


def centre_moved(
    centre: Float[Array, " prototypes"], total: Float[Array, " prototypes"], count: Array, momentum: float
) -> Float[Array, " prototypes"]:
    """The running mean of scores after an update that saw ``count`` of them with this sum."""
    return momentum * centre + (1.0 - momentum) * total / jnp.maximum(count, 1e-6)


def cross_entropy(targets: Float[Array, "... classes"], logits: Float[Array, "... classes"]) -> Float[Array, "..."]:
    """Of shares of classes, in nats."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def entropy(shares: Float[Array, "... classes"]) -> Float[Array, "..."]:
    """In nats."""
    return -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.maximum(shares, 1e-30)), 0.0), axis=-1)
