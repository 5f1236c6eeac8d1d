"""GPT: a causal transformer over tokens, with the embedding table as its head.

The defaults are GPT-2 to the letter (Radford et al. 2019, openai/gpt-2), since weights are exchanged with Hugging Face:
pre-LN, learned positions, tanh GELU, N(0, 0.02) (of the positions too, as Hugging Face and nanoGPT draw them;
openai/gpt-2's code has N(0, 0.01) there), projections to the residual stream smaller by the square root of twice the
depth. ``MODERN`` is LLaMA's block (arXiv 2302.13971) with query-key norm.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Float, Int

from sslx.models.bert import check_length
from sslx.models.layers import Dropout, Initializer, look_up, padded_vocabulary
from sslx.models.transformer import Cache, Transformer
from sslx.models.transformer_config import TransformerConfig

# Published sizes (openai/gpt-2; ``shakespeare_char`` is nanoGPT's CPU setting): layers, width, heads.
SIZES = {
    "shakespeare_char": dict(layers=4, width=128, heads=4, mlp_width=512),
    "small": dict(layers=12, width=768, heads=12, mlp_width=3072),
    "medium": dict(layers=24, width=1024, heads=16, mlp_width=4096),
    "large": dict(layers=36, width=1280, heads=20, mlp_width=5120),
    "xl": dict(layers=48, width=1600, heads=25, mlp_width=6400),
}

MODERN = dict(norm="rmsnorm", positions="rope", activation="silu", glu=True, bias=False, qk_norm=True)


@dataclasses.dataclass(frozen=True)
class GptConfig(TransformerConfig):
    """``config.model`` of ``name="gpt"``."""

    causal: ClassVar[bool] = True

    name: str = "gpt"
    norm_position: str = "pre"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    max_length: int = 1024  # rows of the learned position table

    @property
    def kernel_init(self) -> Initializer:
        return nn.initializers.normal(0.02)

    @property
    def residual_init(self) -> Initializer:
        # Every layer adds twice to the residual stream, whose variance would grow with the depth.
        return nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)

    def encoder(self, vocab_size: int) -> GptEncoder:
        """The Linen module of everything but the head, which has no parameters of its own."""
        return GptEncoder(self, vocab_size)

    def check(self, seq_len: int) -> None:
        """Refuses rows that are longer than the position table.

        Raises:
          UserError: ``config.data.seq_len`` is above ``config.model.max_length``.
        """
        check_length(self, seq_len)


class GptEmbeddings(nn.Module):
    """Word and position (unless RoPE) embeddings, summed and dropped out."""

    config: GptConfig
    vocab_size: int

    def setup(self):
        config = self.config
        table = lambda name, axis, rows: self.param(  # noqa: E731
            name, nn.with_logical_partitioning(config.kernel_init, (axis, "embed")), (rows, config.width)
        )
        self.word = table("word", "vocab", padded_vocabulary(self.vocab_size))
        if config.positions == "learned":
            self.position = table("position", "length", config.max_length)
        self.drop = Dropout(config.dropout)

    def __call__(
        self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"], *, deterministic: bool
    ) -> Float[Array, "batch length width"]:
        x = look_up(self.word, "act_vocab", tokens)
        if self.config.positions == "learned":
            x = x + look_up(self.position, None, positions)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        return self.drop(x.astype(self.config.compute_dtype), deterministic=deterministic)


class GptEncoder(nn.Module):
    """Embeddings and causal transformer; what fine-tuning, generation and export reload."""

    config: GptConfig
    vocab_size: int

    def setup(self):
        self.embeddings = GptEmbeddings(self.config, self.vocab_size)
        self.transformer = Transformer(self.config)

    def __call__(
        self, batch: dict[str, Any], picked: Int[Array, "batch picked"] | None = None, *, deterministic: bool
    ) -> Float[Array, "batch queries width"]:
        """Hidden states of all positions, or of ``picked`` alone.

        Args:
          batch: int32[batch, length] ``tokens``, ``segment_ids`` and ``positions``.
          picked: Positions to compute; None: all.
          deterministic: No dropout.
        """
        x = self.embeddings(batch["tokens"], batch["positions"], deterministic=deterministic)
        return self.transformer(x, batch["segment_ids"], batch["positions"], picked, deterministic=deterministic)

    def extend(self, batch: dict[str, Any], cache: Cache) -> tuple[Float[Array, "batch new width"], Cache]:
        """Hidden states of the tokens of ``batch``, which follow those in the cache, and the cache with them in it."""
        x = self.embeddings(batch["tokens"], batch["positions"], deterministic=True)
        return self.transformer.extend(x, batch["segment_ids"], batch["positions"], cache)
