"""Exact match, F1 and the best threshold against cases done by hand and a search over all thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from sslx.tasks.squad_scores import best_threshold, exact_match, f1, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a   Cat\tand an OWL ", "cat and owl"),
        ("U.S. the-end", "us theend"),  # punctuation goes first, and leaves no space
        ("theatre, anthem, a", "theatre anthem"),  # articles are whole words
        ("“A” rose", "“ ” rose"),  # only ASCII's punctuation goes
        ("The", ""),
        ("1,000", "1000"),
    ],
)
def test_answers_are_normalised_as_squad_does(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "overlap"),
    [
        ("the Cat", ["cat!"], 1, 1),
        ("black cat", ["cat", "a dog"], 0, 2 / 3),  # precision 1/2, recall 1
        ("black cat", ["white dog", "the black cat sat"], 0, 4 / 5),  # the best of all gold answers
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as both have it
        ("dog", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("cat", ["the", "cat"], 1, 1),
        ("an", ["the"], 1, 1),  # neither has a word left
    ],
)
def test_scores_of_one_question(answer, gold, exact, overlap):
    assert exact_match(answer, gold) == exact
    assert f1(answer, gold) == pytest.approx(overlap)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_is_that_of_a_search(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 12))
    no_answer = rng.integers(-3, 4, size) / 2.0  # with ties
    answerable = rng.random(size) < 0.6
    scores = np.where(answerable, rng.random(size).round(1), 0.0)
    threshold, reached = best_threshold(scores.tolist(), no_answer.tolist(), answerable.tolist())

    def mean(at):
        return np.mean([(not a) if n > at else s for s, n, a in zip(scores, no_answer, answerable, strict=True)])

    assert reached == pytest.approx(mean(threshold))
    assert reached == pytest.approx(max(mean(at) for at in [-9.0, *no_answer]))
