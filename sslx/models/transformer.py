"""Transformer encoder blocks, written once: post-LN (BERT) and pre-LN, learned positions or RoPE, GELU or GeGLU.

In: the residual stream ``[batch, length, width]``, segment ids and positions. Out: the same shape. The layers are one
``scan`` over parameters stacked ``[layers, ...]``. Post-LN with biases, LayerNorm and GELU is BERT to the letter
(arXiv 1810.04805, google-research/bert); pre-LN with RoPE, GeGLU and no biases is ModernBERT's block (arXiv 2412.13663).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sslx.errors import UserError, choose
from sslx.models.attention import attend
from sslx.models.layers import Dense, Dropout, Norm, activation

REMAT = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products with weights, redo the rest
    "full": jax.checkpoint_policies.nothing_saveable,  # keep layer inputs only
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One encoder stack. Defaults are BERT's block at its "mini" size."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    mlp_width: int = 1024
    norm_position: str = "post"  # post (BERT) | pre
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-12
    activation: str = "gelu"  # gelu (exact) | gelu_tanh | relu | silu
    glu: bool = False  # gate the MLP: activation(x W) * (x V), mlp_width each (arXiv 2002.05202)
    bias: bool = True
    positions: str = "learned"  # learned | rope
    rope_theta: float = 10000.0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    remat: str = "none"  # none | dots | full
    unroll: bool | None = None  # unroll the scan over layers; None: on CPU only
    dtype: str = "float32"  # computation; parameters are always float32

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"config.model.width {self.width} does not divide into config.model.heads {self.heads}")
        if self.positions == "rope" and (self.width // self.heads) % 2:
            raise UserError(f"config.model.positions=rope needs an even head width; got {self.width // self.heads}")
        choose(self.norm_position, ("post", "pre"), "config.model.norm_position")
        choose(self.norm, ("layernorm", "rmsnorm"), "config.model.norm")
        choose(self.activation, ("gelu", "gelu_tanh", "relu", "silu"), "config.model.activation")
        choose(self.positions, ("learned", "rope"), "config.model.positions")
        choose(self.remat, REMAT, "config.model.remat")
        choose(self.dtype, ("float32", "bfloat16"), "config.model.dtype")

    @property
    def compute_dtype(self) -> Any:
        """The dtype of activations."""
        return jnp.dtype(self.dtype)

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs of the stack for one token in a row of ``length`` (attention counted in full, no masking)."""
        attention = 8 * self.width**2 + 4 * length * self.width
        return self.layers * (attention + (6 if self.glu else 4) * self.width * self.mlp_width)


class SelfAttention(nn.Module):
    """Multi-head self-attention within segments."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length width"]:
        config = self.config
        batch, length, width = x.shape
        head_width = width // config.heads

        def project(name: str) -> Array:
            y = Dense(width, ("embed", "heads"), config.bias, dtype=config.compute_dtype, name=name)(x)
            y = y.reshape(batch, length, config.heads, head_width)
            return nn.with_logical_constraint(y, ("act_batch", "act_length", "act_heads", None))

        query, key, value = project("query"), project("key"), project("value")
        if config.positions == "rope":
            query, key = (rotate(array, positions, config.rope_theta) for array in (query, key))
        rng = None
        if config.attention_dropout and not deterministic:
            rng = self.make_rng("dropout")
        y = attend(query, key, value, segment_ids, dropout_rate=config.attention_dropout, dropout_key=rng)
        y = y.reshape(batch, length, width)
        return Dense(width, ("heads", "embed"), config.bias, dtype=config.compute_dtype, name="out")(y)


class MLP(nn.Module):
    """The position-wise part: up, activation (gated or not), down."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        config = self.config

        def up(name: str) -> Array:
            y = Dense(config.mlp_width, ("embed", "mlp"), config.bias, dtype=config.compute_dtype, name=name)(x)
            return nn.with_logical_constraint(y, ("act_batch", "act_length", "act_mlp"))

        hidden = activation(config.activation)(up("up"))
        if config.glu:
            hidden = hidden * up("gate")
        return Dense(config.width, ("mlp", "embed"), config.bias, dtype=config.compute_dtype, name="down")(hidden)


class Block(nn.Module):
    """One layer. Its call has the form ``scan`` wants: ``(carry, *broadcast) -> (carry, None)``."""

    config: TransformerConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
    ) -> tuple[Float[Array, "batch length width"], None]:
        config = self.config
        pre = config.norm_position == "pre"
        attention, mlp = SelfAttention(config, name="attention"), MLP(config, name="mlp")
        drop = Dropout(config.dropout)

        def norm(name: str) -> Norm:
            return Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype, name=name)

        attention_norm, mlp_norm = norm("attention_norm"), norm("mlp_norm")
        y = attention(attention_norm(x) if pre else x, segment_ids, positions, deterministic=self.deterministic)
        x = x + drop(y, deterministic=self.deterministic)
        x = x if pre else attention_norm(x)
        y = mlp(mlp_norm(x) if pre else x)
        x = x + drop(y, deterministic=self.deterministic)
        x = x if pre else mlp_norm(x)
        return nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed")), None


class Transformer(nn.Module):
    """The stack of blocks; with pre-LN, a last norm, since nothing else would normalise the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length width"]:
        config = self.config
        block = Block
        if REMAT[config.remat] is not None:
            block = nn.remat(Block, policy=REMAT[config.remat], prevent_cse=False)
        # A CPU gains nothing from a small program and pays for copying every layer's slice; accelerators compile faster.
        unroll = jax.default_backend() == "cpu" if config.unroll is None else config.unroll
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.layers,
            unroll=config.layers if unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(config, deterministic, name="layers")(x, segment_ids, positions)
        if config.norm_position == "pre":
            x = Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype, name="final_norm")(x)
        return x


def rotate(
    x: Float[Array, "batch length heads width"], positions: Int[Array, "batch length"], theta: float
) -> Float[Array, "batch length heads width"]:
    """Rotary position embedding (arXiv 2104.09864): turns pairs ``(i, i + width/2)`` by ``position / theta^(2i/width)``."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
