"""One vector for a row of tokens, and vectors of length 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mean_pool(
    x: Float[Array, "batch length width"], segment_ids: Int[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """Mean over the tokens that are not padding, float32."""
    weight = (segment_ids > 0).astype(jnp.float32)[..., None]
    return jnp.sum(x.astype(jnp.float32) * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)


def unit_vectors(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """Each vector over its length, so that products are cosines; one of zeros stays what it is, with a gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def last_token(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch 1"]:
    """The position of the last token that is not padding, which alone has seen the whole row of a causal model."""
    length = segment_ids.shape[1]
    return jnp.max(jnp.where(segment_ids > 0, jnp.arange(length), 0), axis=1, keepdims=True)
