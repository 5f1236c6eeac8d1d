"""Views by a config: a row's view is a function of its key alone, wherever the row stands and on how many devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.augment.colour import gaussian_blur, grey, solarise
from sslx.augment.crop import resized
from sslx.augment.policy import NONE, AugmentConfig, Views, augment, crop_views
from sslx.config import build, to_config_dict
from sslx.errors import UserError
from sslx.objective import row_keys

EVERYTHING = AugmentConfig(
    crop_area=(0.3, 1.0),
    randaugment=1,
    jitter=0.8,
    grey=0.3,
    blur=0.5,
    solarise=0.3,
    erase=0.5,
)
ROWS = 8


def pictures(channels, size=10):
    return np.random.default_rng(channels).integers(0, 256, (ROWS, size, size, channels), dtype=np.uint8)


def viewed(config, size=None):
    """Makes the views of pictures with these row numbers, as a step does."""

    def make(images, rows):
        row_key, order_key = jax.random.split(jax.random.key(7))
        return augment(images, row_keys(row_key, rows), order_key, config, size=size)

    return jax.jit(make)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_rows_view_is_its_own_alone_in_any_order_and_on_any_devices(channels):
    images, rows, make = pictures(channels), np.arange(100, 100 + ROWS), viewed(EVERYTHING)
    views = np.asarray(make(images, rows))
    assert views.shape == images.shape
    assert views.dtype == np.float32
    assert views.min() >= 0
    assert views.max() <= 1
    assert all(np.abs(view - image / 255).max() > 0.01 for view, image in zip(views, images, strict=True))
    other = np.random.default_rng(0).permutation(ROWS)
    np.testing.assert_allclose(make(images[other], rows[other]), views[other], atol=1e-5)
    alone = [3] * ROWS  # among copies of itself, so that one program serves all
    np.testing.assert_allclose(make(images[alone], rows[alone]), views[alone], atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    on_eight = make(jax.device_put(images, spread), jax.device_put(rows, spread))
    assert len(on_eight.sharding.device_set) == 8
    np.testing.assert_allclose(on_eight, views, atol=1e-5)


def test_no_product_is_left_to_the_rounding_of_accelerators():
    # Of their own accord they round to 8 or 11 bits what goes into a product: pixels, and where they are taken from.
    lowered = viewed(EVERYTHING, 12).lower(pictures(3), np.arange(ROWS)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line or "stablehlo.convolution" in line]
    assert products
    assert [line.strip() for line in products if "HIGHEST" not in line] == []


def test_what_a_view_is_made_of_comes_in_the_order_of_the_config():
    images = pictures(3, 16)
    config = AugmentConfig(crop_area=(1.0, 1.0), flip=1.0, grey=1.0, blur=1.0, blur_sigma=(1.0, 1.0), solarise=1.0)

    def by_hand(image):
        return solarise(gaussian_blur(grey(image[:, ::-1] / jnp.float32(255)), 1.0, 1))

    views = viewed(config)(images, np.arange(ROWS))
    np.testing.assert_allclose(views, jax.jit(jax.vmap(by_hand))(images), atol=1e-6)


def test_another_row_has_another_view():
    images = np.repeat(pictures(3)[:1], ROWS, axis=0)
    view = viewed(AugmentConfig())
    views = [np.asarray(view(images, first + np.arange(ROWS))) for first in (0, ROWS)]
    assert len({one.tobytes() for of in views for one in of}) == 2 * ROWS


def test_without_anything_a_view_is_the_picture():
    images = pictures(3)
    np.testing.assert_allclose(viewed(NONE)(images, np.arange(ROWS)), images / np.float32(255), atol=1e-7)
    small = viewed(NONE, 6)(images, np.arange(ROWS))
    for image, view in zip(images, small, strict=True):  # all of it, made smaller
        expected = resized(jnp.asarray(image / np.float32(255)), jnp.array([0.0, 0.0, 10.0, 10.0]), 6)
        np.testing.assert_allclose(view, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur", "solarise", "erase"])
def test_a_probability_of_one_changes_what_one_of_zero_leaves(name):
    images = pictures(3, 16)
    plain = AugmentConfig(**{"crop_area": (1.0, 1.0), "flip": 0.0, "blur_sigma": (1.0, 1.0), name: 1.0})
    views = np.asarray(viewed(plain)(images, np.arange(ROWS)))
    assert all(np.abs(view - image / 255).max() > 0.02 for view, image in zip(views, images, strict=True))


def test_multi_crop_gives_views_of_several_sizes_each_its_own():
    images, rows = pictures(3, 16), np.arange(ROWS)
    large = AugmentConfig(crop_area=(0.4, 1.0), blur=1.0)
    small = AugmentConfig(crop_area=(0.05, 0.4))
    kinds = (Views(1, 12, large), Views(2, 6, small))

    def make(images, rows, kinds):
        row_key, order_key = jax.random.split(jax.random.key(1))
        return crop_views(images, row_keys(row_key, rows), order_key, kinds)

    run = jax.jit(make, static_argnums=2)
    made = run(images, rows, kinds)
    assert [views.shape for views in made] == [(ROWS, 1, 12, 12, 3), (ROWS, 2, 6, 6, 3)]
    assert (
        len({np.asarray(view).tobytes() for views in made for view in views.reshape(-1, *views.shape[2:])}) == 3 * ROWS
    )
    for views, turned in zip(made, run(images[::-1], rows[::-1], kinds), strict=True):
        np.testing.assert_allclose(turned[::-1], views, atol=1e-5)
    # A view does not depend on those that come after it.
    fewer = run(images, rows, kinds[:1])
    np.testing.assert_allclose(fewer[0], made[0], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.5}, "an augmentation's flip is 1.5; expected a probability"),
        ({"hue": 0.6}, "an augmentation's hue is 0.6; expected 0 to 0.5"),
        ({"brightness": -0.1}, "brightness is -0.1; expected 0 to 1"),
        ({"crop_area": (0.5, 0.2)}, "an augmentation's crop_area is"),
        ({"crop_aspect": (0.0, 1.0)}, "an augmentation's crop_aspect is"),
        ({"blur_sigma": (0.0, 1.0)}, "an augmentation's blur_sigma is"),
        ({"randaugment": -1}, "an augmentation's randaugment is -1 at 9"),
        ({"randaugment_magnitude": 31.0}, "an augmentation's randaugment is 0 at 31; expected 0 or more at 0 to 30"),
        ({"blurr": 0.5}, "unknown key config.pretext.augment.blurr; did you mean 'blur'"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    written = to_config_dict(AugmentConfig()).to_dict() | changes
    with pytest.raises(UserError, match=message):
        build(AugmentConfig, written, "config.pretext.augment")


def test_views_that_cannot_be():
    with pytest.raises(UserError, match="0 views of 8 pixels are asked for; expected at least 1"):
        Views(0, 8, NONE)
