"""Transformer blocks, written once: post-LN and pre-LN, both ways or causal, learned positions or RoPE, gated or not.

In: the residual stream ``[batch, length, width]``, segment ids and positions. Out: the same shape, or the picked
positions alone; or, with a cache of keys and values, the states of tokens that extend what the cache holds. The
layers are one ``scan`` over parameters stacked ``[layers, ...]``. Post-LN with biases, LayerNorm and GELU is BERT to
the letter (arXiv 1810.04805, google-research/bert); pre-LN with RoPE, GeGLU and no biases is ModernBERT's block (arXiv
2412.13663); causal pre-LN with tanh GELU is GPT-2's, and with RoPE, RMSNorm and SwiGLU LLaMA's (arXiv 2302.13971).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from sslx.models.attention import attend, attention_probabilities
from sslx.models.layers import Dense, Dropout, Norm, activation, skip_branch
from sslx.models.transformer_config import REMAT, TransformerConfig


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, by layer, with room for those to come.

    All rows are filled from the left to the same place, ``used``; a row with fewer tokens has padding in front, whose
    segment is 0, as is that of places not used yet.
    """

    keys: Float[Array, "layers batch length heads head_width"]
    values: Float[Array, "layers batch length heads head_width"]
    segment_ids: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]
    used: Int[Array, ""]

    @classmethod
    def empty(cls, config: TransformerConfig, rows: int, length: int) -> Cache:
        """Room for ``length`` tokens in each of ``rows`` rows."""
        shape = (config.layers, rows, length, config.heads, config.width // config.heads)
        keys, values = (jnp.zeros(shape, config.compute_dtype) for _ in range(2))
        segment_ids, positions = (jnp.zeros((rows, length), jnp.int32) for _ in range(2))
        return cls(keys, values, segment_ids, positions, jnp.zeros((), jnp.int32))


@flax.struct.dataclass
class LayerCache:
    """One layer's part of a `Cache`, and what all layers share of it, with the new tokens' places filled in."""

    key: Float[Array, "batch length heads head_width"]
    value: Float[Array, "batch length heads head_width"]
    segment_ids: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]
    used: Int[Array, ""]  # where the new tokens go


class SelfAttention(nn.Module):
    """Multi-head self-attention within segments, for all positions, for the picked ones only, or on from a cache."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"] | None,
        positions: Int[Array, "batch length"],
        picked: Int[Array, "batch picked"] | None = None,
        cache: LayerCache | None = None,
        *,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch queries width"], LayerCache | None]:
        config = self.config
        head_width = config.width // config.heads

        def project(name: str, of: Array, length: str) -> Array:
            dense = Dense(
                config.width, ("embed", "heads"), config.bias, config.kernel_init, config.compute_dtype, name=name
            )
            y = dense(of).reshape(*of.shape[:2], config.heads, head_width)
            return nn.with_logical_constraint(y, ("act_batch", length, "act_heads", None))

        key, value = project("key", x, "act_keys"), project("value", x, "act_keys")
        x, query_positions = _pick(x, picked), _pick(positions, picked)
        query_segment_ids = None if segment_ids is None else _pick(segment_ids, picked)
        query = project("query", x, "act_length")
        if config.qk_norm:
            query, key = (
                Norm("rmsnorm", config.norm_eps, dtype=config.compute_dtype, name=f"{name}_norm")(y)
                for name, y in (("query", query), ("key", key))
            )
        if config.positions == "rope":
            query = rotate(query, query_positions, config.rope_theta)
            key = rotate(key, positions, config.rope_theta)
        if cache is not None:
            place = (0, cache.used, 0, 0)
            cache = cache.replace(
                key=jax.lax.dynamic_update_slice(cache.key, key, place),
                value=jax.lax.dynamic_update_slice(cache.value, value, place),
            )
            key, value, segment_ids, positions = cache.key, cache.value, cache.segment_ids, cache.positions
        self.sow("layer", "compared", (query, key))  # costs nothing unless a caller asks for the collection
        rng = None
        if config.attention_dropout and not deterministic:
            rng = self.make_rng("dropout")
        # Parameters are made from rows of one token, and a token that continues a row asks all that came before.
        whole = cache is None and not self.is_initializing() and not (config.causal and picked is not None)
        y = attend(
            query,
            key,
            value,
            query_segment_ids,
            segment_ids,
            order=(query_positions, positions) if config.causal else None,
            dropout_rate=config.attention_dropout,
            dropout_key=rng,
            implementation=config.attention if whole else "xla",
        )
        y = y.reshape(*x.shape[:2], config.width)
        out = Dense(
            config.width, ("heads", "embed"), config.bias, config.residual_init, config.compute_dtype, name="out"
        )
        return out(y), cache


class MLP(nn.Module):
    """The position-wise part: up, activation (gated or not), down."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        config = self.config

        def up(name: str) -> Array:
            dense = Dense(
                config.mlp_width, ("embed", "mlp"), config.bias, config.kernel_init, config.compute_dtype, name=name
            )
            return nn.with_logical_constraint(dense(x), ("act_batch", "act_length", "act_mlp"))

        hidden = activation(config.activation)(up("up"))
        if config.glu:
            hidden = hidden * up("gate")
        down = Dense(
            config.width, ("mlp", "embed"), config.bias, config.residual_init, config.compute_dtype, name="down"
        )
        return down(hidden)


class Block(nn.Module):
    """One layer, for all positions, for the picked ones only, or on from a cache."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"] | None,
        positions: Int[Array, "batch length"],
        picked: Int[Array, "batch picked"] | None = None,
        cache: LayerCache | None = None,
        skipped: Float[Array, ""] | float = 0.0,
        *,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch queries width"], LayerCache | None]:
        """``skipped`` is the share of rows whose branches this layer skips."""
        config = self.config
        pre = config.norm_position == "pre"
        attention, mlp = SelfAttention(config, name="attention"), MLP(config, name="mlp")
        drop = Dropout(config.dropout)

        def branch(y: Array, name: str) -> Array:
            if config.layer_scale:
                start = nn.with_logical_partitioning(nn.initializers.constant(config.layer_scale), ("norm",))
                y = y * self.param(f"{name}_layer_scale", start, (config.width,)).astype(y.dtype)
            y = drop(y, deterministic=deterministic)
            if not config.drop_path or deterministic:
                return y
            return skip_branch(y, skipped, self.make_rng("dropout"))

        def norm(name: str) -> Norm:
            return Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype, name=name)

        attention_norm, mlp_norm = norm("attention_norm"), norm("mlp_norm")
        attended, cache = attention(
            attention_norm(x) if pre else x, segment_ids, positions, picked, cache, deterministic=deterministic
        )
        x = _pick(x, picked) + branch(attended, "attention")
        x = x if pre else attention_norm(x)
        y = mlp(mlp_norm(x) if pre else x)
        self.sow("layer", "mlp_out", y)  # costs nothing unless a caller asks for the collection
        x = x + branch(y, "mlp")
        x = x if pre else mlp_norm(x)
        return nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed")), cache


class Transformer(nn.Module):
    """The stack of blocks; with pre-LN, a last norm, since nothing else would normalise the residual stream."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.block = Block(config, parent=None)

        def init_layers(key: PRNGKeyArray) -> Any:
            x, ids = jnp.zeros((1, 1, config.width), config.compute_dtype), jnp.zeros((1, 1), jnp.int32)
            one = lambda k: self.block.init(k, x, ids, ids, deterministic=True)["params"]  # noqa: E731
            layers = jax.vmap(one)(jax.random.split(key, config.layers))
            return nn.meta.add_axis(layers, 0, {nn.PARTITION_NAME: "layers"})

        self.layers = self.param("layers", init_layers)
        if config.norm_position == "pre":
            self.final_norm = Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"] | None,
        positions: Int[Array, "batch length ..."],
        picked: Int[Array, "batch picked"] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "batch queries width"]:
        """Hidden states of all positions or, given ``picked``, of those alone.

        Without ``segment_ids`` all tokens of a row are of one segment.

        Nothing above the last layer looks at the other positions then, so the last layer's queries, output projection
        and MLP are computed for the picked ones only: the same numbers for a fraction of that layer's arithmetic.
        """
        x, _ = self._run(x, segment_ids, positions, picked, None, deterministic)
        return self.final_norm(x) if self.config.norm_position == "pre" else x

    def each_layer(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"] | None,
        positions: Int[Array, "batch length"],
        keep: Callable[[Array], Array],
    ) -> Shaped[Array, "layers ..."]:
        """What ``keep`` makes of each layer's MLP output, before it joins the residual stream; no dropout."""
        return self._run(x, segment_ids, positions, None, keep, True)[1]

    def last_attention(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"] | None,
        positions: Int[Array, "batch length ..."],
    ) -> Float[Array, "batch heads length length"]:
        """How much each position of the last layer takes of each, by head; no dropout, and not for causal models."""
        x, _ = self._run(x, segment_ids, positions, None, None, True, self.config.layers - 1)
        last = jax.tree.map(lambda array: array[-1], self.layers)
        _, inside = self.block.apply({"params": last}, x, segment_ids, positions, deterministic=True, mutable=["layer"])
        query, key = inside["layer"]["attention"]["compared"][0]
        return attention_probabilities(query, key, segment_ids, segment_ids)

    def after(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"] | None,
        positions: Int[Array, "batch length ..."],
        layers: int,
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length width"]:
        """Hidden states after so many layers; those before the last layer are normalised without scale and bias.

        The residual stream of pre-LN grows with the depth, and no norm of a middle layer belongs to its states.
        """
        if layers == self.config.layers:
            return self(x, segment_ids, positions, deterministic=deterministic)
        x, _ = self._run(x, segment_ids, positions, None, None, deterministic, layers)
        return jax.nn.standardize(x.astype(jnp.float32), epsilon=self.config.norm_eps)

    def _run(
        self,
        x: Array,
        segment_ids: Array | None,
        positions: Array,
        picked: Array | None,
        keep: Callable[[Array], Array] | None,
        deterministic: bool,
        layers: int | None = None,
    ) -> tuple[Array, Array | None]:
        """The states after the last of ``layers`` (None: all) and, with ``keep``, what it made of each."""
        config = self.config
        key = None if deterministic else self.make_rng("dropout")

        def apply(x: Array, params: Any, layer: Array | int, picked: Array | None = None) -> tuple[Array, Array | None]:
            rngs = {} if deterministic else {"dropout": jax.random.fold_in(key, layer)}
            skipped = config.drop_path * layer / max(config.layers - 1, 1)
            given, wanted = (x, segment_ids, positions, picked, None, skipped), ["layer"] if keep else []
            (x, _), inside = self.block.apply(
                {"params": params}, *given, deterministic=deterministic, rngs=rngs, mutable=wanted
            )
            return x, keep(inside["layer"]["mlp_out"][0]) if keep else None

        if REMAT[config.remat] is not None:
            apply = jax.checkpoint(apply, policy=REMAT[config.remat], prevent_cse=False)
        layers = config.layers if layers is None else layers
        whole = layers if picked is None else config.layers - 1
        x, kept = jax.lax.scan(
            lambda x, scanned: apply(x, *scanned),
            x,
            (jax.tree.map(lambda array: array[:whole], self.layers), jnp.arange(whole)),
            unroll=self._unroll(whole),
        )
        if picked is not None:
            x, _ = apply(x, jax.tree.map(lambda array: array[-1], self.layers), whole, picked)
        return x, kept

    def extend(
        self,
        x: Float[Array, "batch new width"],
        segment_ids: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        cache: Cache,
    ) -> tuple[Float[Array, "batch new width"], Cache]:
        """Hidden states of new tokens that follow those in the cache, and the cache with them in it; no dropout.

        The caller sees to it that ``cache`` has room.
        """
        config = self.config
        shared = {
            "segment_ids": jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.used)),
            "positions": jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.used)),
        }

        def layer(x: Array, scanned: tuple) -> tuple[Array, tuple[Array, Array]]:
            params, key, value = scanned
            here = LayerCache(key, value, used=cache.used, **shared)
            x, here = self.block.apply({"params": params}, x, segment_ids, positions, None, here, deterministic=True)
            return x, (here.key, here.value)

        x, (keys, values) = jax.lax.scan(
            layer, x, (self.layers, cache.keys, cache.values), unroll=self._unroll(config.layers)
        )
        cache = Cache(keys, values, used=cache.used + x.shape[1], **shared)
        return (self.final_norm(x) if config.norm_position == "pre" else x), cache

    def _unroll(self, layers: int) -> int:
        # A CPU gains nothing from a small program and pays for copying every layer's slice; accelerators compile
        # faster.
        unroll = jax.default_backend() == "cpu" if self.config.unroll is None else self.config.unroll
        return max(layers, 1) if unroll else 1


def _pick(x: Shaped[Array, "batch length ..."], picked: Int[Array, "batch picked"] | None) -> Shaped[Array, "..."]:
    """The picked positions of each row, or all."""
    if picked is None:
        return x
    return jnp.take_along_axis(x, picked.reshape(*picked.shape, *(1,) * (x.ndim - 2)), axis=1)


def rotate(
    x: Float[Array, "batch length heads width"], positions: Int[Array, "batch length ..."], theta: float
) -> Float[Array, "batch length heads width"]:
    """Rotary positions (arXiv 2104.09864): turns the pairs ``(i, i + width/2)`` by ``position / theta^(2i/width)``.

    Of positions with several coordinates ``[batch, length, axes]``, each turns its own part of the features.
    """
    if positions.ndim == 3:
        parts = jnp.split(x, positions.shape[-1], axis=-1)
        turned = [rotate(part, positions[..., axis], theta) for axis, part in enumerate(parts)]
        return jnp.concatenate(turned, axis=-1)
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
