"""What happens to some rows of a batch and not to others, drawn for each row by its own key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def chosen(keys: PRNGKeyArray, probability: float) -> Bool[Array, " batch"]:
    """Which rows it happens to."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)


def where_rows(which: Bool[Array, " batch"], changed: Array, as_it_was: Array) -> Array:
    """The changed array in the chosen rows, ``[batch, ...]``."""
    return jnp.where(which.reshape(-1, *(1,) * (as_it_was.ndim - 1)), changed, as_it_was)


def sometimes(
    keys: PRNGKeyArray, probability: float, changed: Float[Array, "batch ..."], images: Float[Array, "batch ..."]
) -> Float[Array, "batch ..."]:
    """The changed picture with a probability, or the picture as it was."""
    return where_rows(chosen(keys, probability), changed, images)


def mirrored(images: Array, which: Bool[Array, " batch"]) -> Array:
    """Left is right in some rows, ``[batch, height, width, ...]``."""
    return where_rows(which, images[:, :, ::-1], images)
