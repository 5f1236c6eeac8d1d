"""From a config to random views of each picture of a batch: one (`augment`), or several (`crop_views`).

In: uint8 pictures and a key a row. Out: float32 in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sslx.augment.chance import sometimes
from sslx.augment.colour import colour_jitter, gaussian_blur, grey, solarise
from sslx.augment.crop import random_flip, random_resized_crop, whole
from sslx.augment.mixing import random_erasing
from sslx.augment.randaugment import LEVELS, randaugment
from sslx.data.images import check_range
from sslx.errors import UserError
from sslx.models.pixels import unit


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """One view. What is a probability of 0 or a strength of 0 is left out of the program; the order is that below."""

    crop_area: tuple[float, float] = (0.2, 1.0)  # share of the area that is cut out and resized; (1, 1): all of it
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    flip: float = 0.5  # probability of mirroring left and right
    randaugment: int = 0  # how many transformations of its list
    randaugment_magnitude: float = 9.0  # of 30
    jitter: float = 0.0  # probability of all four of the following
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarise: float = 0.0  # probability
    erase: float = 0.0  # probability

    def __post_init__(self):
        where = "an augmentation's"
        for name in ("flip", "jitter", "grey", "blur", "solarise", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{where} {name} is {getattr(self, name)}; expected a probability")
        for name, most in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{where} {name} is {getattr(self, name)}; expected 0 to {most}")
        if self.randaugment < 0 or not 0 <= self.randaugment_magnitude <= LEVELS:
            raise UserError(
                f"{where} randaugment is {self.randaugment} at {self.randaugment_magnitude:g}; "
                f"expected 0 or more at 0 to {LEVELS}"
            )
        check_range(self.crop_area, f"{where} crop_area", most=1.0)
        check_range(self.crop_aspect, f"{where} crop_aspect")
        check_range(self.blur_sigma, f"{where} blur_sigma")


NONE = AugmentConfig(crop_area=(1.0, 1.0), flip=0.0)


@dataclasses.dataclass(frozen=True)
class Views:
    """Some views of each picture that are made alike: ``count`` of them, ``size`` by ``size`` pixels."""

    count: int
    size: int
    config: AugmentConfig

    def __post_init__(self):
        if self.count < 1 or self.size < 1:
            raise UserError(f"{self.count} views of {self.size} pixels are asked for; expected at least 1 of both")


def augment(
    images: UInt8[Array, "batch height width channels"],
    keys: PRNGKeyArray,
    order_key: PRNGKeyArray,
    config: AugmentConfig,
    *,
    size: int | None = None,
) -> Float[Array, "batch size size channels"]:
    """One random view of each picture, float32 in [0, 1].

    Args:
      images: Pictures.
      keys: One a row, so that a row's view does not depend on the mesh.
      order_key: One a batch; see `colour_jitter`.
      config: What is done.
      size: Height and width of the views; None: as the pictures are.
    """
    x, size = unit(images), size or images.shape[1]
    keys = jax.vmap(lambda key: jax.random.split(key, 12))(keys)
    if config.crop_area == (1.0, 1.0):
        x = whole(x, size)
    else:
        x = random_resized_crop(x, keys[:, 0], size=size, area=config.crop_area, aspect=config.crop_aspect)
    if config.flip:
        x = random_flip(x, keys[:, 1], config.flip)
    if config.randaugment:
        x = randaugment(x, keys[:, 2], count=config.randaugment, magnitude=config.randaugment_magnitude)
    if config.jitter:
        strengths = (config.brightness, config.contrast, config.saturation, config.hue)
        x = sometimes(keys[:, 3], config.jitter, colour_jitter(x, keys[:, 4], order_key, strengths=strengths), x)
    if config.grey:
        x = sometimes(keys[:, 5], config.grey, grey(x), x)
    if config.blur:
        low, high = config.blur_sigma
        sigma = jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(keys[:, 6])
        radius = max(1, round(size * 0.05))  # SimCLR's kernel is a tenth of the picture wide
        x = sometimes(keys[:, 7], config.blur, jax.vmap(lambda i, s: gaussian_blur(i, s, radius))(x, sigma), x)
    if config.solarise:
        x = sometimes(keys[:, 8], config.solarise, solarise(x), x)
    if config.erase:
        x = sometimes(keys[:, 9], config.erase, random_erasing(x, keys[:, 10]), x)
    return x


def crop_views(
    images: UInt8[Array, "batch height width channels"],
    keys: PRNGKeyArray,
    order_key: PRNGKeyArray,
    kinds: Sequence[Views],
) -> list[Float[Array, "batch count size size channels"]]:
    """Several views of each picture, such as two large ones and six small ones (multi-crop, arXiv 2006.09882).

    Args:
      images: Pictures.
      keys: One a row; each of its views has a key of its own, which does not depend on how many views come after it.
      order_key: One a batch; see `colour_jitter`.
      kinds: What views there are to be.

    Returns:
      For each kind its views.
    """
    made, number = [], 0
    for kind in kinds:
        views = []
        for _ in range(kind.count):
            own = jax.vmap(lambda key, number=number: jax.random.fold_in(key, number))(keys)
            views.append(augment(images, own, jax.random.fold_in(order_key, number), kind.config, size=kind.size))
            number += 1
        made.append(jnp.stack(views, axis=1))
    return made
