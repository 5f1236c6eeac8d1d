"""Transformer encoder blocks, written once: post-LN (BERT) and pre-LN, learned positions or RoPE, GELU or GeGLU.

In: the residual stream ``[batch, length, width]``, segment ids and positions. Out: the same shape, or the picked
positions alone. The layers are one ``scan`` over parameters stacked ``[layers, ...]``. Post-LN with biases, LayerNorm
and GELU is BERT to the letter (arXiv 1810.04805, google-research/bert); pre-LN with RoPE, GeGLU and no biases is
ModernBERT's block (arXiv 2412.13663).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from sslx.errors import UserError, choose
from sslx.models.attention import attend
from sslx.models.layers import Dense, Dropout, Norm, activation

REMAT = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights, redo the rest
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
        for name in ("layers", "width", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise UserError(f"config.model.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config.model.{name} is {getattr(self, name)}; expected 0 or a share below 1")
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

    def flops_per_row(self, length: int, picked: int | None = None) -> float:
        """Forward FLOPs of the stack for one row (attention counted in full, no masking).

        Args:
          length: Tokens in the row.
          picked: How many positions the last layer is computed for; None: all.
        """
        keys_values = 4 * length * self.width**2

        def layer(queries: int) -> float:
            attention = 4 * queries * self.width**2 + 4 * queries * length * self.width
            return keys_values + attention + (6 if self.glu else 4) * queries * self.width * self.mlp_width

        return (self.layers - 1) * layer(length) + layer(length if picked is None else picked)


class SelfAttention(nn.Module):
    """Multi-head self-attention within segments, for all positions or for the picked ones only."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        picked: Int[Array, "batch picked"] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "batch queries width"]:
        config = self.config
        head_width = config.width // config.heads

        def project(name: str, of: Array, length: str) -> Array:
            y = Dense(config.width, ("embed", "heads"), config.bias, dtype=config.compute_dtype, name=name)(of)
            y = y.reshape(*of.shape[:2], config.heads, head_width)
            return nn.with_logical_constraint(y, ("act_batch", length, "act_heads", None))

        key, value = project("key", x, "act_keys"), project("value", x, "act_keys")
        x, query_segment_ids, query_positions = (_pick(array, picked) for array in (x, segment_ids, positions))
        query = project("query", x, "act_length")
        if config.positions == "rope":
            query = rotate(query, query_positions, config.rope_theta)
            key = rotate(key, positions, config.rope_theta)
        rng = None
        if config.attention_dropout and not deterministic:
            rng = self.make_rng("dropout")
        y = attend(
            query,
            key,
            value,
            query_segment_ids,
            segment_ids,
            dropout_rate=config.attention_dropout,
            dropout_key=rng,
        )
        y = y.reshape(*x.shape[:2], config.width)
        return Dense(config.width, ("heads", "embed"), config.bias, dtype=config.compute_dtype, name="out")(y)


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
    """One layer, for all positions or for the picked ones only."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        picked: Int[Array, "batch picked"] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "batch queries width"]:
        config = self.config
        pre = config.norm_position == "pre"
        attention, mlp = SelfAttention(config, name="attention"), MLP(config, name="mlp")
        drop = Dropout(config.dropout)

        def norm(name: str) -> Norm:
            return Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype, name=name)

        attention_norm, mlp_norm = norm("attention_norm"), norm("mlp_norm")
        attended = attention(
            attention_norm(x) if pre else x, segment_ids, positions, picked, deterministic=deterministic
        )
        x = _pick(x, picked) + drop(attended, deterministic=deterministic)
        x = x if pre else attention_norm(x)
        y = mlp(mlp_norm(x) if pre else x)
        x = x + drop(y, deterministic=deterministic)
        x = x if pre else mlp_norm(x)
        return nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))


class Transformer(nn.Module):
    """The stack of blocks; with pre-LN, a last norm, since nothing else would normalise the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        picked: Int[Array, "batch picked"] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "batch queries width"]:
        """Hidden states of all positions or, given ``picked``, of those alone.

        Nothing above the last layer looks at the other positions then, so the last layer's queries, output projection
        and MLP are computed for the picked ones only: the same numbers for a fraction of that layer's arithmetic.
        """
        config = self.config
        block = Block(config, parent=None)

        def init_layers(key: PRNGKeyArray) -> Any:
            one = lambda k: block.init(k, x[:1], segment_ids[:1], positions[:1], deterministic=True)["params"]  # noqa: E731
            layers = jax.vmap(one)(jax.random.split(key, config.layers))
            return nn.meta.add_axis(layers, 0, {nn.PARTITION_NAME: "layers"})

        layers = self.param("layers", init_layers)
        key = None if deterministic else self.make_rng("dropout")

        def apply(x: Array, params: Any, layer: Array | int, picked: Array | None = None) -> Array:
            rngs = {} if deterministic else {"dropout": jax.random.fold_in(key, layer)}
            return block.apply(
                {"params": params}, x, segment_ids, positions, picked, deterministic=deterministic, rngs=rngs
            )

        if REMAT[config.remat] is not None:
            apply = jax.checkpoint(apply, policy=REMAT[config.remat], prevent_cse=False)
        whole = config.layers if picked is None else config.layers - 1
        # A CPU gains nothing from a small program and pays for copying every layer's slice; accelerators compile
        # faster.
        unroll = jax.default_backend() == "cpu" if config.unroll is None else config.unroll
        x, _ = jax.lax.scan(
            lambda x, scanned: (apply(x, *scanned), None),
            x,
            (jax.tree.map(lambda array: array[:whole], layers), jnp.arange(whole)),
            unroll=max(whole, 1) if unroll else 1,
        )
        if picked is not None:
            x = apply(x, jax.tree.map(lambda array: array[-1], layers), whole, picked)
        if config.norm_position == "pre":
            x = Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype, name="final_norm")(x)
        return x


def _pick(x: Shaped[Array, "batch length ..."], picked: Int[Array, "batch picked"] | None) -> Shaped[Array, "..."]:
    """The picked positions of each row, or all."""
    if picked is None:
        return x
    return jnp.take_along_axis(x, picked.reshape(*picked.shape, *(1,) * (x.ndim - 2)), axis=1)


def rotate(
    x: Float[Array, "batch length heads width"], positions: Int[Array, "batch length"], theta: float
) -> Float[Array, "batch length heads width"]:
    """Rotary positions (arXiv 2104.09864): turns the pairs ``(i, i + width/2)`` by ``position / theta^(2i/width)``."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
