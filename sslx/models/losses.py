"""Loss functions over logits that more than one objective uses."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sslx.models.layers import padded_vocabulary, tied_logits

LOGITS_AT_ONCE = 1 << 22  # of a row: 16 MiB


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


def chunks_for(length: int, vocab_size: int) -> int:
    """How many parts `tied_cross_entropy` takes a row in, so that no more than `LOGITS_AT_ONCE` of it exist."""
    return min(length, -(-length * padded_vocabulary(vocab_size) // LOGITS_AT_ONCE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def tied_cross_entropy(
    x: Float[Array, "batch length width"],
    table: Float[Array, "padded_vocab width"],
    labels: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    vocab_size: int,
    chunks: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted cross-entropy of a head tied to the embedding table, whose logits never exist whole.

    The positions are taken in ``chunks`` parts, and each part's gradients are made while its logits are there, so the
    backward pass computes nothing again.

    Args:
      x: Hidden states.
      table: The embedding table.
      labels: Token ids, at least 0.
      weights: Weight of each position.
      vocab_size: Rows of the table that are tokens; the rest take no probability.
      chunks: How many parts; the largest array is ``[batch, length / chunks, padded_vocab]``.

    Returns:
      float32 sums over all positions of weight times loss (nats), and of the weights where the label is the likeliest
      token (which has no gradient).
    """
    total, right = jnp.zeros(()), jnp.zeros(())

    def part(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
        loss, hit, _ = _part_loss(table, *scanned, vocab_size)
        return (carry[0] + loss, carry[1] + hit), None

    (total, right), _ = _over_parts(part, (total, right), (x, labels, weights), chunks)
    return total, right


def _part_loss(table: Array, x: Array, labels: Array, weights: Array, vocab_size: int) -> tuple[Array, Array, Array]:
    logits = tied_logits(x, table, vocab_size)
    loss = jnp.sum(weights * softmax_cross_entropy(logits, labels))
    return loss, jnp.sum(weights * (jnp.argmax(logits, axis=-1) == labels)), logits


def _over_parts(part: Any, carry: Any, arrays: tuple[Array, ...], chunks: int) -> Any:
    """Scans ``part`` over the parts of ``[batch, length, ...]`` arrays; what it gives out is put back in place.

    Part ``i`` has the positions ``i, i + chunks, ...``: were it a contiguous range, a mesh that splits the positions
    would gather them all.
    """
    length = arrays[0].shape[1]
    short = -length % chunks

    def split(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, short)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(array.shape[0], -1, chunks, *array.shape[2:]), 2, 0)

    def join(stacked: Array) -> Array:
        joined = jnp.moveaxis(stacked, 0, 2)
        return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]

    if chunks == 1:
        carry, out = part(carry, arrays)
        return carry, out
    carry, out = jax.lax.scan(part, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, out)


def _tied_forward(
    x: Array, table: Array, labels: Array, weights: Array, vocab_size: int, chunks: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def part(carry: tuple, scanned: tuple) -> tuple[tuple, Array]:
        x, labels, weights = scanned
        loss, hit, logits = _part_loss(table, x, labels, weights, vocab_size)
        gradient = jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(labels, table.shape[0])
        gradient = (gradient * weights[..., None]).astype(x.dtype)
        rows = gradient.reshape(-1, table.shape[0])
        by_table = jnp.einsum("nv,nd->vd", rows, x.reshape(-1, x.shape[-1]), preferred_element_type=jnp.float32)
        total, right, before = carry
        return (total + loss, right + hit, before + by_table), gradient @ table.astype(x.dtype)

    carry = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(table.shape, jnp.float32))
    (total, right, by_table), by_x = _over_parts(part, carry, (x, labels, weights), chunks)
    return (total, right), (by_x, by_table.astype(table.dtype))


def _tied_backward(vocab_size: int, chunks: int, kept: tuple[Array, Array], given: tuple[Array, Array]) -> tuple:
    by_x, by_table = kept
    scale = given[0]
    return by_x * scale.astype(by_x.dtype), by_table * scale, None, None


tied_cross_entropy.defvjp(_tied_forward, _tied_backward)
