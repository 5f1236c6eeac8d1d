"""FCOS's head: locations and targets by hand, focal loss against NumPy, maps of the sizes that they should have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.models.fcos import Fcos, FcosConfig, assigned, focal_loss, head_flops, locations, sigmoid_cross_entropy
from sslx.models.vit import VitConfig

MODEL = VitConfig(
    layers=1, width=16, heads=2, mlp_width=32, image_size=16, patch_size=4, channels=1, positions="sincos", pool="mean"
)


def test_locations_are_the_middles_of_their_cells():
    places = locations(MODEL, (2.0, 1.0))
    assert len(places.points) == 8 * 8 + 4 * 4
    np.testing.assert_array_equal(places.points[:3], [[1, 1], [3, 1], [5, 1]])
    np.testing.assert_array_equal(places.points[[64, 65, 68]], [[2, 2], [6, 2], [2, 6]])
    assert places.strides.tolist() == [2.0] * 64 + [4.0] * 16
    # The finer map takes what ends within eight of its strides; the last has no bound.
    assert set(zip(places.least.tolist(), places.most.tolist(), strict=True)) == {(0.0, 16.0), (16.0, np.inf)}


def targets_of(boxes, classes, *, kind=None, radius=1.5, scales=(1.0,)):
    boxes, classes = np.array([boxes], np.float32), np.array([classes], np.int32)
    kind = np.ones_like(classes) if kind is None else np.array([kind])
    found = assigned(locations(MODEL, scales), boxes, classes, kind == 1, kind == 2, centre_radius=radius)
    return jax.tree.map(lambda array: np.asarray(array[0]), found)


def test_a_location_near_the_middle_of_a_box_is_its():
    # Locations are at 2, 6, 10 and 14. The box's middle is (5, 6): |x - 5| < 6 and |y - 6| < 6 leave x of 2, 6, 10 and
    # y of 2, 6, 10, and the box itself ends at 9 and begins at 1.
    found = targets_of([[1, 0, 9, 12]], [3])
    grid = found.classes.reshape(4, 4)
    expected = np.full((4, 4), -1)
    expected[:3, :2] = 3
    np.testing.assert_array_equal(grid, expected)
    # At (2, 2): left 1, right 7, top 2, bottom 10.
    assert found.centerness.reshape(4, 4)[0, 0] == pytest.approx(np.sqrt(1 / 7 * 2 / 10))
    # At (6, 6): left 5, right 3, top 6, bottom 6.
    assert found.centerness.reshape(4, 4)[1, 1] == pytest.approx(np.sqrt(3 / 5))
    assert (found.centerness[found.classes < 0] == 0).all()
    assert (found.boxes[found.classes >= 0] == [1, 0, 9, 12]).all()
    # In a smaller circle only the row of the middle is left.
    near = targets_of([[1, 0, 9, 12]], [3], radius=0.9).classes.reshape(4, 4)
    np.testing.assert_array_equal(np.argwhere(near == 3), [[1, 0], [1, 1]])


def test_of_two_boxes_the_smaller_is_the_target_and_padding_is_none():
    boxes = [[0, 0, 16, 16], [4, 4, 12, 12], [0, 0, 8, 8]]
    found = targets_of(boxes, [0, 1, 2], kind=[1, 1, 0], radius=0.0)
    grid = found.classes.reshape(4, 4)
    assert (grid[1:3, 1:3] == 1).all()
    grid = grid.copy()
    grid[1:3, 1:3] = 0
    assert (grid == 0).all()
    assert (found.counted == 1).all()


def test_empty_locations_in_a_crowd_count_nothing():
    found = targets_of([[0, 0, 8, 16], [4, 4, 8, 8]], [0, 1], kind=[2, 1])
    grid, counted = found.classes.reshape(4, 4), found.counted.reshape(4, 4)
    assert grid[1, 1] == 1  # an object in the crowd
    assert (np.delete(grid.ravel(), 5) == -1).all()
    expected = np.ones((4, 4))
    expected[:, :2] = 0
    expected[1, 1] = 1
    np.testing.assert_array_equal(counted, expected)


def test_a_large_box_is_left_to_the_coarser_map():
    # From (1, 1) of the finer map the right edge of the second is 15 away; more than 16 none can be here.
    found = targets_of([[0, 0, 16, 16]], [0], scales=(2.0, 1.0), radius=0.0)
    assert (found.classes[:64] == 0).all()
    assert (found.classes[64:] == -1).all()
    model = VitConfig(
        layers=1, width=16, heads=2, mlp_width=32, image_size=64, patch_size=4, positions="sincos", pool="mean"
    )
    places = locations(model, (2.0, 1.0))
    boxes, one = jnp.array([[[0.0, 0.0, 64.0, 64.0]]]), jnp.ones((1, 1), bool)
    classes = np.asarray(assigned(places, boxes, jnp.zeros((1, 1), int), one, ~one, centre_radius=0.0).classes[0])
    assert (classes[:1024] == -1).all()
    assert (classes[1024:] == 0).all()


def test_targets_of_many_boxes_on_two_maps_are_those_of_the_papers_rules_one_by_one():
    draw = np.random.default_rng(0)
    corner = draw.uniform(0, 44, (2, 9, 2))
    boxes = np.concatenate([corner, corner + draw.uniform(2, 40, (2, 9, 2))], axis=-1).clip(0, 48).astype(np.float32)
    classes, kind = draw.integers(0, 5, (2, 9)), draw.choice([0, 1, 1, 1, 2], (2, 9))
    model = VitConfig(
        layers=1, width=16, heads=2, mlp_width=32, image_size=48, patch_size=4, positions="sincos", pool="mean"
    )
    places = locations(model, (2.0, 1.0))
    found = jax.jit(lambda: assigned(places, boxes, classes, kind == 1, kind == 2, centre_radius=1.5))()
    positive = small = 0
    for row in range(2):
        for place, (x, y) in enumerate(places.points):
            stride, (low, high) = (2, (0, 16)) if place < 24**2 else (4, (16, np.inf))
            best, crowded = None, False
            for box, label, what in zip(boxes[row], classes[row], kind[row], strict=True):
                left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
                if min(left, top, right, bottom) <= 0:
                    continue
                crowded |= what == 2
                near = max(abs(right - left), abs(bottom - top)) / 2 < 1.5 * stride
                if what != 1 or not near or not low < max(left, top, right, bottom) <= high:
                    continue
                area = (box[2] - box[0]) * (box[3] - box[1])
                if best is None or area < best[0]:
                    across, down = sorted((left, right)), sorted((top, bottom))
                    best = area, label, box, np.sqrt(across[0] / across[1] * down[0] / down[1])
            if best is None:
                assert found.classes[row, place] == -1
                assert found.centerness[row, place] == 0
                assert found.counted[row, place] == (not crowded)
                continue
            positive, small = positive + 1, small + (place < 24**2)
            assert found.classes[row, place] == best[1]
            np.testing.assert_array_equal(found.boxes[row, place], best[2])
            assert found.centerness[row, place] == pytest.approx(best[3], rel=1e-4)
            assert found.counted[row, place] == 1
    assert 10 < small < positive - 10


def test_focal_loss_is_the_papers():
    logits = np.linspace(-6, 6, 25)
    for target in (0.0, 1.0):
        p = 1 / (1 + np.exp(-logits))
        pt, at = (p, 0.25) if target else (1 - p, 0.75)
        found = focal_loss(jnp.float32(logits), jnp.full(25, target), alpha=0.25, gamma=2.0)
        np.testing.assert_allclose(found, -at * (1 - pt) ** 2 * np.log(pt), rtol=1e-4, atol=1e-7)
    p, soft = 1 / (1 + np.exp(-1.5)), 0.3
    expected = -soft * np.log(p) - (1 - soft) * np.log(1 - p)
    assert sigmoid_cross_entropy(jnp.float32(1.5), jnp.float32(soft)) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(focal_loss(jnp.array([-200.0, 200.0]), jnp.array([1.0, 0.0]), alpha=0.25, gamma=2.0)).all()


def test_the_head_says_something_at_every_location_of_every_map():
    config = FcosConfig(classes=3, scales=(4.0, 2.0, 1.0, 0.5), layers=1, width=8)
    patches = jax.random.normal(jax.random.key(0), (2, 16, 16))
    found, variables = jax.jit(lambda: Fcos(config, MODEL).init_with_output(jax.random.key(1), patches))()
    count = 16**2 + 8**2 + 4**2 + 2**2
    assert [array.shape for array in found] == [(2, count, 3), (2, count, 4), (2, count)]
    # At the start a class is as likely as the prior, and a box is two strides wide, around its location.
    probabilities = np.asarray(jax.nn.sigmoid(found.logits))
    np.testing.assert_allclose(probabilities, 0.01, rtol=0.5)
    places = locations(MODEL, config.scales)
    expected = np.concatenate([places.points - places.strides[:, None], places.points + places.strides[:, None]], -1)
    assert (np.abs(found.boxes[0] - expected) <= 0.3 * places.strides[:, None]).all()
    assert set(variables["params"]) >= {"maps_0", "class_tower_0", "box_tower_0", "range_scales"}
    assert head_flops(config, MODEL) > head_flops(FcosConfig(3, (1.0,), 1, 8), MODEL) > 0
