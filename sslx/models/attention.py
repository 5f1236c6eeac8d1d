"""Attention within segments, by one function.

In: queries ``[batch, queries, heads, head_width]``, keys and values ``[batch, length, heads, head_width]``, and the
segment ids of both; a token sees the tokens of its own segment only, so that documents packed in one row do not mix.
Which program computes it, `attention_kernels` says.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sslx.models import attention_kernels
from sslx.models.layers import NEVER, dropout


def attend(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch length heads head_width"],
    value: Float[Array, "batch length heads head_width"],
    query_segment_ids: Int[Array, "batch queries"] | None,
    key_segment_ids: Int[Array, "batch length"] | None,
    *,
    order: tuple[Int[Array, "batch queries"], Int[Array, "batch length"]] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: str = "xla",
) -> Float[Array, "batch queries heads head_width"]:
    """Scaled dot-product attention (arXiv 1706.03762), softmax in float32.

    Args:
      query: Queries.
      key: Keys.
      value: Values.
      query_segment_ids: Segments of the queries: 1 and up for documents, 0 for padding; None: all tokens are of one.
      key_segment_ids: Segments of the keys and values, or None as well.
      order: Positions of the queries and of the keys within their segments, for causal attention: a query sees the keys
        that are not after it. None: it sees all.
      dropout_rate: Share of attention probabilities to drop.
      dropout_key: Key for the dropout; None: no dropout.
      implementation: One of `attention_kernels.IMPLEMENTATIONS`. Other than ``xla``, with an order, the queries must be
        the keys' own, and tokens of one segment stand in their order.

    Raises:
      UserError: the implementation cannot compute it.
    """
    masked, causal = query_segment_ids is not None, order is not None
    call = attention_kernels.call_of(query, key, masked=masked, causal=causal, dropout=dropout_key is not None)
    kernel = attention_kernels.KERNELS.get(attention_kernels.chosen(implementation, call))
    if kernel is not None:
        segment_ids = (query_segment_ids, key_segment_ids) if masked else None
        return kernel(query, key, value, segment_ids, causal=causal)
    probabilities = attention_probabilities(query, key, query_segment_ids, key_segment_ids, order=order)
    if dropout_key is not None:
        probabilities = dropout(probabilities, dropout_rate, dropout_key)
    value = jnp.swapaxes(value, 1, 2)
    out = jnp.einsum("bhqk,bhkd->bhqd", probabilities.astype(value.dtype), value)
    return jnp.swapaxes(out, 1, 2)


def attention_probabilities(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch length heads head_width"],
    query_segment_ids: Int[Array, "batch queries"] | None,
    key_segment_ids: Int[Array, "batch length"] | None,
    *,
    order: tuple[Int[Array, "batch queries"], Int[Array, "batch length"]] | None = None,
) -> Float[Array, "batch heads queries length"]:
    """How much each query takes of each key, float32, 1 in all; arguments as of `attend`."""
    # Heads before length: both products are then plain batched matrix products, which XLA's CPU backend runs several
    # times faster than the same contraction with heads in the middle.
    query, key = (jnp.swapaxes(array, 1, 2) for array in (query * query.shape[-1] ** -0.5, key))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    seen = []
    if query_segment_ids is not None:
        seen.append(query_segment_ids[:, None, :, None] == key_segment_ids[:, None, None, :])
    if order is not None:
        seen.append(order[0][:, None, :, None] >= order[1][:, None, None, :])
    if seen:
        scores = jnp.where(functools.reduce(jnp.logical_and, seen), scores, NEVER)
    return jax.nn.softmax(scores, axis=-1)
