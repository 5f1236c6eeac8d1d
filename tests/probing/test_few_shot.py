"""Few-shot: which rows are drawn, that the classifier is scikit-learn's on them, and what may choose it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from sslx.data.images import PictureSet
from sslx.errors import UserError
from sslx.probing.few_shot import FewShotConfig, _draw, few_shot
from sslx.probing.images import ImageProbe, ImageProbeConfig


def drawn(rows, seed):
    """Three overlapping classes, far from the origin and of unequal scales."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    x = np.random.default_rng(9).normal(size=(3, 6))[labels] + 0.7 * rng.normal(size=(rows, 6))
    return (x * np.logspace(-2, 2, 6) + 5).astype(np.float32), labels.astype(np.int32)


def members(labels):
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def test_so_many_rows_of_each_class_are_drawn_and_others_each_time():
    labels = np.array([0] * 30 + [1] * 50 + [2] * 2)
    draws = [_draw(members(labels), 4, np.random.default_rng([0, 4, number])) for number in range(20)]
    for rows in draws:
        assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
        assert len(set(rows.tolist())) == 4 + 4 + 2  # the smallest class gives what it has
    assert len({tuple(sorted(rows.tolist())) for rows in draws}) == 20


def test_the_classifier_is_that_of_scikit_learn_on_the_drawn_rows():
    (x, y), (test, test_y) = drawn(400, 0), drawn(300, 1)
    config = FewShotConfig(labels=(1, 8), draws=3, learning_rate=0.05, weight_decay=0.1, steps=400)
    found = few_shot(x, y, test, test_y, classes=3, config=config, seed=5)
    standard = [(of - x.mean(0)) / x.std(0) for of in (x, test)]  # by all rows, whose labels that does not need
    assert list(found) == [1, 8]
    for count, accuracies in found.items():
        for number, accuracy in enumerate(accuracies):
            rows = _draw(members(y), count, np.random.default_rng([5, count, number]))
            peer = LogisticRegression(C=1 / (0.1 * len(rows)), tol=1e-8, max_iter=5000).fit(standard[0][rows], y[rows])
            assert accuracy == pytest.approx(np.mean(peer.predict(standard[1]) == test_y), abs=2 / 300)
        assert len(set(accuracies.tolist())) > 1
    assert found[8].mean() > found[1].mean()
    again = few_shot(x, y, test, test_y, classes=3, config=config, seed=5)
    np.testing.assert_array_equal(again[8], found[8])
    # Labels of the test rows are for the score alone: with others, what is guessed stays.
    others = few_shot(x, y, test, (test_y + 1) % 3, classes=3, config=config, seed=5)
    assert (others[8] + found[8] <= 1).all()


def test_probes_see_the_labels_that_what_is_trained_on_them_sees():
    data = PictureSet("digits", test_split="test", labels_per_class=3)
    run = type("Run", (), {"written": {"data": {"image_size": 8, "channels": 1}}})
    images = [
        ImageProbe().open(ImageProbeConfig(seed=seed, data=data), "run", run).train.fetch(np.arange(30))["image"]
        for seed in (0, 1, 1)
    ]
    np.testing.assert_array_equal(images[1], images[2])
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize("options", [dict(labels=(0,)), dict(draws=0), dict(learning_rate=0.0), dict(steps=0)])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(UserError, match=rf"config\.few_shot\.{next(iter(options))}"):
        FewShotConfig(**options)
