"""RandAugment's transformations beside Pillow's and SciPy's, and that each is drawn as often as the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from pillow_pictures import LEVEL, back, noise, pil, unit
from scipy import ndimage

from sslx.augment import randaugment
from sslx.augment.randaugment import GEOMETRIC, OPERATIONS, affine, transformed

HEIGHT, WIDTH = 14, 20
MIDDLE = np.array([(HEIGHT - 1) / 2, (WIDTH - 1) / 2])


IMAGES = {channels: noise(HEIGHT, WIDTH, channels) for channels in (1, 3)}


@pytest.fixture(scope="module")
def transform():
    return jax.jit(transformed)


NAMES = [
    "shear y",
    "shear x",
    "translate y",
    "translate x",
    "rotate",
    "identity",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterise",
    "solarise",
    "autocontrast",
    "equalise",
]


@pytest.mark.parametrize("channels", [1, 3])
def test_resampling_is_scipys(channels):
    matrix, shift = np.array([[0.9, 0.3], [-0.2, 1.1]]), np.array([1.7, -2.2])
    found = affine(unit(IMAGES[channels]), jnp.array(matrix), jnp.array(shift))
    expected = np.stack(
        [
            ndimage.affine_transform(
                plane / 255, matrix, MIDDLE - matrix @ MIDDLE + shift, order=1, mode="grid-constant"
            )
            for plane in np.moveaxis(IMAGES[channels], -1, 0)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


# (name, level, sign) -> Pillow's coefficients: input x = a x + b y + c, input y = d x + e y + f, of pixels' corners.
MOVED = {
    ("shear y", 1.0, 1.0): (1, 0, 0, 0.3, 1, 0),
    ("shear x", 1.0, 1.0): (1, 0.3, 0, 0, 1, 0),
    ("shear x", 0.5, -1.0): (1, -0.15, 0, 0, 1, 0),
    ("translate y", 1.0, -1.0): (1, 0, 0, 0, 1, -int(150 / 331 * HEIGHT)),
    ("translate x", 1.0, 1.0): (1, 0, int(150 / 331 * WIDTH), 0, 1, 0),
    ("translate x", 0.3, -1.0): (1, 0, -int(0.3 * 150 / 331 * WIDTH), 0, 1, 0),
}


@pytest.mark.parametrize(("name", "level", "sign"), MOVED)
def test_shears_and_translations_are_autoaugments(transform, name, level, sign):
    image = IMAGES[3]
    found = transform(unit(image), NAMES.index(name), level, sign)
    coefficients, options = MOVED[name, level, sign], dict(resample=Image.Resampling.BILINEAR)
    expected = back(pil(image).transform((WIDTH, HEIGHT), Image.Transform.AFFINE, coefficients, **options))
    inside = back(
        pil(np.full_like(image, 255)).transform((WIDTH, HEIGHT), Image.Transform.AFFINE, coefficients, **options)
    )
    # Pillow stretches the outermost pixels over the edge, where here black begins: compared is what is within.
    inside = ndimage.binary_erosion(inside[..., 0] > 0, np.ones((3, 3)))
    assert inside.mean() > 0.3
    np.testing.assert_allclose(np.asarray(found)[inside], expected[inside], atol=1.5 * LEVEL)
    if name.startswith("translate"):  # by whole pixels: those are moved, and what they leave is black
        right, down = coefficients[2], coefficients[5]
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        y, x = y + down, x + right
        there = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
        assert not there.all()
        moved = np.where(there[..., None], image[np.clip(y, 0, HEIGHT - 1), np.clip(x, 0, WIDTH - 1)] / 255, 0)
        np.testing.assert_allclose(found, moved, atol=1e-5)


@pytest.mark.parametrize(("level", "sign"), [(1.0, 1.0), (0.5, -1.0)])
def test_turning_is_pillows(transform, level, sign):
    image = np.asarray(Image.fromarray(IMAGES[3]).resize((60, 42), Image.Resampling.BICUBIC))
    found = np.asarray(transform(unit(image), NAMES.index("rotate"), level, sign))
    expected = back(pil(image).rotate(30 * level * sign, Image.Resampling.BILINEAR))
    inside = ndimage.binary_erosion(expected.any(axis=-1), np.ones((5, 5)))
    assert inside.mean() > 0.5
    np.testing.assert_allclose(found[inside], expected[inside], atol=2 * LEVEL)


ENHANCED = {"brightness": "Brightness", "saturation": "Color", "contrast": "Contrast", "sharpness": "Sharpness"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ENHANCED)
def test_blends_are_pillows(transform, name, channels):
    for sign in (1.0, -1.0):
        found = transform(unit(IMAGES[channels]), NAMES.index(name), 0.6, sign)
        expected = back(getattr(ImageEnhance, ENHANCED[name])(pil(IMAGES[channels])).enhance(1 + 0.9 * 0.6 * sign))
        np.testing.assert_allclose(found, expected, atol=2 * LEVEL)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("magnitude", "bits"), [(0, 8), (9, 7), (15, 6), (30, 4)])
def test_posterising_keeps_pillows_bits(transform, magnitude, bits, channels):
    found = transform(unit(IMAGES[channels]), NAMES.index("posterise"), magnitude / 30, 1.0)
    np.testing.assert_allclose(found, back(ImageOps.posterize(pil(IMAGES[channels]), bits)), atol=1e-6)


def test_solarising_begins_at_a_threshold(transform):
    for level, threshold in ((0.5, 128), (0.2, 204), (1.0, 0)):
        found = transform(unit(IMAGES[3]), NAMES.index("solarise"), level, 1.0)
        np.testing.assert_allclose(found, back(ImageOps.solarize(pil(IMAGES[3]), threshold)), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["autocontrast", "equalise"])
def test_histograms_are_spread_as_pillow_does(transform, name, channels):
    change = {"autocontrast": ImageOps.autocontrast, "equalise": ImageOps.equalize}[name]
    pictures = [
        IMAGES[channels],
        IMAGES[channels] // 3 + 40,
        np.full((HEIGHT, WIDTH, channels), 77, np.uint8),
        (IMAGES[channels] > 128).astype(np.uint8) * 9 + 3,
        np.asarray(noise(HEIGHT, WIDTH, channels) // 64 * 20, np.uint8),
    ]
    for image in pictures:
        found = transform(unit(image), NAMES.index(name), 0.5, 1.0)
        np.testing.assert_allclose(
            found, back(change(pil(image))), atol=1.01 * LEVEL if name == "autocontrast" else 1e-6
        )
    # Twelve times as many pixels, so that Pillow's step of the histogram is more than one.
    large = np.tile(IMAGES[channels], (4, 3, 1))
    found = jax.jit(randaugment.equalise)(unit(large))
    np.testing.assert_allclose(found, back(ImageOps.equalize(pil(large))), atol=1e-6)


def test_what_is_not_geometric_moves_nothing(transform):
    image = unit(IMAGES[3])
    np.testing.assert_array_equal(transform(image, NAMES.index("identity"), 1.0, 1.0), image)
    assert len(NAMES) == OPERATIONS
    assert NAMES[len(GEOMETRIC)] == "identity"


def test_each_is_drawn_as_often_and_in_both_directions(transform):
    rows = 700
    image = unit(noise(17, 17, 3))  # with fewer than 256 pixels, Pillow equalises nothing
    keys = jax.random.split(jax.random.key(0), rows)
    run = jax.jit(lambda x, k: randaugment.randaugment(x, k, count=1, magnitude=30.0))
    found = np.asarray(run(jnp.broadcast_to(image, (rows, *image.shape)), keys))
    kinds = [transform(image, which, 1.0, sign) for which in range(OPERATIONS) for sign in (1.0, -1.0)]
    distance = np.stack([np.abs(found - np.asarray(kind)).max(axis=(1, 2, 3)) for kind in kinds], axis=1)
    assert distance.min(axis=1).max() < 1e-5  # every row is one of them
    drawn = distance.argmin(axis=1)
    assert np.bincount(drawn // 2, minlength=OPERATIONS).min() > 25  # of 50, with a deviation of 7
    assert np.bincount(drawn, minlength=2 * OPERATIONS)[: 2 * len(GEOMETRIC)].min() > 8  # of 25, with one of 5


def test_two_are_one_after_the_other(transform):
    image, keys = unit(noise(1, 17, 17, 3)), jax.random.split(jax.random.key(3), 1)
    expected = image[0]
    for number in range(2):
        pick, sign = jax.random.split(jax.random.fold_in(keys[0], number))
        which = jax.random.randint(pick, (), 0, OPERATIONS)
        expected = transform(expected, which, 0.3, jax.random.rademacher(sign, (), jnp.float32))
    run = jax.jit(lambda x, k: randaugment.randaugment(x, k, count=2, magnitude=9.0))
    np.testing.assert_allclose(run(image, keys)[0], expected, atol=1e-6)
