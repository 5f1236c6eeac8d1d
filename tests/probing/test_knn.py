"""Nearest neighbours against a loop over rows in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from sslx.errors import UserError
from sslx.probing import knn
from sslx.probing.knn import KnnConfig, knn_scores


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_are_those_of_a_loop(temperature, monkeypatch):
    monkeypatch.setattr(knn, "ROWS_AT_ONCE", 8)  # 19 queries: two chunks and a part
    rng = np.random.default_rng(0)
    train, queries = (rng.normal(size=(rows, 6)).astype(np.float32) for rows in (40, 19))
    labels = rng.integers(0, 4, 40).astype(np.int32)
    found = knn_scores(train, labels, queries, classes=4, config=KnnConfig(7, temperature))
    for query, scores in zip(np.float64(queries), found, strict=True):
        similarity = [query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in np.float64(train)]
        expected = np.zeros(4)
        for row in sorted(range(40), key=lambda row: -similarity[row])[:7]:
            expected[labels[row]] += np.exp(similarity[row] / temperature)
        np.testing.assert_allclose(scores / scores.sum(), expected / expected.sum(), rtol=1e-3)


def test_separable_features_are_told_apart_without_an_error():
    rng = np.random.default_rng(0)
    labels = (np.arange(30) % 3).astype(np.int32)
    x = (np.eye(3)[labels] + 0.05 * rng.normal(size=(30, 3))).astype(np.float32)
    # 20 of 30 vote, so two thirds of the votes are wrong ones, of less weight.
    scores = knn_scores(x[:24], labels[:24], 100 * x[24:], classes=3, config=KnnConfig())
    assert (scores.argmax(-1) == labels[24:]).all()


def test_fewer_rows_than_neighbours_and_a_small_temperature():
    x = np.eye(3, dtype=np.float32)
    scores = knn_scores(x, np.arange(3, dtype=np.int32), x[::-1], classes=3, config=KnnConfig(20, 1e-3))
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores.argmax(-1), [2, 1, 0])


def test_settings_that_cannot_be():
    for options in ({"neighbours": 0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=f"config.knn.{next(iter(options))}"):
            KnnConfig(**options)
