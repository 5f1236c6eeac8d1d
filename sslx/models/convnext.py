"""ConvNeXt (arXiv 2201.03545): depthwise 7 x 7 convolutions and MLPs on each place, without batch normalisation.

In: ``image`` float32[batch, height, width, channels] in [0, 1], or uint8. Out: feature maps of the last stage after a
last norm, or the norm of their mean, as the published classifier takes it. ``stem`` is the side of the patches that the
first convolution takes: 4 as published, 1 or 2 for pictures of 32 pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.errors import UserError, choose
from sslx.models.layers import Dense, Norm, bert_init, gelu, skip_branch
from sslx.models.pixels import check_pixels, normalised

# Blocks and channels of each stage; atto to nano are timm's.
SIZES = {
    "atto": dict(depths=(2, 2, 6, 2), widths=(40, 80, 160, 320)),
    "femto": dict(depths=(2, 2, 6, 2), widths=(48, 96, 192, 384)),
    "pico": dict(depths=(2, 2, 6, 2), widths=(64, 128, 256, 512)),
    "nano": dict(depths=(2, 2, 8, 2), widths=(80, 160, 320, 640)),
    "tiny": dict(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), widths=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)),
}
KERNEL = 7


@dataclasses.dataclass(frozen=True)
class ConvnextConfig:
    """``config.model`` of ``name="convnext"``."""

    name: str = "convnext"
    depths: tuple[int, ...] = SIZES["tiny"]["depths"]
    widths: tuple[int, ...] = SIZES["tiny"]["widths"]
    stem: int = 4
    image_size: int = 224  # height and width
    channels: int = 3
    drop_path: float = 0.0  # share of rows whose branch the last block skips; rises from 0
    layer_scale: float = 1e-6  # first value of a factor for each feature of a branch; 0: none
    dtype: str = "float32"  # computation; parameters are always float32
    pixel_mean: tuple[float, ...] = (0.5,)  # taken from each channel (or one for all), and
    pixel_std: tuple[float, ...] = (0.5,)  # what the rest is divided by

    def __post_init__(self):
        if len(self.depths) != len(self.widths) or not self.depths or min(*self.depths, *self.widths) < 1:
            raise UserError(
                f"config.model.depths is {self.depths} and config.model.widths {self.widths}; "
                "expected as many numbers in both, at least 1 each"
            )
        if not 0 <= self.drop_path < 1:
            raise UserError(f"config.model.drop_path is {self.drop_path}; expected 0 or a share below 1")
        down = self.stem * 2 ** (len(self.depths) - 1)
        if self.stem < 1 or self.image_size % down:
            raise UserError(
                f"config.model.image_size {self.image_size} does not divide by {down}, which config.model.stem "
                f"{self.stem} and {len(self.depths)} stages need"
            )
        if self.layer_scale < 0:
            raise UserError(f"config.model.layer_scale is {self.layer_scale}; expected at least 0")
        check_pixels(self.channels, self.pixel_mean, self.pixel_std)
        choose(self.dtype, ("float32", "bfloat16"), "config.model.dtype")

    @property
    def batch_norm(self) -> bool:
        """Whether a row's features in training depend on the others of its batch."""
        return False

    @property
    def features_width(self) -> int:
        """Numbers in an image's features."""
        return self.widths[-1]

    def encoder(self) -> Convnext:
        """The Linen module of the encoder."""
        return Convnext(self)

    def features_flops(self) -> float:
        """Forward FLOPs of one image's features."""
        return self.flops_per_image()

    def flops_per_image(self) -> float:
        """Forward FLOPs of one image."""
        side = self.image_size // self.stem
        total, before = 2.0 * side**2 * self.stem**2 * self.channels * self.widths[0], self.widths[0]
        for stage, (count, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage:
                side //= 2
                total += 2.0 * side**2 * 4 * before * width
            total += 2.0 * side**2 * count * width * (KERNEL**2 + 8 * width)
            before = width
        return total


class Block(nn.Module):
    """Depthwise convolution, norm, MLP four times as wide, scaled and added."""

    config: ConvnextConfig
    skipped: float

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w features"], *, deterministic: bool) -> Float[Array, "..."]:
        config, width, dtype = self.config, x.shape[-1], jnp.dtype(self.config.dtype)
        y = nn.Conv(
            width,
            (KERNEL, KERNEL),
            feature_group_count=width,
            dtype=dtype,
            kernel_init=nn.with_logical_partitioning(bert_init, (None, None, None, "embed")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
            name="depthwise",
        )(x)
        y = Norm("layernorm", 1e-6, dtype=dtype, name="norm")(y)
        y = Dense(4 * width, ("embed", "mlp"), dtype=dtype, name="up")(y)
        y = Dense(width, ("mlp", "embed"), dtype=dtype, name="down")(gelu(y))
        if config.layer_scale:
            start = nn.with_logical_partitioning(nn.initializers.constant(config.layer_scale), ("norm",))
            y = y * self.param("layer_scale", start, (width,)).astype(dtype)
        if self.skipped and not deterministic:
            y = skip_branch(y, self.skipped, self.make_rng("dropout"))
        return x + y


class Halving(nn.Module):
    """Norm, and a convolution of 2 x 2 places that leaves one of them."""

    config: ConvnextConfig
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w inputs"]) -> Float[Array, "batch h/2 w/2 features"]:
        dtype = jnp.dtype(self.config.dtype)
        x = Norm("layernorm", 1e-6, dtype=dtype, name="norm")(x)
        return patches_of(self.width, 2, dtype, "conv")(x)


def patches_of(width: int, side: int, dtype: Any, name: str | None = None) -> nn.Conv:
    """A convolution whose places do not overlap."""
    return nn.Conv(
        width,
        (side, side),
        (side, side),
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(bert_init, (None, None, None, "embed")),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class Convnext(nn.Module):
    """Stem, stages with a halving between them, norm."""

    config: ConvnextConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        total = sum(config.depths)

        self.stem = patches_of(config.widths[0], config.stem, dtype)
        self.stem_norm = Norm("layernorm", 1e-6, dtype=dtype)
        self.halvings = [Halving(config, width) for width in config.widths[1:]]
        rates = [config.drop_path * number / max(total - 1, 1) for number in range(total)]
        self.blocks = [Block(config, rate) for rate in rates]
        self.final_norm = Norm("layernorm", 1e-6, dtype=dtype)

    def __call__(self, batch: dict[str, Any], *, deterministic: bool) -> Float[Array, "batch h w features"]:
        """Feature maps of the last stage, normalised."""
        return self.final_norm(self._stages(batch, deterministic))

    def features(self, batch: dict[str, Any], *, deterministic: bool) -> Float[Array, "batch features"]:
        """One vector an image, float32."""
        x = self._stages(batch, deterministic).astype(jnp.float32)
        return self.final_norm(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)

    def _stages(self, batch: dict[str, Any], deterministic: bool) -> Float[Array, "batch h w features"]:
        config, first = self.config, 0
        x = normalised(batch["image"], config.pixel_mean, config.pixel_std).astype(jnp.dtype(config.dtype))
        x = self.stem_norm(self.stem(x))
        for stage, count in enumerate(config.depths):
            if stage:
                x = self.halvings[stage - 1](x)
            for block in self.blocks[first : first + count]:
                x = block(x, deterministic=deterministic)
            first += count
        return nn.with_logical_constraint(x, ("act_batch", None, None, None))
