"""ViT (arXiv 2010.11929): an image as a sequence of patches with a class token in front.

In: ``image`` float32[batch, height, width, channels]. Out: hidden states of the class token and of the patches, in
reading order. Blocks are pre-LN; the patch embedding is one dense layer on the flattened patch, which is the
convolution of the paper's code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.errors import UserError
from sslx.models.layers import Dense, Dropout, bert_init
from sslx.models.transformer import Transformer, TransformerConfig

# Published sizes (the paper's table 1; tiny and small are DeiT's, arXiv 2012.12877); mlp_width is 4 * width.
SIZES = {
    "tiny": dict(layers=12, width=192, heads=3, mlp_width=768),
    "small": dict(layers=12, width=384, heads=6, mlp_width=1536),
    "base": dict(layers=12, width=768, heads=12, mlp_width=3072),
    "large": dict(layers=24, width=1024, heads=16, mlp_width=4096),
    "huge": dict(layers=32, width=1280, heads=16, mlp_width=5120, patch_size=14),
}


@dataclasses.dataclass(frozen=True)
class VitConfig(TransformerConfig):
    """``config.model`` of ``name="vit"``."""

    name: str = "vit"
    norm_position: str = "pre"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    image_size: int = 224  # height and width
    patch_size: int = 16
    channels: int = 3

    def __post_init__(self):
        super().__post_init__()
        for name in ("image_size", "patch_size", "channels"):
            if getattr(self, name) < 1:
                raise UserError(f"config.model.{name} is {getattr(self, name)}; expected at least 1")
        if self.image_size % self.patch_size:
            raise UserError(
                f"config.model.image_size {self.image_size} does not divide into patches of {self.patch_size}"
            )
        if self.positions != "learned":
            raise UserError(f"config.model.positions is {self.positions!r}; a ViT has learned ones")

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.image_size // self.patch_size) ** 2

    def encoder(self) -> VitEncoder:
        """The Linen module of the encoder."""
        return VitEncoder(self)


def patchify(
    image: Float[Array, "batch height width channels"], size: int
) -> Float[Array, "batch patches size*size*channels"]:
    """Square patches in reading order, each flattened by row, column and channel."""
    batch, height, width, channels = image.shape
    grid = image.reshape(batch, height // size, size, width // size, size, channels)
    return grid.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


class VitEncoder(nn.Module):
    """Patch embedding, class token, learned positions, transformer with a last norm."""

    config: VitConfig

    def setup(self):
        config = self.config
        self.patches = Dense(config.width, (None, "embed"), dtype=config.compute_dtype)
        table = lambda name, axis, rows: self.param(  # noqa: E731
            name, nn.with_logical_partitioning(bert_init, (axis, "embed")), (rows, config.width)
        )
        self.class_token = table("class_token", None, 1)
        self.position = table("position", "length", config.patches + 1)
        self.drop = Dropout(config.dropout)
        self.transformer = Transformer(config)

    def __call__(self, batch: dict[str, Any], *, deterministic: bool) -> Float[Array, "batch patches+1 width"]:
        """Hidden states; the class token's is the first."""
        dtype = self.config.compute_dtype
        x = self.patches(patchify(batch["image"], self.config.patch_size))
        first = jnp.broadcast_to(self.class_token.astype(dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + self.position.astype(dtype)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        x = self.drop(x, deterministic=deterministic)
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return self.transformer(x, segment_ids, positions, deterministic=deterministic)
