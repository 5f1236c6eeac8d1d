"""FCOS (arXiv 1904.01355): what is at each place of a feature map, how far its edges are, how near its middle.

In: the patches of a plain ViT. Out: logits of classes, boxes and centre-ness at every location of one or more maps.
The maps come from the last layer's patches alone, as in ViTDet (arXiv 2203.16527): enlarged by transposed
convolutions, as they are, or halved by the largest of four. Two towers of convolutions serve all maps. As in the
authors' later version (arXiv 2006.09214) centre-ness is said by the tower of the boxes, distances are in strides, and
only locations near a box's middle are positive. Other than there, towers have LayerNorm, which does not look at other
places, and GELU.

A location is positive if it lies in a box, within ``centre_radius`` strides of its middle, and the box's farthest edge
is in its map's range, which has no end for the last map; of several such boxes the smallest is its target.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sslx.models.layers import Dense, Norm, bert_init, gelu
from sslx.models.vit import VitConfig

PRIOR = 0.01  # probability of a class at the start, so that the many empty places do not drown the rest
RANGE = 8  # a map's objects reach at most this many strides from a location (the paper's 64 pixels at stride 8)
LARGEST = 6.0  # of the logarithm of a distance in strides, against overflow


@dataclasses.dataclass(frozen=True)
class FcosConfig:
    """The shape of a detector's head over a ViT."""

    classes: int
    scales: tuple[float, ...]  # of the maps, against the grid of patches: 4, 2, 1 or 0.5, falling
    layers: int
    width: int


class Locations(NamedTuple):
    """All locations of all maps, one map after the other, in reading order."""

    points: Float[np.ndarray, "locations 2"]  # x, y in pixels
    strides: Float[np.ndarray, " locations"]  # pixels between neighbours
    least: Float[np.ndarray, " locations"]  # distances to a target's farthest edge: above this
    most: Float[np.ndarray, " locations"]  # and up to this


class Found(NamedTuple):
    """What the head says at each location."""

    logits: Float[Array, "batch locations classes"]
    boxes: Float[Array, "batch locations 4"]
    centerness: Float[Array, "batch locations"]  # a logit


class Targets(NamedTuple):
    """What the head should say at each location."""

    classes: Int[Array, "batch locations"]  # -1: nothing is there
    boxes: Float[Array, "batch locations 4"]
    centerness: Float[Array, "batch locations"]  # 0 where nothing is there
    counted: Float[Array, "batch locations"]  # 0 in a crowd


def locations(model: VitConfig, scales: tuple[float, ...]) -> Locations:
    """The locations of a model's maps."""
    parts, least = [], 0.0
    for place, scale in enumerate(scales):
        grid, stride = round(model.grid * scale), model.patch_size / scale
        rows, columns = np.divmod(np.arange(grid**2), grid)
        points = (np.stack([columns, rows], axis=-1) + 0.5) * stride
        most = RANGE * stride if place + 1 < len(scales) else np.inf
        parts.append((points, *(np.full(grid**2, value) for value in (stride, least, most))))
        least = most
    return Locations(*(np.concatenate(of).astype(np.float32) for of in zip(*parts, strict=True)))


def assigned(
    places: Locations,
    boxes: Float[Array, "batch boxes 4"],
    classes: Int[Array, "batch boxes"],
    real: Bool[Array, "batch boxes"],
    crowd: Bool[Array, "batch boxes"],
    *,
    centre_radius: float,
) -> Targets:
    """The target of each location.

    Args:
      places: The locations.
      boxes: In pixels.
      classes: Of the boxes.
      real: Which of them are objects.
      crowd: Which of them hold many objects that have no boxes; an empty location in one counts nothing.
      centre_radius: In strides; 0: anywhere in the box.
    """
    x, y = places.points[:, 0, None], places.points[:, 1, None]
    left, top, right, bottom = (boxes[:, None, :, side] for side in range(4))
    distances = jnp.stack([x - left, y - top, right - x, bottom - y], axis=-1)  # [batch, locations, boxes, 4]
    inside = jnp.min(distances, axis=-1) > 0
    farthest = jnp.max(distances, axis=-1)
    fits = inside & real[:, None] & (farthest > places.least[:, None]) & (farthest <= places.most[:, None])
    if centre_radius:
        off = jnp.maximum(jnp.abs(x - (left + right) / 2), jnp.abs(y - (top + bottom) / 2))
        fits &= off < centre_radius * places.strides[:, None]
    area = jnp.where(fits, (right - left) * (bottom - top), jnp.inf)
    which = jnp.argmin(area, axis=-1)
    positive = jnp.any(fits, axis=-1)
    across, down = (jnp.take_along_axis(distances[..., sides], which[..., None, None], axis=2)[:, :, 0]
                    for sides in (slice(0, None, 2), slice(1, None, 2)))  # fmt: skip
    ratio = lambda pair: jnp.min(pair, axis=-1) / jnp.maximum(jnp.max(pair, axis=-1), 1e-6)  # noqa: E731
    middle = jnp.sqrt(jnp.maximum(ratio(across) * ratio(down), 0.0))
    in_crowd = jnp.any(inside & crowd[:, None], axis=-1)
    return Targets(
        jnp.where(positive, jnp.take_along_axis(classes, which, axis=1), -1),
        jnp.take_along_axis(boxes, which[..., None], axis=1),
        jnp.where(positive, middle, 0.0),
        (positive | ~in_crowd).astype(jnp.float32),
    )


def focal_loss(
    logits: Float[Array, "..."], targets: Float[Array, "..."], *, alpha: float, gamma: float
) -> Float[Array, "..."]:
    """Binary cross-entropy that counts little where the guess is already right (arXiv 1708.02002)."""
    entropy = sigmoid_cross_entropy(logits, targets)
    right = jnp.where(targets > 0.5, jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits))
    return jnp.where(targets > 0.5, alpha, 1 - alpha) * (1 - right) ** gamma * entropy


def sigmoid_cross_entropy(logits: Float[Array, "..."], targets: Float[Array, "..."]) -> Float[Array, "..."]:
    """Binary cross-entropy of logits with targets in [0, 1]."""
    return jax.nn.softplus(logits) - targets * logits


class Fcos(nn.Module):
    """Maps, towers and outputs; `model` is that of the patches."""

    config: FcosConfig
    model: VitConfig

    def setup(self):
        config = self.config
        self.maps = [Map(config.width, scale, self.model.compute_dtype) for scale in config.scales]
        self.class_tower = [self._layer() for _ in range(config.layers)]
        self.box_tower = [self._layer() for _ in range(config.layers)]
        self.classify = self._conv(config.classes, -math.log((1 - PRIOR) / PRIOR))
        self.distances = self._conv(4, 0.0)
        self.middle = self._conv(1, 0.0)
        one = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        self.range_scales = self.param("range_scales", one, (len(config.scales),))

    def __call__(self, patches: Float[Array, "batch patches width"]) -> Found:
        """From hidden states to what is at each location."""
        grid = self.model.grid
        x = patches.reshape(patches.shape[0], grid, grid, -1)
        flat = lambda y: y.reshape(y.shape[0], -1, y.shape[-1]).astype(jnp.float32)  # noqa: E731
        logits, logs, middles = [], [], []
        for level, to_map in enumerate(self.maps):
            what = where = to_map(x)
            for layer in self.class_tower:
                what = layer(what)
            for layer in self.box_tower:
                where = layer(where)
            logits.append(flat(self.classify(what)))
            logs.append(flat(self.distances(where)) * self.range_scales[level])
            middles.append(flat(self.middle(where))[..., 0])
        places = locations(self.model, self.config.scales)
        far = jnp.exp(jnp.minimum(jnp.concatenate(logs, axis=1), LARGEST)) * places.strides[:, None]
        boxes = jnp.concatenate([places.points - far[..., :2], places.points + far[..., 2:]], axis=-1)
        return Found(jnp.concatenate(logits, axis=1), boxes, jnp.concatenate(middles, axis=1))

    def _layer(self) -> nn.Module:
        return Layer(self.config.width, self.model.compute_dtype)

    def _conv(self, features: int, bias: float) -> nn.Conv:
        return nn.Conv(
            features,
            (3, 3),
            dtype=jnp.float32,
            kernel_init=nn.with_logical_partitioning(nn.initializers.normal(0.01), (None, None, "embed", "types")),
            bias_init=nn.with_logical_partitioning(nn.initializers.constant(bias), ("types",)),
        )


class Layer(nn.Module):
    """A convolution of 3 x 3, LayerNorm and GELU."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w features"]) -> Float[Array, "batch h w width"]:
        # Values of the convolution's size before the norm, whatever the width.
        start = nn.initializers.lecun_normal()
        y = nn.Conv(
            self.width,
            (3, 3),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(start, (None, None, None, "embed")),
            name="conv",
        )(x)
        return gelu(Norm("layernorm", 1e-6, dtype=self.dtype, name="norm")(y))


class Map(nn.Module):
    """A feature map of ``width`` features, ``scale`` times as fine as the grid of patches."""

    width: int
    scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch grid grid features"]) -> Float[Array, "batch h w width"]:
        if self.scale < 1:
            x = nn.max_pool(x, (2, 2), (2, 2))
        for step in range(round(math.log2(max(self.scale, 1)))):
            # Transposed convolution of 2 x 2 at stride 2: every place becomes four that know nothing of each other.
            batch, high, wide, features = x.shape
            features = max(features // 2, 1)
            x = Dense(4 * features, ("embed", "mlp"), dtype=self.dtype, name=f"enlarge_{step}")(x)
            x = x.reshape(batch, high, wide, 2, 2, features).swapaxes(2, 3).reshape(batch, 2 * high, 2 * wide, features)
            x = gelu(Norm("layernorm", 1e-6, dtype=self.dtype, name=f"norm_{step}")(x))
        x = Dense(self.width, ("embed", None), kernel_init=bert_init, dtype=self.dtype, name="project")(x)
        return Norm("layernorm", 1e-6, dtype=self.dtype, name="norm")(x)


def head_flops(config: FcosConfig, model: VitConfig) -> float:
    """Forward FLOPs of the head for one picture."""
    total = 0.0
    for scale in config.scales:
        places, features = model.patches, model.width
        for _ in range(round(math.log2(max(scale, 1)))):
            half = max(features // 2, 1)
            total += 2.0 * places * features * 4 * half
            places, features = 4 * places, half
        places = places if scale >= 1 else places // 4
        total += 2.0 * places * features * config.width
        total += 2.0 * places * 9 * config.width * (2 * config.layers * config.width + config.classes + 5)
    return total
