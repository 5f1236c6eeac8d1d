"""BERT (arXiv 1810.04805): embeddings, encoder, and the heads it is pretrained with.

The defaults are the original to the letter, since weights are exchanged with Hugging Face; ``MODERN`` is the
ModernBERT-like variant (pre-LN, RoPE, GeGLU, no biases).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sslx.models.layers import Dense, Dropout, Norm, activation, add_bias, bert_init
from sslx.models.transformer import Transformer, TransformerConfig

# Published sizes (google-research/bert, "BERT miniatures"): layers, width, heads; mlp_width is 4 * width.
SIZES = {
    "tiny": dict(layers=2, width=128, heads=2, mlp_width=512),
    "mini": dict(layers=4, width=256, heads=4, mlp_width=1024),
    "small": dict(layers=4, width=512, heads=8, mlp_width=2048),
    "base": dict(layers=12, width=768, heads=12, mlp_width=3072),
    "large": dict(layers=24, width=1024, heads=16, mlp_width=4096),
}

MODERN = dict(norm_position="pre", positions="rope", glu=True, bias=False, norm_eps=1e-5)


@dataclasses.dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """``config.model`` of ``name="bert"``."""

    name: str = "bert"
    max_length: int = 512  # rows of the learned position table
    token_types: int = 2


def padded_vocabulary(size: int) -> int:
    """The vocabulary's size rounded up to a multiple of 128, which matrix units and tensor parallelism like."""
    return -(-size // 128) * 128


class Embeddings(nn.Module):
    """Word, position (unless RoPE) and token-type embeddings, summed, normalised, dropped out."""

    config: BertConfig
    vocab_size: int

    def setup(self):
        config = self.config
        table = lambda name, axis, rows: self.param(  # noqa: E731
            name, nn.with_logical_partitioning(bert_init, (axis, "embed")), (rows, config.width)
        )
        self.word = table("word", "vocab", padded_vocabulary(self.vocab_size))
        if config.positions == "learned":
            self.position = table("position", "length", config.max_length)
        self.token_type = table("token_type", "types", config.token_types)
        self.norm = Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype)
        self.drop = Dropout(config.dropout)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length width"]:
        def look_up(table: Array, axis: str | None, ids: Array) -> Array:
            # Gathered over fsdp first: looking up rows in a table whose width is split makes XLA replicate the result.
            return jnp.take(nn.with_logical_constraint(table, (axis, None)), ids, axis=0)

        x = look_up(self.word, "act_vocab", tokens) + look_up(self.token_type, None, token_types)
        if self.config.positions == "learned":
            x = x + look_up(self.position, None, positions)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        return self.drop(self.norm(x), deterministic=deterministic)


class BertEncoder(nn.Module):
    """Embeddings and transformer; what fine-tuning and export reload."""

    config: BertConfig
    vocab_size: int

    def setup(self):
        self.embeddings = Embeddings(self.config, self.vocab_size)
        self.transformer = Transformer(self.config)

    def __call__(
        self, batch: dict[str, Any], picked: Int[Array, "batch picked"] | None = None, *, deterministic: bool
    ) -> Float[Array, "batch queries width"]:
        """Hidden states of all positions, or of ``picked`` alone.

        Args:
          batch: int32[batch, length] ``tokens``, ``segment_ids``, ``positions`` and, if there, ``token_types``.
          picked: Positions to compute; None: all.
          deterministic: No dropout.
        """
        tokens = batch["tokens"]
        token_types = batch.get("token_types", jnp.zeros_like(tokens))
        x = self.embeddings(tokens, token_types, batch["positions"], deterministic=deterministic)
        return self.transformer(x, batch["segment_ids"], batch["positions"], picked, deterministic=deterministic)


class MaskedTokenHead(nn.Module):
    """Transform and tied vocabulary projection, on picked positions only."""

    config: BertConfig
    vocab_size: int

    @nn.compact
    def __call__(
        self, picked: Float[Array, "batch picked width"], word_table: Float[Array, "padded_vocab width"]
    ) -> Float[Array, "batch picked padded_vocab"]:
        config = self.config
        x = Dense(config.width, ("embed", None), config.bias, dtype=config.compute_dtype, name="transform")(picked)
        x = activation(config.activation)(x)
        x = Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype, name="norm")(x)
        logits = jnp.einsum("bpd,vd->bpv", x, word_table.astype(x.dtype), preferred_element_type=jnp.float32)
        padded = word_table.shape[0]
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (padded,))
        # The rows that pad the vocabulary must take no probability, or the loss would not be that of the vocabulary.
        bias = jnp.where(jnp.arange(padded) < self.vocab_size, bias, -1e9)
        return nn.with_logical_constraint(add_bias(logits, bias), ("act_batch", None, "act_vocab"))


class Pooler(nn.Module):
    """tanh of a dense layer on the first token's hidden state."""

    config: BertConfig

    @nn.compact
    def __call__(self, first: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        config = self.config
        return jnp.tanh(Dense(config.width, ("embed", None), dtype=config.compute_dtype, name="dense")(first))


def mean_pool(
    x: Float[Array, "batch length width"], segment_ids: Int[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """Mean over the tokens that are not padding, float32."""
    weight = (segment_ids > 0).astype(jnp.float32)[..., None]
    return jnp.sum(x.astype(jnp.float32) * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
