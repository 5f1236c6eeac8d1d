"""ResNet (arXiv 1512.03385, version 1.5: the stride of a bottleneck is in its 3 x 3 convolution, as in torchvision).

In: ``image`` float32[batch, height, width, channels] in [0, 1], or uint8. Out: feature maps of the last stage, or
their mean. ``stem="imagenet"`` is a 7 x 7 convolution and a pooling, which leave a quarter of each side;
``stem="cifar"`` is a 3 x 3 convolution, for pictures of 32 pixels (as SimCLR's appendix B.9 has it).

Batch normalisation takes the mean and variance of the whole batch, on any mesh, since the step is one program over
global arrays; running averages for evaluation are in the collection ``batch_stats``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.errors import UserError, choose
from sslx.models.pixels import check_pixels, normalised

# Blocks of each stage, and whether they are bottlenecks. 10 is not the paper's; it is for small pictures on a CPU.
DEPTHS = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
EXPANSION = 4  # of a bottleneck's width
he_init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


@dataclasses.dataclass(frozen=True)
class ResnetConfig:
    """``config.model`` of ``name="resnet"``."""

    name: str = "resnet"
    depth: int = 18  # 10 | 18 | 34 | 50 | 101 | 152
    width: int = 64  # channels of the first stage; each further one has twice as many
    stem: str = "imagenet"  # imagenet | cifar
    image_size: int = 224  # height and width
    channels: int = 3
    momentum: float = 0.9  # of the running averages
    dtype: str = "float32"  # computation; parameters and statistics are always float32
    pixel_mean: tuple[float, ...] = (0.5,)  # taken from each channel (or one for all), and
    pixel_std: tuple[float, ...] = (0.5,)  # what the rest is divided by

    def __post_init__(self):
        if self.depth not in DEPTHS:
            raise UserError(f"config.model.depth is {self.depth}; expected one of {', '.join(map(str, DEPTHS))}")
        if self.width < 1:
            raise UserError(f"config.model.width is {self.width}; expected at least 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"config.model.momentum is {self.momentum}; expected 0 or a share below 1")
        check_pixels(self.channels, self.pixel_mean, self.pixel_std)
        choose(self.stem, ("imagenet", "cifar"), "config.model.stem")
        choose(self.dtype, ("float32", "bfloat16"), "config.model.dtype")

    @property
    def batch_norm(self) -> bool:
        """Whether a row's features in training depend on the others of its batch."""
        return True

    @property
    def features_width(self) -> int:
        """Numbers in an image's features."""
        return self.width * 8 * (EXPANSION if DEPTHS[self.depth][1] else 1)

    def encoder(self) -> Resnet:
        """The Linen module of the encoder."""
        return Resnet(self)

    def features_flops(self) -> float:
        """Forward FLOPs of one image's features."""
        return self.flops_per_image()

    def flops_per_image(self) -> float:
        """Forward FLOPs of the convolutions on one image."""
        side = self.image_size
        blocks, bottleneck = DEPTHS[self.depth]
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        side = -(-side // stride)
        total = 2.0 * side**2 * kernel**2 * self.channels * self.width
        side = -(-side // 2) if self.stem == "imagenet" else side
        before = self.width
        for stage, count in enumerate(blocks):
            inner = self.width * 2**stage
            after = inner * (EXPANSION if bottleneck else 1)
            for block in range(count):
                stride = 2 if stage and not block else 1
                out = -(-side // stride)
                if bottleneck:
                    total += 2.0 * (side**2 * before * inner + out**2 * (9 * inner**2 + inner * after))
                else:
                    total += 2.0 * out**2 * 9 * (before * inner + inner**2)
                if before != after or stride == 2:
                    total += 2.0 * out**2 * before * after
                before, side = after, out
        return total


class Block(nn.Module):
    """Two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3, 1 x 1, beside a shortcut."""

    features: int
    stride: int
    bottleneck: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w inputs"]) -> Float[Array, "batch h2 w2 outputs"]:
        inner = [(1, 1), (3, self.stride)] if self.bottleneck else [(3, self.stride)]
        out = self.features * (EXPANSION if self.bottleneck else 1)
        y = x
        for number, (kernel, stride) in enumerate(inner):
            y = self.conv(self.features, kernel, stride, f"conv_{number}")(y)
            y = relu(self.norm(name=f"conv_{number}_norm")(y))
        y = self.conv(out, 1 if self.bottleneck else 3, 1, "conv_out")(y)
        # At 0 each block begins as its shortcut (arXiv 1706.02677).
        y = self.norm(name="conv_out_norm", scale_init=boxed(nn.initializers.zeros, ("norm",)))(y)
        if x.shape != y.shape:
            x = self.norm(name="shortcut_norm")(self.conv(out, 1, self.stride, "shortcut")(x))
        return relu(x + y)


def relu(x: Array) -> Array:
    """``max(x, 0)``, of which XLA makes an array once.

    As a maximum it is taken for something cheap, and made anew, with all additions and normalisations back to the last
    convolutions, wherever the backward pass reads it.
    """
    return jnp.where(x <= 0, 0, x)  # not x > 0: NaN stays NaN


def boxed(init: Any, axes: tuple[str | None, ...]) -> Any:
    """An initializer whose array has named axes."""
    return nn.with_logical_partitioning(init, axes)


class Resnet(nn.Module):
    """Stem, four stages, mean over places."""

    config: ResnetConfig

    @nn.compact
    def __call__(self, batch: dict[str, Any], *, deterministic: bool) -> Float[Array, "batch h w features"]:
        """Feature maps of the last stage; ``deterministic`` normalises by the running averages."""
        config = self.config
        dtype = jnp.dtype(config.dtype)

        def conv(features: int, kernel: int, stride: int, name: str) -> nn.Module:
            return nn.Conv(
                features,
                (kernel, kernel),
                (stride, stride),
                padding=[((kernel - 1) // 2, (kernel - 1) // 2)] * 2,
                use_bias=False,
                dtype=dtype,
                kernel_init=boxed(he_init, (None, None, None, "embed")),
                name=name,
            )

        def norm(name: str, scale_init: Any = boxed(nn.initializers.ones, ("norm",))) -> nn.Module:  # noqa: B008
            return nn.BatchNorm(
                use_running_average=deterministic,
                momentum=config.momentum,
                epsilon=1e-5,
                dtype=dtype,
                scale_init=scale_init,
                bias_init=boxed(nn.initializers.zeros, ("norm",)),
                name=name,
            )

        x = normalised(batch["image"], config.pixel_mean, config.pixel_std).astype(dtype)
        x = nn.with_logical_constraint(x, ("act_batch", None, None, None))
        if config.stem == "imagenet":
            x = relu(norm("stem_norm")(conv(config.width, 7, 2, "stem")(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        else:
            x = relu(norm("stem_norm")(conv(config.width, 3, 1, "stem")(x)))
        blocks, bottleneck = DEPTHS[config.depth]
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                name = f"stage_{stage}_block_{block}"
                x = Block(config.width * 2**stage, stride, bottleneck, conv, norm, name=name)(x)
        return nn.with_logical_constraint(x, ("act_batch", None, None, None))

    def features(self, batch: dict[str, Any], *, deterministic: bool) -> Float[Array, "batch features"]:
        """One vector an image, float32: the mean over places."""
        return jnp.mean(self(batch, deterministic=deterministic).astype(jnp.float32), axis=(1, 2))
