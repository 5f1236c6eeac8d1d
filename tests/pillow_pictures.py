"""Pictures of noise, and Pillow as the reference for what is made of them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from PIL import Image

LEVEL = 1 / 255


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def unit(image):
    return jnp.asarray(image / np.float32(255))


def pil(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def back(picture):
    array = np.asarray(picture) / 255
    return array[..., None] if array.ndim == 2 else array
