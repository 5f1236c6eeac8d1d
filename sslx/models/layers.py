"""Layers that every model shares: dense, norms, dropout, activations. Parameters carry logical axis names.

Computation is in ``dtype`` (bfloat16 or float32), parameters stay float32. Norms and dropout scales are float32 inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

# A logit of what cannot be. Finite, so that a row of nothing but padding stays finite; exp of it is 0 in float32.
NEVER = -1e9
Initializer = Callable[..., jax.Array]

# BERT's and ViT's choice: N(0, 0.02) cut off at two standard deviations.
bert_init = nn.initializers.truncated_normal(0.02)


def look_up(
    table: Float[Array, "rows width"], axis: str | None, ids: Int[Array, "batch length"]
) -> Float[Array, "batch length width"]:
    """Rows of an embedding table whose activation axis of rows is called ``axis``.

    Gathered over fsdp first: looking up rows in a table whose width is split makes XLA replicate the result.
    """
    return jnp.take(nn.with_logical_constraint(table, (axis, None)), ids, axis=0)


def padded_vocabulary(size: int) -> int:
    """The vocabulary's size rounded up to a multiple of 128, which matrix units and tensor parallelism like."""
    return -(-size // 128) * 128


def tied_logits(
    x: Float[Array, "... width"], table: Float[Array, "padded_vocab width"], vocab_size: int
) -> Float[Array, "... padded_vocab"]:
    """Logits of a head that is the embedding table, float32; those of the rows that pad the vocabulary are `NEVER`."""
    logits = jnp.einsum("...d,vd->...v", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(table.shape[0]) < vocab_size, logits, NEVER)


class Dense(nn.Module):
    """``x @ kernel + bias`` over the last axis; one matrix product, so reshape to heads outside."""

    features: int
    axes: tuple[str, str]  # logical names of the kernel's [in, out]
    use_bias: bool = True
    kernel_init: Initializer = bert_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... features"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), shape)
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]), (self.features,)
            )
            y = add_bias(y, bias.astype(self.dtype))
        return y


@jax.custom_vjp
def product(x: Float[Array, "... inputs"], kernel: Float[Array, "inputs features"]) -> Float[Array, "... features"]:
    """``x @ kernel``, whose kernel gradient is one 2-D product.

    Left to itself, XLA's CPU backend contracts batch and length as two axes and first writes transposed copies of both
    activations.
    """
    return jnp.dot(x, kernel)


def _product_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    rows, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return (gradients @ kernel.T).reshape(x.shape), rows.T @ gradients


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "... features"], bias: Float[Array, " features"]) -> Float[Array, "... features"]:
    """``x + bias``, whose bias gradient is a product with ones on CPU, where XLA's sums over rows are far slower."""
    return x + bias


def _add_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    rows = gradient.reshape(-1, gradient.shape[-1])
    total = jax.lax.platform_dependent(
        rows, cpu=lambda g: jnp.ones(g.shape[0], g.dtype) @ g, default=lambda g: jnp.sum(g, axis=0)
    )
    return gradient, total


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, ``x Phi(x)`` (arXiv 1606.08415), in float32 inside, whose backward pass keeps ``x`` alone."""
    return (_normal_cdf(x) * x).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * 0.5**0.5)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    # The barrier keeps XLA from storing erf(x) for the backward pass; computing it again costs less than a pass over
    # memory.
    return gelu(x), jax.lax.optimization_barrier(x)


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (((_normal_cdf(x) + wide * density) * gradient).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class Norm(nn.Module):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) over the last axis, computed in float32."""

    kind: str = "layernorm"  # layernorm | rmsnorm
    eps: float = 1e-12
    use_bias: bool = True  # LayerNorm's; RMSNorm has none
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        width = x.shape[-1]
        x = x.astype(jnp.float32)
        if self.kind == "layernorm":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        x = x * self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (width,))
        if self.kind == "layernorm" and self.use_bias:
            x = x + self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), (width,))
        return x.astype(self.dtype)


class Dropout(nn.Module):
    """Inverted dropout (arXiv 1207.0580) with a mask from ``dropout_mask``."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, deterministic: bool) -> Float[Array, "..."]:
        if deterministic or self.rate == 0.0:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray) -> Float[Array, "..."]:
    """Zeroes each element with probability ``rate`` and scales the rest by ``1 / (1 - rate)``."""
    keep = dropout_mask(key, x.shape, rate)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


def dropout_mask(key: PRNGKeyArray, shape: tuple[int, ...], rate: float) -> Array:
    """bool[shape], True with probability ``1 - rate``: `hashed_bits` at or above a threshold."""
    return hashed_bits(key, shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def hashed_bits(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """uint32[shape], random: a hash of the key and the element's global index.

    A counter-based integer hash instead of threefry: XLA fuses it into whatever uses it, so nothing is stored, and a
    backward pass computes it again. It depends on the global index alone, hence is the same on any mesh.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    row_shape, stride = shape[1:], 1
    index = jnp.zeros(row_shape, jnp.uint32)
    for axis in range(len(row_shape) - 1, -1, -1):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, row_shape, axis) * jnp.uint32(stride)
        stride *= row_shape[axis]
    # The first axis (the global batch) has a word of its own, or large attention masks would overrun 32 bits and
    # repeat.
    row_words = _mix(jnp.arange(shape[0], dtype=jnp.uint32) ^ words[1]).reshape(-1, *(1,) * len(row_shape))
    return _mix(_mix(index ^ words[0]) ^ row_words)


def _mix(x: Array) -> Array:
    """A bijection of uint32 with low bias (the constants are Chris Wellons's lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def activation(name: str) -> Callable[[Array], Array]:
    """The function named ``gelu`` (exact, with erf), ``gelu_tanh``, ``relu`` or ``silu``."""
    return {
        "gelu": gelu,
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }[name]


def skip_branch(y: Float[Array, "batch ..."], share: Float[Array, ""] | float, key: PRNGKeyArray) -> Array:
    """Stochastic depth (arXiv 1603.09382): 0 in a share of the rows, and in the others as much larger."""
    kept = jax.random.uniform(key, (y.shape[0],) + (1,) * (y.ndim - 1)) >= share
    return jnp.where(kept, y / (1.0 - share), 0.0).astype(y.dtype)
