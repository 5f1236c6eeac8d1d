"""Rounding at random: what a sum of small parts needs when it is kept in few bits.

A running mean that moves by a thousandth of itself in an update never moves in bfloat16, whose steps are a 256th: each
update is rounded away. Rounded up with the probability that it is on its way to the next number, it is right on average
(arXiv 1502.02551; of optimizer states in bfloat16, arXiv 2010.06192).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, PRNGKeyArray

from sslx.models.layers import hashed_bits


def rounded_at_random(x: Float[Array, "..."], key: PRNGKeyArray) -> BFloat16[Array, "..."]:
    """``x``, float32, as bfloat16: one of the two numbers beside it, the nearer one more often; the same on any mesh.

    What bfloat16 can hold stays as it is. It fills the lower half of the bits that are cut off with a random number:
    that carries into the upper half as often as the cut part is large. Infinities and the usual NaN stay; a number next
    to the largest may become infinite.
    """
    noise = hashed_bits(key, x.shape or (1,)).reshape(x.shape) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def tree_rounded_at_random(tree: object, key: PRNGKeyArray) -> object:
    """Each leaf of a tree, by a key of its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    return structure.unflatten([rounded_at_random(leaf, one) for leaf, one in zip(leaves, keys, strict=False)])
