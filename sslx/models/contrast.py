"""Telling a row's other view from those of all other rows: cross-entropies over cosines, with global negatives.

The step is one program over global arrays, so that "all rows" are those of all devices: each device compares its own
rows with everyone's. Rows without weight, which only fill up the last batch of an evaluation, are no candidates.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sslx.errors import UserError
from sslx.models.layers import NEVER


def cosines(one: Float[Array, "rows width"], other: Float[Array, "others width"]) -> Float[Array, "rows others"]:
    """Products of unit vectors, in full float32; the others are gathered from all devices."""
    other = nn.with_logical_constraint(other, (None, None))
    return jnp.einsum("id,jd->ij", one, other, precision=jax.lax.Precision.HIGHEST)


def info_nce(
    first: Float[Array, "batch width"],
    second: Float[Array, "batch width"],
    negatives: Float[Array, "more width"] | None,
    weights: Float[Array, " batch"],
    temperature: float,
    *,
    filled: Bool[Array, " more"] | None = None,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Cross-entropy of telling row ``i`` of ``second`` from all others and from all negatives, given ``first[i]``.

    Args:
      first: Unit vectors.
      second: Unit vectors; those of rows without weight are no candidates.
      negatives: More candidates, or None.
      weights: One a row.
      temperature: Divides the cosine similarities.
      filled: Which negatives there are; None: those of rows with weight, one for each row.

    Returns:
      Losses, and 1 where the right one is the most similar.
    """
    there, candidates = weights > 0, second
    if negatives is not None:
        candidates = jnp.concatenate([second, negatives])
        there = jnp.concatenate([there, there if filled is None else filled])
    similarity = jnp.where(there, cosines(first, candidates) / temperature, NEVER)
    return _right(similarity, jnp.arange(first.shape[0]))


def nt_xent(
    first: Float[Array, "batch width"],
    second: Float[Array, "batch width"],
    weights: Float[Array, " batch"],
    temperature: float,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """SimCLR's loss (arXiv 2002.05709): each view is told from all other views of all rows, in both directions.

    Args:
      first: Unit vectors.
      second: Unit vectors.
      weights: One a row.
      temperature: Divides the cosine similarities.

    Returns:
      Losses, the mean of both directions, and the share of these where the right one is the most similar.
    """
    # The views of a row stand beside each other, so that every device keeps its rows.
    both = jnp.stack([first, second], axis=1).reshape(-1, first.shape[-1])
    place = jnp.arange(len(both))
    there = jnp.repeat(weights > 0, 2)[None, :] & (place[:, None] != place[None, :])
    similarity = jnp.where(there, cosines(both, both) / temperature, NEVER)
    return tuple(jnp.mean(each.reshape(-1, 2), axis=1) for each in _right(similarity, place ^ 1))


def _right(similarity: Array, right: Array) -> tuple[Array, Array]:
    likeness = jnp.take_along_axis(similarity, right[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(similarity, axis=1) - likeness, (jnp.argmax(similarity, axis=1) == right).astype(
        jnp.float32
    )


def with_queue(state: Any, rows: Float[Array, "batch ..."]) -> Any:
    """A state whose ``queue`` (MoCo, arXiv 1911.05722) has new rows in front and lost as many of the oldest.

    ``filled`` counts those that it has.
    """
    queue, filled = jnp.concatenate([rows, state["queue"]]), state["filled"] + len(rows)
    places = len(state["queue"])
    return {**state, "queue": queue[:places], "filled": jnp.minimum(filled, places)}


def check_queue(places: int, batch_size: int) -> None:
    """Refuses a queue that is no whole number of batches.

    Raises:
      UserError: it is none.
    """
    if places % batch_size:
        raise UserError(
            f"config.pretext.queue is {places}, no multiple of config.batch_size {batch_size}, of which an update puts "
            "in one and drops one"
        )
