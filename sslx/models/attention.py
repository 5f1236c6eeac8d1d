"""Attention within segments, by one function.

In: queries ``[batch, queries, heads, head_width]``, keys and values ``[batch, length, heads, head_width]``, and the
segment ids of both; a token sees the tokens of its own segment only, so that documents packed in one row do not mix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sslx.models.layers import NEVER, dropout


def attend(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch length heads head_width"],
    value: Float[Array, "batch length heads head_width"],
    query_segment_ids: Int[Array, "batch queries"],
    key_segment_ids: Int[Array, "batch length"],
    *,
    order: tuple[Int[Array, "batch queries"], Int[Array, "batch length"]] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "batch queries heads head_width"]:
    """Scaled dot-product attention (arXiv 1706.03762), softmax in float32.

    Args:
      query: Queries.
      key: Keys.
      value: Values.
      query_segment_ids: Segments of the queries: 1 and up for documents, 0 for padding.
      key_segment_ids: Segments of the keys and values.
      order: Positions of the queries and of the keys within their segments, for causal attention: a query sees the keys
        that are not after it. None: it sees all.
      dropout_rate: Share of attention probabilities to drop.
      dropout_key: Key for the dropout; None: no dropout.
    """
    probabilities = attention_probabilities(query, key, query_segment_ids, key_segment_ids, order=order)
    if dropout_key is not None:
        probabilities = dropout(probabilities, dropout_rate, dropout_key)
    value = jnp.swapaxes(value, 1, 2)
    out = jnp.einsum("bhqk,bhkd->bhqd", probabilities.astype(value.dtype), value)
    return jnp.swapaxes(out, 1, 2)


def attention_probabilities(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch length heads head_width"],
    query_segment_ids: Int[Array, "batch queries"],
    key_segment_ids: Int[Array, "batch length"],
    *,
    order: tuple[Int[Array, "batch queries"], Int[Array, "batch length"]] | None = None,
) -> Float[Array, "batch heads queries length"]:
    """How much each query takes of each key, float32, 1 in all; arguments as of `attend`."""
    # Heads before length: both products are then plain batched matrix products, which XLA's CPU backend runs several
    # times faster than the same contraction with heads in the middle.
    query, key = (jnp.swapaxes(array, 1, 2) for array in (query * query.shape[-1] ** -0.5, key))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    seen = query_segment_ids[:, None, :, None] == key_segment_ids[:, None, None, :]
    if order is not None:
        seen &= order[0][:, None, :, None] >= order[1][:, None, None, :]
    return jax.nn.softmax(jnp.where(seen, scores, NEVER), axis=-1)
