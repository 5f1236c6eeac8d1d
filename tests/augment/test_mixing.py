"""Mixing pictures and erasing parts of them beside NumPy: the same boxes and shares, targets by what is seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.augment.mixing import cutmix, mixup, random_erasing

ROWS, CLASSES = 400, 5


@pytest.fixture(scope="module", params=[1, 3])
def batch(request):
    draw = np.random.default_rng(0)
    images = draw.random((ROWS, 12, 16, request.param), dtype=np.float32)
    targets = np.eye(CLASSES, dtype=np.float32)[draw.integers(0, CLASSES, ROWS)]
    return images, targets, jax.random.split(jax.random.key(0), ROWS)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_mixup_blends_with_the_next_row_by_a_share_of_beta(batch, alpha):
    images, targets, keys = batch
    found, mixed = (np.asarray(x) for x in jax.jit(lambda *a: mixup(*a, alpha))(images, targets, keys))
    others = np.roll(images, -1, axis=0)
    # The share that explains the picture best explains the target too.
    gap = images - others
    share = np.sum((found - others) * gap, axis=(1, 2, 3)) / np.sum(gap**2, axis=(1, 2, 3))
    np.testing.assert_allclose(found, others + share[:, None, None, None] * gap, atol=1e-5)
    np.testing.assert_allclose(
        mixed, share[:, None] * targets + (1 - share[:, None]) * np.roll(targets, -1, 0), atol=1e-5
    )
    assert share.min() >= -1e-5
    assert share.max() <= 1 + 1e-5
    assert share.mean() == pytest.approx(0.5, abs=0.06)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)  # of Beta(alpha, alpha)


def boxes(inside):
    """Top, bottom, left, right of each row's pixels, which are a full rectangle; rows without any are left out."""
    found = []
    for mask in inside:
        if mask.any():
            rows, columns = (np.nonzero(mask.any(axis=axis))[0] for axis in (1, 0))
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            found.append((rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    return np.array(found)


def test_cutmix_pastes_a_box_and_shares_the_target_by_its_area(batch):
    images, targets, keys = batch
    found, mixed = (np.asarray(x) for x in jax.jit(lambda *a: cutmix(*a, 1.0))(images, targets, keys))
    others = np.roll(images, -1, axis=0)
    pasted = np.all(found == others, axis=-1)
    assert np.all(pasted | np.all(found == images, axis=-1))
    top, bottom, left, right = boxes(pasted).T
    share = pasted.mean(axis=(1, 2))
    np.testing.assert_allclose(
        mixed, (1 - share)[:, None] * targets + share[:, None] * np.roll(targets, -1, axis=0), atol=1e-5
    )
    # Of a box that no edge has cut off, the sides are those of the picture, to a pixel.
    free = (top > 0) & (bottom < 12) & (left > 0) & (right < 16)
    assert free.sum() > 30
    assert np.abs((bottom - top)[free] / 12 - (right - left)[free] / 16).max() <= 1 / 12 + 1 / 16
    # The centre is anywhere, so edges are reached as often as chance has it.
    assert np.mean(top == 0) == pytest.approx(np.mean(bottom == 12), abs=0.1)
    assert np.mean(left == 0) == pytest.approx(np.mean(right == 16), abs=0.1)
    # E of the share of a box of area 1-λ, λ even, centred anywhere: ∫ (s - s²/4)² over s² even in [0, 1] = 77/240.
    assert share.mean() == pytest.approx(77 / 240, abs=0.04)


def test_erasing_fills_a_box_inside_the_picture_with_noise(batch):
    images, _, keys = batch
    run = jax.jit(lambda x, k: random_erasing(x, k, (0.1, 0.3), (0.5, 2.0)))
    found = np.asarray(run(images, keys))
    erased = np.any(found != images, axis=-1)
    top, bottom, left, right = boxes(erased).T
    assert len(top) == ROWS
    area = (bottom - top) * (right - left) / (12 * 16)
    assert area.min() > 0.1 - 0.05  # in whole pixels
    assert area.max() < 0.3 + 0.08
    assert area.mean() == pytest.approx(0.2, abs=0.015)
    ratio = (right - left) / (bottom - top)
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.1)
    assert (ratio.min(), ratio.max()) == pytest.approx((0.5, 2.0), rel=0.35)
    noise = found[erased]
    assert (noise.mean(), noise.std()) == pytest.approx((0.5, 0.25), abs=0.02)
    assert noise.min() >= 0
    assert noise.max() <= 1


def test_a_box_covers_each_place_alike():
    keys = jax.random.split(jax.random.key(2), 3000)
    images = jnp.full((3000, 8, 8, 1), 2.0)  # no noise is that bright
    erased = np.asarray(jax.jit(lambda x, k: random_erasing(x, k, (0.05, 0.05), (1.0, 1.0)))(images, keys)) < 2
    counts = erased.mean(axis=0)[..., 0]
    np.testing.assert_allclose(counts, counts.T, atol=0.03)
    np.testing.assert_allclose(counts, counts[::-1], atol=0.03)
    assert erased.sum(axis=(1, 2, 3)).min() >= 1
