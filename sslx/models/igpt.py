"""Image GPT (Chen et al. 2020, openai/image-gpt): a GPT over the colours of a picture's pixels in reading order.

In: ``image`` float32[batch, height, width, channels] in [0, 1], or uint8. Each pixel becomes the nearest colour of a
codebook, which is a parameter that nothing changes: it travels with the encoder. Before the first pixel stands a token
of its own. Out: hidden states; or, as an image's features, the mean over the states of a middle layer, where the paper
finds the best ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sslx.errors import UserError
from sslx.models.gpt import GptConfig, GptEncoder
from sslx.models.pixels import unit

# Published sizes (the paper's section 3.3); mlp_width is 4 * width.
SIZES = {
    "small": dict(layers=24, width=512, heads=8, mlp_width=2048),
    "medium": dict(layers=36, width=1024, heads=8, mlp_width=4096),
    "large": dict(layers=48, width=1536, heads=16, mlp_width=6144),
}


@dataclasses.dataclass(frozen=True)
class IgptConfig(GptConfig):
    """``config.model`` of ``name="igpt"``."""

    name: str = "igpt"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    image_size: int = 32  # height and width
    channels: int = 3
    colours: int = 512
    features_layer: int = 0  # whose states features are the mean of; 0: the middle one

    def __post_init__(self):
        super().__post_init__()
        if self.colours < 2:
            raise UserError(f"config.model.colours is {self.colours}; expected at least 2")
        if not 0 <= self.features_layer <= self.layers:
            raise UserError(f"config.model.features_layer is {self.features_layer}; expected 0 to {self.layers}")
        if self.positions == "learned" and self.length > self.max_length:
            raise UserError(
                f"config.model.max_length is {self.max_length}; expected at least the {self.length} pixels of "
                f"config.model.image_size {self.image_size}"
            )

    @property
    def length(self) -> int:
        """Pixels of an image."""
        return self.image_size**2

    @property
    def start(self) -> int:
        """The token before the first pixel; colours come before it."""
        return self.colours

    @property
    def features_depth(self) -> int:
        """How many layers features come out of."""
        return self.features_layer or (self.layers + 1) // 2

    def encoder(self, vocab_size: int = 0) -> IgptEncoder:
        """The Linen module of the encoder; its vocabulary is the colours and the start."""
        return IgptEncoder(self, self.colours + 1)

    def flops_per_image(self) -> float:
        """Forward FLOPs of one image's states."""
        return self.flops_per_row(self.length)

    def features_flops(self) -> float:
        """Forward FLOPs of one image's features: of the layers up to the one that they are read from."""
        return self.flops_per_image() * self.features_depth / self.layers


def nearest_colours(
    image: Float[Array, "batch height width channels"], codebook: Float[Array, "colours channels"]
) -> Int[Array, "batch height*width"]:
    """The number of the nearest colour of each pixel, in reading order."""
    pixels = image.reshape(image.shape[0], -1, image.shape[-1])
    # In full precision: accelerators round the factors of a product to so few bits that neighbours change places.
    product = jnp.einsum("bpc,kc->bpk", pixels, codebook, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.sum(codebook**2, axis=-1) - 2 * product
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


class IgptEncoder(GptEncoder):
    """The codebook and a GPT; ``vocab_size`` is that of its tokens."""

    config: IgptConfig

    def setup(self):
        super().setup()
        even = jnp.linspace(0.0, 1.0, self.config.colours)
        self.codebook = self.param(
            "codebook",
            nn.with_logical_partitioning(lambda key: jnp.tile(even[:, None], (1, self.config.channels)), (None, None)),
        )

    def tokens(self, image: Array) -> Int[Array, "batch length"]:
        """The colours of pictures."""
        return nearest_colours(unit(image), jax.lax.stop_gradient(self.codebook))

    def row(self, tokens: Int[Array, "batch length"]) -> dict[str, Array]:
        """What the transformer sees of colours: these shifted by one, with the start in front."""
        start = jnp.full((tokens.shape[0], 1), self.config.start, jnp.int32)
        shape = tokens.shape
        return {
            "tokens": jnp.concatenate([start, tokens[:, :-1]], axis=1),
            "segment_ids": jnp.ones(shape, jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
        }

    def features(self, batch: dict[str, Any], *, deterministic: bool) -> Float[Array, "batch width"]:
        """One vector an image, float32.

        The row ends one pixel early: what is read off is what predicts each pixel.
        """
        row = self.row(self.tokens(batch["image"]))
        x = self.embeddings(row["tokens"], row["positions"], deterministic=deterministic)
        depth, places = self.config.features_depth, (row["segment_ids"], row["positions"])
        x = self.transformer.after(x, *places, depth, deterministic=deterministic)
        return jnp.mean(x.astype(jnp.float32), axis=1)
