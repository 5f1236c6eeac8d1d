"""Crops and flips beside Pillow's own resize with a box."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pillow_pictures import LEVEL, noise

from sslx.augment.crop import random_box, random_flip, random_resized_crop, resized, whole


def of_pillow(image, box, size):
    """Each channel by itself, in 32-bit floats, so that nothing is rounded to a level."""
    left, top, width, height = map(float, box)
    planes = [
        Image.fromarray(plane.astype(np.float32)).resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1) / 255, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_is_what_pillow_makes_of_it(channels):
    image = noise(24, 32, channels)
    cut = jax.jit(resized, static_argnums=2)
    boxes = [(0, 0, 32, 24), (0, 0, 5, 7), (27, 17, 5, 7), (3.3, 2.7, 20.1, 11.9), (10.25, 0, 6, 24), (8, 8, 12, 12)]
    for box in boxes:  # enlarged and made small, whole pixels and not, at edges and inside
        found = cut(jnp.asarray(image / 255, jnp.float32), jnp.array(box, jnp.float32), 12)
        assert found.shape == (12, 12, channels)
        np.testing.assert_allclose(found, of_pillow(image, box, 12), atol=LEVEL / 4)


def test_random_resized_crops_are_random_boxes_of_pillow():
    images = noise(8, 20, 30, 3)
    keys = jax.random.split(jax.random.key(0), 8)
    options = dict(area=(0.1, 0.9), aspect=(1 / 2, 2.0))
    found = jax.jit(lambda x, k: random_resized_crop(x, k, size=10, **options))(images / np.float32(255), keys)
    for image, key, view in zip(images, keys, found, strict=True):
        box = random_box(key, (20, 30), options["area"], options["aspect"])
        np.testing.assert_allclose(view, of_pillow(image, box, 10), atol=LEVEL / 2)


def test_boxes_have_the_area_and_aspect_asked_for_and_lie_anywhere_inside():
    keys = jax.random.split(jax.random.key(1), 4000)
    make = jax.jit(jax.vmap(lambda key: random_box(key, (40, 60), (0.2, 0.5), (3 / 4, 4 / 3))))
    left, top, width, height = np.asarray(make(keys)).T
    assert np.all((left >= 0) & (top >= 0) & (left + width <= 60 + 1e-4) & (top + height <= 40 + 1e-4))
    area, ratio = width * height / 2400, np.log(width / height)
    for found, (low, high) in ((area, (0.2, 0.5)), (ratio, np.log([3 / 4, 4 / 3]))):
        assert found.min() >= low - 1e-4
        assert found.max() <= high + 1e-4
        # Evenly between the two: the standard error of a mean of 4,000 is 0.005 of the range.
        assert found.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
        assert found.std() == pytest.approx((high - low) / 12**0.5, rel=0.05)
    for start, extent, size in ((left, width, 60), (top, height, 40)):
        share = start / np.maximum(size - extent, 1e-6)
        assert share.mean() == pytest.approx(0.5, abs=0.03)
        assert share.std() == pytest.approx(12**-0.5, rel=0.05)


def test_the_whole_picture_is_brought_to_size():
    images = noise(2, 16, 24, 3)
    found = whole(jnp.asarray(images / np.float32(255)), 8)
    for image, view in zip(images, found, strict=True):
        np.testing.assert_allclose(view, of_pillow(image, (0, 0, 24, 16), 8), atol=LEVEL / 4)
    same = jnp.asarray(noise(1, 8, 8, 1) / np.float32(255))
    np.testing.assert_array_equal(whole(same, 8), same)


def test_flips():
    images = jnp.asarray(noise(400, 2, 3, 1) / np.float32(255))
    keys = jax.random.split(jax.random.key(3), 400)
    found = np.asarray(random_flip(images, keys, 0.25))
    mirrored = np.flip(np.asarray(images), axis=2)
    flipped = np.all(found == mirrored, axis=(1, 2, 3))
    assert np.all(flipped | np.all(found == images, axis=(1, 2, 3)))
    assert flipped.mean() == pytest.approx(0.25, abs=0.07)
    np.testing.assert_array_equal(random_flip(images, keys, 1.0), mirrored)
    np.testing.assert_array_equal(random_flip(images, keys, 0.0), images)
