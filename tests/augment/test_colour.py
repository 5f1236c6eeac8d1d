"""What changes colours beside Pillow, colorsys and SciPy."""

from __future__ import annotations

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from pillow_pictures import LEVEL, back, noise, pil, unit
from scipy import ndimage

from sslx.augment import colour
from sslx.augment.chance import sometimes

# Pillow rounds to levels at each stage, and takes a rounded mean and a rounded luma.
ROUNDED = 1.6 * LEVEL


IMAGES = {channels: noise(9, 11, channels) for channels in (1, 3)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_are_those_of_pillows_enhancers(name, channels):
    enhancer = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}[name]
    for factor in (0.0, 0.3, 1.0, 1.7):
        found = getattr(colour, name)(unit(IMAGES[channels]), jnp.float32(factor))
        expected = back(getattr(ImageEnhance, enhancer)(pil(IMAGES[channels])).enhance(factor))
        np.testing.assert_allclose(found, expected, atol=ROUNDED)


def test_hue_turns_as_colorsys_does():
    image = IMAGES[3].copy()
    image[0, :5] = [[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 200, 200]]
    for shift in (-0.5, -0.1, 0.0, 0.25, 1 / 3):
        found = np.asarray(colour.hue(unit(image), jnp.float32(shift)))
        expected = np.empty_like(found)
        for place in np.ndindex(image.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*(image[place] / 255))
            expected[place] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(colour.hue(unit(IMAGES[1]), 0.3), unit(IMAGES[1]))


def test_grey_is_pillows():
    expected = np.repeat(np.asarray(Image.fromarray(IMAGES[3]).convert("L"))[..., None], 3, axis=-1) / 255
    np.testing.assert_allclose(colour.grey(unit(IMAGES[3])), expected, atol=LEVEL)
    np.testing.assert_array_equal(colour.grey(unit(IMAGES[1])), unit(IMAGES[1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_solarising_inverts_the_bright_half(channels):
    expected = back(ImageOps.solarize(pil(IMAGES[channels]), 128))
    np.testing.assert_allclose(colour.solarise(unit(IMAGES[channels])), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_scipys(channels):
    for sigma, radius in ((0.1, 1), (0.7, 2), (2.0, 5)):
        found = jax.jit(colour.gaussian_blur, static_argnums=2)(unit(IMAGES[channels]), jnp.float32(sigma), radius)
        expected = ndimage.gaussian_filter(IMAGES[channels] / 255, sigma, radius=radius, mode="mirror", axes=(0, 1))
        np.testing.assert_allclose(found, expected, atol=1e-5)


jitter = jax.jit(
    lambda images, keys, order_key, strengths: colour.colour_jitter(images, keys, order_key, strengths=strengths),
    static_argnums=3,
)


def test_jitter_is_the_four_in_the_order_and_by_the_factors_drawn():
    images, keys, strengths = unit(noise(6, 5, 5, 3)), jax.random.split(jax.random.key(0), 6), (0.8, 0.6, 0.4, 0.2)
    changes = [jax.jit(change) for change in (colour.brightness, colour.contrast, colour.saturation, colour.hue)]
    draw = jax.jit(lambda key: jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0))
    orders = [np.asarray(jax.random.permutation(jax.random.key(seed), 4)).tolist() for seed in range(3)]
    assert len(set(map(tuple, orders))) > 1
    for seed, order in enumerate(orders):
        found = jitter(images, keys, jax.random.key(seed), strengths)
        for row in range(6):
            draws = np.asarray(draw(keys[row])) * np.array(strengths, np.float32)
            expected = images[row]
            for i in order:
                expected = changes[i](expected, draws[i] if i == 3 else 1 + draws[i])
            np.testing.assert_allclose(found[row], expected, atol=2e-5)


def test_jitter_of_one_kind_has_the_range_asked_for():
    keys = jax.random.split(jax.random.key(1), 500)
    images = jnp.full((500, 2, 2, 3), 0.4)
    found = np.asarray(jitter(images, keys, jax.random.key(0), (0.5, 0.0, 0.0, 0.0)))[:, 0, 0, 0] / 0.4
    assert (found.min(), found.max()) == pytest.approx((0.5, 1.5), abs=0.02)
    assert found.mean() == pytest.approx(1.0, abs=0.05)
    np.testing.assert_allclose(jitter(images, keys, jax.random.key(0), (0.0,) * 4), images, atol=1e-6)


def test_sometimes_takes_the_changed_picture_with_the_probability():
    keys = jax.random.split(jax.random.key(2), 1000)
    images = jnp.zeros((1000, 1, 1, 1))
    found = sometimes(keys, 0.2, images + 1, images)
    assert set(np.unique(found)) == {0, 1}
    assert float(found.mean()) == pytest.approx(0.2, abs=0.04)
