import itertools
import random

import numpy as np
import pytest

from sslx.data import near_duplicates as nd

WORDS = [f"word{i}" for i in range(400)]


def _text(seed: int, length: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def _edited(text: str, every: int) -> str:
    return " ".join("edited" if i % every == every - 1 else word for i, word in enumerate(text.split()))


def _python_set(text: str, size: int = 5) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _kept(texts: list[str]) -> set[int]:
    return set(nd.representatives(texts, containment=0.5).tolist())


def test_shingles_count_words_only_and_depend_on_their_order():
    a, layout, reordered, repeated = nd.shingle_sets(
        ["one two three four five six", "One, two\n  THREE-four (five) six!", "six five four three two one", "a " * 50]
    )
    assert np.array_equal(a, layout)
    assert not np.intersect1d(a, reordered).size
    assert (len(a), len(repeated)) == (2, 1)


def test_shingles_do_not_reach_into_the_next_text():
    texts = [_text(0), "", "three words only", _text(1), "one two three four five"]
    alone = [nd.shingle_sets([text])[0] for text in texts]
    assert all(np.array_equal(a, b) for a, b in zip(nd.shingle_sets(texts), alone, strict=True))
    assert [len(shingles) for shingles in alone] == [len(_python_set(texts[0])), 0, 1, len(_python_set(texts[3])), 1]


def test_pairs_are_those_of_a_plain_count():
    words = _text(0, 400)
    texts = [_edited(words, every) for every in (3, 6, 7, 9, 13, 29, 60, 500)]
    texts += [
        " ".join(words.split()[begin : begin + size]) for begin, size in ((0, 60), (10, 90), (40, 80), (100, 200))
    ]
    texts += ["", "few words", _text(1), _text(1, 60)]
    sets = [_python_set(text) if len(text.split()) >= 5 else set() for text in texts]
    for containment in (0.2, 0.5, 1.0):
        expected = []
        for i, a in enumerate(sets):
            for j, b in enumerate(sets[i + 1 :], i + 1):
                shared = len(a & b)
                if shared and shared / min(len(a), len(b)) >= containment:
                    expected.append([i, j])
        found = nd.near_pairs(nd.shingle_sets(texts), containment=containment)
        assert 3 < len(expected) < 100
        assert found.tolist() == expected


def test_edited_twins_are_reduced_to_the_longest():
    texts = [_text(i) for i in range(50)]
    twins = [_edited(text, 15) + " and a longer ending" for text in texts]
    assert _kept(texts + twins) == set(range(50, 100))


def test_quoted_texts_go_and_unrelated_texts_stay():
    quoted = [_text(i, 60) for i in range(30)]
    quoting = [f"{_text(100 + i, 60)} {quoted[i]}" for i in range(30)]
    assert _kept(quoted + quoting) == set(range(30, 60))
    unrelated = [_text(i) for i in range(200)]
    assert _kept(unrelated) == set(range(200))


def test_shared_boilerplate_below_the_thresholds_is_no_twin():
    boilerplate = " ".join(f"boiler{i}" for i in range(40))
    assert _kept([f"{_text(i)} {boilerplate}" for i in range(50)]) == set(range(50))


def test_no_two_kept_texts_are_twins_along_a_chain():
    # Each is a twin of the next, the ends share nothing: the ends may both stay, neighbours may not.
    words = _text(0, 1000).split()
    texts = [" ".join(words[begin : begin + 120]) for begin in range(0, 600, 40)]
    kept = sorted(_kept(texts))
    assert 1 < len(kept) < len(texts)
    assert all(b - a > 1 for a, b in itertools.pairwise(kept))
    keeper = nd.representatives(texts, containment=0.5)
    assert all(keeper[k] == k for k in keeper), "what stands for a text must itself be kept"


def test_what_is_kept_does_not_depend_on_the_order():
    texts = [_text(i) for i in range(20)] + [_edited(_text(i), 12) for i in range(20)]
    shuffled = random.Random(0).sample(texts, len(texts))
    assert {texts[i] for i in _kept(texts)} == {shuffled[i] for i in _kept(shuffled)}


def test_a_short_text_inside_a_very_long_one_is_found():
    # Jaccard below 0.02: the case that MinHash misses.
    assert _kept([_text(0, 3000), " ".join(_text(0, 3000).split()[100:150])]) == {0}


def test_texts_without_words_stay():
    assert _kept(["", "...", "one word more or less"]) == {0, 1, 2}


def test_empty_inputs():
    assert nd.representatives([], containment=0.5).tolist() == []
    assert nd.representatives(["", _text(0)], containment=0.5).tolist() == [0, 1]


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_thresholds_outside_their_range_are_refused(threshold):
    with pytest.raises(ValueError, match="containment must be in"):
        nd.representatives(["a"], containment=threshold)
