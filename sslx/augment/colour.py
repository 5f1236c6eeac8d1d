"""What changes the colours and the sharpness of a picture and leaves its shape; as torchvision defines each.

Every function takes pictures float32 in [0, 1] and returns such. What needs colours (saturation, hue, grey) leaves
pictures of other than three channels as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"
Image = Float[Array, "height width channels"]
Images = Float[Array, "batch height width channels"]


def grey(image: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
    """The luma in all channels."""
    if image.shape[-1] != 3:
        return image
    return jnp.broadcast_to(jnp.sum(image * jnp.array(LUMA), axis=-1, keepdims=True), image.shape)


def blend(image: Image, other: Array, factor: Array) -> Image:
    """``factor`` of the picture and the rest of another; beyond 1 it leads away from the other."""
    return jnp.clip(factor * image + (1 - factor) * other, 0.0, 1.0)


def brightness(image: Image, factor: Array) -> Image:
    """Blends with black."""
    return blend(image, 0.0, factor)


def contrast(image: Image, factor: Array) -> Image:
    """Blends with the mean luma."""
    return blend(image, jnp.mean(grey(image)), factor)


def saturation(image: Image, factor: Array) -> Image:
    """Blends with grey."""
    return blend(image, grey(image), factor)


def hue(image: Image, shift: Array) -> Image:
    """Turns the hue by a share of the circle, by way of HSV."""
    if image.shape[-1] != 3:
        return image
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value, least = jnp.max(image, axis=-1), jnp.min(image, axis=-1)
    chroma = value - least
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.where(
        value == red,
        ((green - blue) / safe) % 6,
        jnp.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = (jnp.where(chroma > 0, sixth, 0.0) + 6 * shift) % 6
    # Each channel falls from the value by the chroma, over a stretch of the circle of its own.
    place = (jnp.array([5.0, 3.0, 1.0]) + sixth[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(place, 4 - place), 0.0, 1.0)


def solarise(image: Image, threshold: Array | float = 0.5) -> Image:
    """Inverts what is at or above the threshold."""
    return jnp.where(image >= threshold, 1.0 - image, image)


def gaussian_blur(image: Image, sigma: Array, radius: int) -> Image:
    """Convolves with a Gaussian cut off at ``radius`` pixels; the picture is mirrored at its edges."""
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    kernel = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / jnp.sum(kernel)
    for axis in (0, 1):
        pad = [(radius, radius) if axis == i else (0, 0) for i in range(3)]
        padded = jnp.pad(image, pad, mode="reflect")
        parts = [
            kernel[k] * jax.lax.slice_in_dim(padded, k, k + image.shape[axis], axis=axis) for k in range(len(offsets))
        ]
        image = sum(parts[1:], start=parts[0])
    return image


def colour_jitter(
    images: Images,
    keys: PRNGKeyArray,
    order_key: PRNGKeyArray,
    *,
    strengths: tuple[float, float, float, float],
) -> Images:
    """Brightness, contrast, saturation and hue by random factors.

    Args:
      images: Pictures.
      keys: One a row, for its factors.
      order_key: One a batch, for the order in which the four are applied (torchvision draws it for each picture; drawn
        once, three of four need not be computed for nothing).
      strengths: For brightness, contrast and saturation, factors are drawn from ``1 ± strength``, and shifts of hue
        from ``± strength``.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0))(keys)
    factors = draws * jnp.array(strengths) + jnp.array([1.0, 1.0, 1.0, 0.0])
    factors = factors.at[:, :3].max(0.0)
    changes = [
        lambda x, change=change, i=i: jax.vmap(change)(x, factors[:, i])
        for i, change in enumerate((brightness, contrast, saturation, hue))
    ]
    order = jax.random.permutation(order_key, 4)
    for place in range(4):
        images = jax.lax.switch(order[place], changes, images)
    return images
