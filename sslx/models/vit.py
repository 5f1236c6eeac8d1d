"""ViT (arXiv 2010.11929): an image as a sequence of patches, with tokens that are no patch in front.

In: ``image`` float32[batch, height, width, channels] in [0, 1], or uint8. Out: hidden states of the tokens in front
(class token, registers) and of the patches, in reading order. Blocks are pre-LN; the patch embedding is one dense layer
on the flattened patch, which is the convolution of the paper's code.

Given which patches are ``visible``, only these go through the transformer, with the positions they have in the image:
what a masked autoencoder's encoder does (arXiv 2111.06377). Given which are ``hidden`` and a token, that token stands
in their place (SimMIM, arXiv 2111.09886). Pictures may be smaller than the config's, as local crops are (DINO, arXiv
2104.14294): positions are interpolated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from sslx.errors import UserError, choose
from sslx.models.attention import attend
from sslx.models.layers import Dense, Dropout, Initializer, Norm, bert_init, look_up
from sslx.models.pixels import check_pixels, normalised, patchify, take_patches
from sslx.models.transformer import MLP, Transformer
from sslx.models.transformer_config import TransformerConfig

# Published sizes (the paper's table 1; tiny and small are DeiT's, arXiv 2012.12877); mlp_width is 4 * width.
SIZES = {
    "tiny": dict(layers=12, width=192, heads=3, mlp_width=768),
    "small": dict(layers=12, width=384, heads=6, mlp_width=1536),
    "base": dict(layers=12, width=768, heads=12, mlp_width=3072),
    "large": dict(layers=24, width=1024, heads=16, mlp_width=4096),
    "huge": dict(layers=32, width=1280, heads=16, mlp_width=5120, patch_size=14),
}
# For pictures of 28 or 32 pixels, on a CPU.
SMALL_PICTURES = dict(layers=4, width=128, heads=4, mlp_width=512, patch_size=4)

IMAGENET = dict(pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class VitConfig(TransformerConfig):
    """``config.model`` of ``name="vit"``."""

    position_kinds = ("learned", "sincos", "rope")  # sincos: fixed; rope: of rows and columns

    name: str = "vit"
    norm_position: str = "pre"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    image_size: int = 224  # height and width
    patch_size: int = 16
    channels: int = 3
    class_token: bool = True
    registers: int = 0  # further tokens in front (arXiv 2309.16588)
    pool: str = "class"  # what an image's features are: class (token) | mean (of the patches) | attention
    init: str = "truncated_normal"  # of kernels: truncated_normal | xavier (uniform, as MAE's)
    pixel_mean: tuple[float, ...] = (0.5,)  # taken from each channel (or one for all), and
    pixel_std: tuple[float, ...] = (0.5,)  # what the rest is divided by

    def __post_init__(self):
        super().__post_init__()
        for name in ("image_size", "patch_size", "channels"):
            if getattr(self, name) < 1:
                raise UserError(f"config.model.{name} is {getattr(self, name)}; expected at least 1")
        if self.registers < 0:
            raise UserError(f"config.model.registers is {self.registers}; expected at least 0")
        if self.image_size % self.patch_size:
            raise UserError(
                f"config.model.image_size {self.image_size} does not divide into patches of {self.patch_size}"
            )
        if self.positions != "learned" and (self.width // self.heads if self.positions == "rope" else self.width) % 4:
            what = "head width" if self.positions == "rope" else "width"
            raise UserError(f"config.model.positions={self.positions} needs a {what} that divides by 4")
        choose(self.pool, ("class", "mean", "attention"), "config.model.pool")
        choose(self.init, ("truncated_normal", "xavier"), "config.model.init")
        if self.pool == "class" and not self.class_token:
            raise UserError("config.model.pool is 'class' without config.model.class_token; expected mean or attention")
        check_pixels(self.channels, self.pixel_mean, self.pixel_std)

    @property
    def kernel_init(self) -> Initializer:
        return bert_init if self.init == "truncated_normal" else nn.initializers.xavier_uniform()

    @property
    def front(self) -> int:
        """How many tokens stand before the patches."""
        return int(self.class_token) + self.registers

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return self.grid**2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return self.patch_size**2 * self.channels

    def encoder(self) -> VitEncoder:
        """The Linen module of the encoder."""
        return VitEncoder(self)

    def normalised(self, image: Any) -> Float[Array, "batch height width channels"]:
        """Pixels as the patch embedding takes them, float32."""
        return normalised(image, self.pixel_mean, self.pixel_std)

    def pixels(self, patches: Float[Array, "batch some values"]) -> Float[Array, "batch some values"]:
        """Pixels in [0, 1] of patches that are `normalised`."""
        mean, std = (jnp.array(values, jnp.float32) for values in (self.pixel_mean, self.pixel_std))
        return (patches.reshape(*patches.shape[:-1], -1, self.channels) * std + mean).reshape(patches.shape)

    def flops_per_image(self, visible: int | None = None) -> float:
        """Forward FLOPs of one image's states, with all patches or so many of them."""
        patches = self.patches if visible is None else visible
        return 2 * patches * self.patch_values * self.width + self.flops_per_row(self.front + patches)

    def features_flops(self) -> float:
        """Forward FLOPs of one image's features."""
        if self.pool != "attention":
            return self.flops_per_image()
        mlp = (6 if self.glu else 4) * self.width * self.mlp_width
        return self.flops_per_image() + 4 * (self.patches + 1) * self.width**2 + 4 * self.patches * self.width + mlp


def places(grid: int, whole: int) -> Float[np.ndarray, "patches 2"]:
    """Row and column of each patch, from 0, of a picture with ``grid`` patches along a side.

    A smaller crop than the encoder was made for spans all of its ``whole`` places, in larger steps: what is in its
    middle stands in their middle, as DINO interpolates its table of positions.
    """
    place = np.stack(np.divmod(np.arange(grid**2), grid), axis=-1)
    return place if grid == whole else (place + 0.5) * (whole / grid) - 0.5


@functools.cache
def sincos_table(grid: int, width: int, whole: int | None = None) -> Float[np.ndarray, "patches width"]:
    """Fixed positions: sines and cosines of the column in one half of the features, of the row in the other (MAE's)."""
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = places(grid, whole or grid).T
    parts = [turn(place[:, None] * frequencies) for place in (columns, rows) for turn in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class VitEncoder(nn.Module):
    """Normalised pixels, patch embedding, tokens in front, positions, transformer with a last norm, pooling."""

    config: VitConfig

    def setup(self):
        config = self.config
        self.patches = Dense(config.width, (None, "embed"), kernel_init=config.kernel_init, dtype=config.compute_dtype)
        table = lambda name, axis, rows: self.param(  # noqa: E731
            name, nn.with_logical_partitioning(bert_init, (axis, "embed")), (rows, config.width)
        )
        if config.class_token:
            self.class_token = table("class_token", None, 1)
        if config.registers:
            self.register_tokens = table("registers", None, config.registers)
        if config.positions == "learned":
            self.position = table("position", "length", config.patches + int(config.class_token))
        self.drop = Dropout(config.dropout)
        self.transformer = Transformer(config)
        if config.pool == "attention":
            self.attention_pool = AttentionPool(config)

    def __call__(
        self,
        batch: dict[str, Any],
        *,
        visible: Int[Array, "batch visible"] | None = None,
        hidden: tuple[Int[Array, "batch hidden"], Float[Array, " width"]] | None = None,
        deterministic: bool,
    ) -> Float[Array, "batch tokens width"]:
        """Hidden states: of the tokens in front, then of the patches.

        Args:
          batch: With ``image``.
          visible: Patches that are all there is; None: every patch.
          hidden: Patches in whose place a token stands, and that token.
          deterministic: No dropout.
        """
        x, positions = self.tokens(batch, visible, hidden)
        x = self.drop(x, deterministic=deterministic)
        return self.transformer(x, None, positions, deterministic=deterministic)

    def tokens(
        self,
        batch: dict[str, Any],
        visible: Int[Array, "batch visible"] | None = None,
        hidden: tuple[Int[Array, "batch hidden"], Float[Array, " width"]] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], Int[Array, "batch tokens axes"]]:
        """What the first layer sees, and where each token stands."""
        config = self.config
        dtype, grid = config.compute_dtype, batch["image"].shape[1] // config.patch_size
        seen = lambda table: table if visible is None else look_up(table, None, visible)  # noqa: E731
        x = patchify(config.normalised(batch["image"]), config.patch_size)
        x = self.patches(x if visible is None else take_patches(x, visible))
        if hidden is not None:
            which, token = hidden
            covered = jnp.zeros(x.shape[:2], bool).at[jnp.arange(len(x))[:, None], which].set(True)
            x = jnp.where(covered[..., None], token.astype(x.dtype), x)
        front = []
        if config.class_token:
            front.append(self.class_token)
        if config.positions == "learned":
            if front:
                front[0] = front[0] + self.position[:1]
            table = self.position[int(config.class_token) :]
            if grid != config.grid:
                square = table.reshape(config.grid, config.grid, config.width)
                table = jax.image.resize(square, (grid, grid, config.width), "cubic", antialias=False)
                table = table.reshape(grid**2, config.width)
            x = x + seen(table).astype(dtype)
        elif config.positions == "sincos":
            x = x + seen(jnp.asarray(sincos_table(grid, config.width, config.grid), dtype))
        if config.registers:
            front.append(self.register_tokens)
        positions = self.positions(x.shape[0], visible, grid)
        if front:
            tokens = jnp.concatenate(front).astype(dtype)
            x = jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)
        return nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed")), positions

    def each_layer(self, batch: dict[str, Any], keep: Callable[[Array], Array]) -> Shaped[Array, "layers ..."]:
        """What ``keep`` makes of each layer's MLP output, before it joins the residual stream; no dropout."""
        x, positions = self.tokens(batch)
        return self.transformer.each_layer(x, None, positions, keep)

    def attention(self, batch: dict[str, Any]) -> Float[Array, "batch heads patches"]:
        """How much the last layer's class token takes of each patch; without one, all patches on average."""
        x, positions = self.tokens(batch)
        shares = self.transformer.last_attention(x, None, positions)
        front = self.config.front
        return jnp.mean(shares[:, :, :1] if self.config.class_token else shares[:, :, front:], axis=2)[..., front:]

    def positions(
        self, rows: int, visible: Int[Array, "batch visible"] | None, grid: int
    ) -> Shaped[Array, "batch tokens axes"]:
        """Row and column of each token, from 1; those in front stand at 0, which RoPE does not turn."""
        front = self.config.front
        place = jnp.asarray(places(grid, self.config.grid) + 1)
        place = jnp.broadcast_to(place, (rows, *place.shape))
        place = place if visible is None else take_patches(place, visible)
        return jnp.pad(place, [(0, 0), (front, 0), (0, 0)])

    def pooled(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        """One vector an image from its hidden states, float32."""
        if self.config.pool == "class":
            return x[:, 0].astype(jnp.float32)
        patches = x[:, self.config.front :]
        if self.config.pool == "attention":
            return self.attention_pool(patches).astype(jnp.float32)
        return jnp.mean(patches.astype(jnp.float32), axis=1)

    def features(self, batch: dict[str, Any], *, deterministic: bool) -> Float[Array, "batch width"]:
        """One vector an image, float32."""
        return self.pooled(self(batch, deterministic=deterministic))


class AttentionPool(nn.Module):
    """One learned query that attends to all patches, then an MLP (arXiv 2106.04560's MAP head)."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch patches width"]) -> Float[Array, "batch width"]:
        config = self.config

        def dense(name: str) -> Dense:
            return Dense(
                config.width, ("embed", "heads"), kernel_init=config.kernel_init, dtype=config.compute_dtype, name=name
            )

        probe = self.param("probe", nn.with_logical_partitioning(bert_init, (None, "embed")), (1, config.width))
        probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, config.width))
        split = lambda y: y.reshape(*y.shape[:2], config.heads, -1)  # noqa: E731
        y = attend(split(dense("query")(probe)), split(dense("key")(x)), split(dense("value")(x)), None, None)
        out = Dense(
            config.width, ("heads", "embed"), kernel_init=config.kernel_init, dtype=config.compute_dtype, name="out"
        )
        y = out(y.reshape(*y.shape[:2], config.width))
        norm = Norm(config.norm, config.norm_eps, config.bias, config.compute_dtype, name="norm")
        return (y + MLP(config, name="mlp")(norm(y)))[:, 0]
