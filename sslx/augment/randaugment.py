"""RandAugment (arXiv 1909.13719): some transformations of a fixed list, drawn for each picture, at one strength.

The list and the ranges are torchvision's. Under ``vmap`` every picture pays for all that might be drawn, so the
geometric ones are one affine resampling, of which only the matrix depends on the draw. Its weights are bilinear (in
torchvision, the nearest pixel is the default); what comes from beyond the picture is black.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.augment.colour import blend, brightness, contrast, saturation, solarise

Image = Float[Array, "height width channels"]
LEVELS = 30  # strengths are 0 to 30


def randaugment(
    images: Float[Array, "batch height width channels"], keys: PRNGKeyArray, *, count: int, magnitude: float
) -> Float[Array, "batch height width channels"]:
    """``count`` transformations of each picture, drawn with replacement, at ``magnitude`` of 30."""

    def one(image: Image, key: PRNGKeyArray) -> Image:
        for number in range(count):
            pick_key, sign_key = jax.random.split(jax.random.fold_in(key, number))
            sign = jax.random.rademacher(sign_key, (), jnp.float32)
            image = transformed(image, jax.random.randint(pick_key, (), 0, OPERATIONS), magnitude / LEVELS, sign)
        return image

    return jax.vmap(one)(images, keys)


def transformed(image: Image, chosen: Array, level: float, sign: Array) -> Image:
    """One transformation, int32[] ``chosen`` of those in `GEOMETRIC` and then `PIXELWISE`, at a level of 0 to 1.

    ``sign`` is 1 or -1, for those that have a direction.
    """
    height, width, _ = image.shape
    maps = [operation(level * sign, height, width) for operation in GEOMETRIC]
    kept = jnp.eye(2), jnp.zeros(2)  # what is not geometric leaves every pixel in its place, to the last bit
    matrices, shifts = (jnp.stack(parts) for parts in zip(*maps, kept, strict=True))
    place = jnp.minimum(chosen, len(GEOMETRIC))
    image = affine(image, matrices[place], shifts[place])
    return jax.lax.switch(jnp.maximum(chosen - len(GEOMETRIC), 0), PIXELWISE, image, level, sign)


def affine(image: Image, matrix: Float[Array, "2 2"], shift: Float[Array, " 2"]) -> Image:
    """Resamples about the middle: output ``(y, x)`` shows the input at ``matrix @ (y, x) + shift``, bilinearly."""
    height, width, _ = image.shape
    middle = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.arange(height)[:, None] - middle[0], jnp.arange(width)[None, :] - middle[1]
    # Not by a matrix product: accelerators round what goes into one, and what is to stay would move.
    place = [matrix[axis, 0] * y + matrix[axis, 1] * x + middle[axis] + shift[axis] for axis in (0, 1)]

    def channel(plane: Array) -> Array:
        return jax.scipy.ndimage.map_coordinates(plane, place, order=1, cval=0.0)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


Map = tuple[Float[Array, "2 2"], Float[Array, " 2"]]  # the matrix and shift of `affine`


def rotation(degrees: Array, height: int, width: int) -> Map:
    """Counterclockwise about the middle."""
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[cos, sin], [-sin, cos]]), jnp.zeros(2)


def shear(amount: Array, height: int, width: int, *, axis: int) -> Map:
    """Along axis 0 (down) or 1 (across), by an amount for each pixel from the upper left corner, as AutoAugment has it.

    The corner is that of the picture, half a pixel from the middle of its first one.
    """
    across = (width if axis == 0 else height) / 2
    return jnp.eye(2).at[axis, 1 - axis].set(amount), jnp.zeros(2).at[axis].set(amount * across)


def translation(share: Array, height: int, width: int, *, axis: int) -> Map:
    """Up or to the left by a share of the picture, in whole pixels."""
    return jnp.eye(2), jnp.zeros(2).at[axis].set(jnp.trunc(share * (height, width)[axis]))


def posterise(image: Image, bits: Array) -> Image:
    """Keeps the upper ``bits`` of eight, a whole number."""
    step = 2.0 ** (8 - bits)
    return jnp.floor(jnp.floor(image * 255 + 0.5) / step) * step / 255


def sharpness(image: Image, factor: Array) -> Image:
    """Blends with Pillow's smoothed picture, whose edge stays as it is."""
    kernel = jnp.array([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
    convolve = functools.partial(jax.scipy.signal.convolve2d, mode="valid", precision=jax.lax.Precision.HIGHEST)
    smooth = jax.vmap(lambda plane: convolve(plane, kernel), -1, -1)(image)
    return blend(image, image.at[1:-1, 1:-1].set(smooth), factor)


def autocontrast(image: Image) -> Image:
    """Stretches each channel from 0 to 1; one that is of one value stays."""
    low, high = jnp.min(image, axis=(0, 1)), jnp.max(image, axis=(0, 1))
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1.0), image)


def equalise(image: Image) -> Image:
    """Makes each channel's histogram of 256 values as flat as Pillow does."""

    def channel(plane: Array) -> Array:
        values = jnp.clip(jnp.floor(plane * 255 + 0.5), 0, 255).astype(jnp.int32)
        counts = jnp.bincount(values.ravel(), length=256)
        last = counts[jnp.max(values)]
        step = (values.size - last) // 255
        table = jnp.clip((jnp.cumsum(counts) - counts + step // 2) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table[values], values) / 255.0

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


GEOMETRIC = (
    lambda level, height, width: shear(0.3 * level, height, width, axis=0),
    lambda level, height, width: shear(0.3 * level, height, width, axis=1),
    lambda level, height, width: translation(150 / 331 * level, height, width, axis=0),
    lambda level, height, width: translation(150 / 331 * level, height, width, axis=1),
    lambda level, height, width: rotation(30 * level, height, width),
)
PIXELWISE = (
    lambda image, level, sign: image,
    lambda image, level, sign: brightness(image, 1 + 0.9 * level * sign),
    lambda image, level, sign: saturation(image, 1 + 0.9 * level * sign),
    lambda image, level, sign: contrast(image, 1 + 0.9 * level * sign),
    lambda image, level, sign: sharpness(image, 1 + 0.9 * level * sign),
    lambda image, level, sign: posterise(image, 8 - jnp.round(4 * level)),
    lambda image, level, sign: solarise(image, 1.0 - level),
    lambda image, level, sign: autocontrast(image),
    lambda image, level, sign: equalise(image),
)
OPERATIONS = len(GEOMETRIC) + len(PIXELWISE)
