"""Boxes: IoU and GIoU against counting pixels, suppression by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sslx.models.boxes import giou, iou, suppressed


def pixels_of(box):
    """The pixels of a box with whole corners, as a mask."""
    mask = np.zeros((20, 20), bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    return mask


def random_boxes(count, seed):
    draw = np.random.default_rng(seed)
    corner = draw.integers(0, 15, (count, 2))
    return np.concatenate([corner, corner + draw.integers(1, 6, (count, 2))], axis=1)


def test_iou_and_giou_are_those_of_counted_pixels():
    boxes, others = random_boxes(40, 0), random_boxes(40, 1)
    expected_iou, expected_giou = np.zeros((40, 40)), np.zeros((40, 40))
    for i, a in enumerate(boxes):
        for j, b in enumerate(others):
            shared = (pixels_of(a) & pixels_of(b)).sum()
            union = (pixels_of(a) | pixels_of(b)).sum()
            around = pixels_of([*np.minimum(a[:2], b[:2]), *np.maximum(a[2:], b[2:])]).sum()
            expected_iou[i, j] = shared / union
            expected_giou[i, j] = shared / union - (around - union) / around
    assert (expected_iou > 0).sum() > 50
    assert (expected_giou < 0).sum() > 50
    np.testing.assert_allclose(iou(boxes.astype(float), others.astype(float)), expected_iou, atol=1e-6)
    found = giou(jnp.float32(boxes)[:, None], jnp.float32(others)[None])
    np.testing.assert_allclose(found, expected_giou, atol=1e-6)


def test_boxes_apart_are_drawn_to_each_other_and_empty_ones_are_finite():
    gradient = jax.grad(lambda box: giou(box, jnp.array([10.0, 0.0, 14.0, 4.0])))(jnp.array([0.0, 0.0, 4.0, 4.0]))
    assert gradient[2] > 0  # the right edge moves right
    nothing = jnp.zeros(4)
    assert np.isfinite(giou(nothing, nothing))
    assert np.isfinite(jax.grad(lambda box: giou(box, nothing))(nothing)).all()


def test_the_less_sure_of_two_guesses_is_dropped():
    boxes = np.array(
        [
            [0, 0, 10, 10],  # less sure than the next, with which it shares 9 of 11 columns
            [1, 0, 11, 10],
            [6, 0, 16, 10],  # shares 5 of 15 with the second: kept
            [0, 0, 10, 10],  # of another class: kept
            [2, 0, 12, 10],  # dropped by the second; would it drop anything itself, it were the third
            [30, 30, 40, 40],
            [30, 30, 40, 40],  # as sure as the one before: the first stays
        ],
        float,
    )
    scores = np.array([0.8, 0.9, 0.5, 0.1, 0.7, 0.3, 0.3])
    classes = np.array([0, 0, 0, 1, 0, 0, 0])
    dropped = suppressed(boxes, scores, classes, threshold=0.4)
    # The fifth and the third share 6 of 14 columns, 0.43: what has been dropped drops nothing.
    assert dropped.tolist() == [True, False, False, False, True, False, True]
    assert not suppressed(boxes[:0], scores[:0], classes[:0], threshold=0.4).size
