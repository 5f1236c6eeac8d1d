"""Layers that every model shares: dense, norms, dropout, activations. Parameters carry logical axis names.

Computation is in ``dtype`` (bfloat16 or float32), parameters stay float32. Norms and dropout scales are float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Initializer = Callable[..., jax.Array]

# BERT's and ViT's choice: N(0, 0.02) cut off at two standard deviations.
bert_init = nn.initializers.truncated_normal(0.02)


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
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]), (self.features,)
            )
            y = y + bias.astype(self.dtype)
        return y


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
    """bool[shape], True with probability ``1 - rate``: a hash of the key and the element's global index.

    A counter-based integer hash instead of threefry: XLA fuses it into whatever uses the mask, so nothing is stored, and
    the backward pass computes it again. It depends on the global index alone, hence is the same on any mesh.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    row_shape, stride = shape[1:], 1
    index = jnp.zeros(row_shape, jnp.uint32)
    for axis in range(len(row_shape) - 1, -1, -1):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, row_shape, axis) * jnp.uint32(stride)
        stride *= row_shape[axis]
    # The first axis (the global batch) has a word of its own, or large attention masks would overrun 32 bits and repeat.
    row_words = _mix(jnp.arange(shape[0], dtype=jnp.uint32) ^ words[1]).reshape(-1, *(1,) * len(row_shape))
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return _mix(_mix(index ^ words[0]) ^ row_words) >= threshold


def _mix(x: Array) -> Array:
    """A bijection of uint32 with low bias (the constants are Chris Wellons's lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def activation(name: str) -> Callable[[Array], Array]:
    """``gelu`` (exact, with erf), ``gelu_tanh``, ``relu``, ``silu``, ``tanh``; a model's ``glu`` decides about gating."""
    return {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
    }[name]
