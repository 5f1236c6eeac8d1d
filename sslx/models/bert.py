"""BERT (arXiv 1810.04805): embeddings, encoder, and the heads it is pretrained with.

The defaults are the original to the letter, since weights are exchanged with Hugging Face; ``MODERN`` is the
ModernBERT-like variant (pre-LN, RoPE, GeGLU, no biases).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sslx.errors import UserError
from sslx.models.layers import NEVER, Dense, Dropout, Norm, activation, add_bias, bert_init, look_up, padded_vocabulary
from sslx.models.transformer import Transformer
from sslx.models.transformer_config import TransformerConfig

# Published sizes (google-research/bert, "BERT miniatures"): layers, width, heads; mlp_width is 4 * width.
SIZES = {
    "tiny": dict(layers=2, width=128, heads=2, mlp_width=512),
    "mini": dict(layers=4, width=256, heads=4, mlp_width=1024),
    "small": dict(layers=4, width=512, heads=8, mlp_width=2048),
    "base": dict(layers=12, width=768, heads=12, mlp_width=3072),
    "large": dict(layers=24, width=1024, heads=16, mlp_width=4096),
}

# google-research/electra: base and large are BERT's.
ELECTRA_SIZES = {
    "small": dict(layers=12, width=256, heads=4, mlp_width=1024, embed_width=128),
    "base": SIZES["base"],
    "large": SIZES["large"],
}

MODERN = dict(norm_position="pre", positions="rope", glu=True, bias=False, norm_eps=1e-5)


# How google-research/electra starts the two layers for which it names nothing: 0.02 would be a fifth of it.
glorot_init = nn.initializers.glorot_uniform()


@dataclasses.dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """``config.model`` of ``name="bert"``."""

    name: str = "bert"
    max_length: int = 512  # rows of the learned position table
    token_types: int = 2
    embed_width: int | None = None  # of the embeddings, projected to ``width`` (ELECTRA); None: ``width``

    @property
    def table_width(self) -> int:
        """Width of the embedding tables."""
        return self.width if self.embed_width is None else self.embed_width

    def encoder(self, vocab_size: int) -> BertEncoder:
        """The Linen module of the encoder."""
        return BertEncoder(self, vocab_size)

    def check(self, seq_len: int) -> None:
        """Refuses rows that are longer than the position table.

        Raises:
          UserError: ``config.data.seq_len`` is above ``config.model.max_length``.
        """
        check_length(self, seq_len)


def check_length(config: Any, seq_len: int) -> None:
    """Refuses rows that are longer than the model's position table, if it has one.

    Raises:
      UserError: ``seq_len`` is above ``config.max_length``.
    """
    if config.positions == "learned" and seq_len > config.max_length:
        raise UserError(
            f"config.data.seq_len {seq_len} is longer than config.model.max_length {config.max_length}; "
            f"expected at most {config.max_length}"
        )


class Embeddings(nn.Module):
    """Word, position (unless RoPE) and token-type embeddings, summed, normalised, dropped out; projected if narrow."""

    config: BertConfig
    vocab_size: int

    def setup(self):
        config = self.config
        table = lambda name, axis, rows: self.param(  # noqa: E731
            name, nn.with_logical_partitioning(bert_init, (axis, "embed")), (rows, config.table_width)
        )
        self.word = table("word", "vocab", padded_vocabulary(self.vocab_size))
        if config.positions == "learned":
            self.position = table("position", "length", config.max_length)
        self.token_type = table("token_type", "types", config.token_types)
        self.norm = Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype)
        self.drop = Dropout(config.dropout)
        if config.table_width != config.width:
            self.project = Dense(config.width, (None, "embed"), kernel_init=glorot_init, dtype=config.compute_dtype)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length width"]:
        return self.projected(self.summed(tokens, token_types, positions, deterministic=deterministic))

    def summed(
        self,
        tokens: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length table_width"]:
        """The embeddings at the tables' own width, which models of several widths may share (ELECTRA)."""
        x = look_up(self.word, "act_vocab", tokens) + look_up(self.token_type, None, token_types)
        if self.config.positions == "learned":
            x = x + look_up(self.position, None, positions)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        return self.drop(self.norm(x), deterministic=deterministic)

    def projected(self, x: Float[Array, "batch length table_width"]) -> Float[Array, "batch length width"]:
        """The embeddings at the model's width."""
        return x if self.config.table_width == self.config.width else self.project(x)


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
        x = self.embeddings(*embedded(batch, self.config), deterministic=deterministic)
        return self.transformer(x, batch["segment_ids"], batch["positions"], picked, deterministic=deterministic)

    def each_layer(self, batch: dict[str, Any], keep: Callable[[Array], Array]) -> Shaped[Array, "layers ..."]:
        """What ``keep`` makes of each layer's MLP output ``[batch, length, width]``; no dropout."""
        x = self.embeddings(*embedded(batch, self.config), deterministic=True)
        return self.transformer.each_layer(x, batch["segment_ids"], batch["positions"], keep)


def embedded(batch: dict[str, Any], config: BertConfig) -> tuple[Int[Array, "batch length"], ...]:
    """What is embedded of a batch: its tokens, token types and positions."""
    tokens = batch["tokens"]
    # A model of one type (RoBERTa) tells the texts of a pair apart by the separators between them alone.
    typed = "token_types" in batch and config.token_types > 1
    return tokens, batch["token_types"] if typed else jnp.zeros_like(tokens), batch["positions"]


class MaskedTokenHead(nn.Module):
    """Transform and tied vocabulary projection, on picked positions only."""

    config: BertConfig
    vocab_size: int

    @nn.compact
    def __call__(
        self, picked: Float[Array, "batch picked width"], word_table: Float[Array, "padded_vocab table_width"]
    ) -> Float[Array, "batch picked padded_vocab"]:
        config = self.config
        x = Dense(config.table_width, ("embed", None), config.bias, dtype=config.compute_dtype, name="transform")(
            picked
        )
        x = activation(config.activation)(x)
        x = Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype, name="norm")(x)
        logits = jnp.einsum("bpd,vd->bpv", x, word_table.astype(x.dtype), preferred_element_type=jnp.float32)
        padded = word_table.shape[0]
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (padded,))
        # The rows that pad the vocabulary must take no probability, or the loss would not be that of the vocabulary.
        bias = jnp.where(jnp.arange(padded) < self.vocab_size, bias, NEVER)
        return nn.with_logical_constraint(add_bias(logits, bias), ("act_batch", None, "act_vocab"))


class Pooler(nn.Module):
    """tanh of a dense layer on the first token's hidden state."""

    config: BertConfig

    @nn.compact
    def __call__(self, first: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        config = self.config
        return jnp.tanh(Dense(config.width, ("embed", None), dtype=config.compute_dtype, name="dense")(first))


class DiscriminatorHead(nn.Module):
    """ELECTRA's head (arXiv 2003.10555): for each token, the logit of its having been replaced."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length"]:
        config = self.config
        x = Dense(config.width, ("embed", None), dtype=config.compute_dtype, name="transform")(x)
        x = activation(config.activation)(x)
        out = Dense(1, ("embed", None), kernel_init=glorot_init, dtype=config.compute_dtype, name="out")
        return out(x)[..., 0].astype(jnp.float32)
