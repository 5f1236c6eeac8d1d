"""Masking against the original's rules (google-research/bert ``create_pretraining_data.py``), row by row in Python."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.pretext import masking
from sslx.pretext.masking import mask_tokens, picked_count

RATIOS = (0.15, 0.3, 0.4)


@functools.cache
def compiled(vocabulary, ratio, whole_word):
    return jax.jit(lambda batch, key: mask_tokens(batch, key, vocabulary, ratio, whole_word=whole_word))


def masked(batch, vocabulary, ratio=0.15, whole_word=False, key=0):
    return jax.device_get(compiled(vocabulary, ratio, whole_word)(batch, jax.random.key(key)))


def picked_positions(found, row):
    return found["positions"][row][found["weights"][row] > 0].tolist()


def words_of(tokens, segment_ids, vocabulary):
    """Lists of positions, one a word: ``##`` pieces belong to the candidate of the same segment just before them."""
    words, last = [], None
    for position, (token, segment) in enumerate(zip(tokens.tolist(), segment_ids.tolist(), strict=True)):
        if segment == 0 or token in vocabulary.special_ids:
            last = None
            continue
        if vocabulary.continuation[token] and last == segment:
            words[-1].append(position)
        else:
            words.append([position])
        last = segment
    return words


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_count_is_exact(packed_rows, vocabulary, ratio):
    batch = packed_rows(200, 64)
    found = masked(batch, vocabulary, ratio)
    lengths = (batch["segment_ids"] > 0).sum(axis=1)
    limit = max(1, round(ratio * 64))
    assert found["positions"].shape == (200, limit)
    expected = [min(limit, max(1, round(ratio * length))) for length in lengths.tolist()]
    assert len(set(expected)) > 5
    assert found["weights"].sum(axis=1).tolist() == expected


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_count_is_that_of_python_at_every_length(vocabulary, ratio):
    # Halves go to the even number, and float32 has other halves: 15 % of 190 is 28.5 in float64 alone.
    length = 512
    segments = np.tril(np.ones((length, length), np.int32))
    batch = {"tokens": segments * 7, "segment_ids": segments, "row": np.arange(length, dtype=np.int32)}
    expected = [min(picked_count(length, ratio), max(1, round(ratio * n))) for n in range(1, length + 1)]
    assert masked(batch, vocabulary, ratio)["weights"].sum(axis=1).tolist() == expected


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_and_padding_are_never_picked(packed_rows, vocabulary, whole_word):
    batch = packed_rows(200, 64)
    found = masked(batch, vocabulary, 0.4, whole_word)
    for row in range(200):
        picked = picked_positions(found, row)
        assert picked == sorted(set(picked))
        assert not set(batch["tokens"][row, picked]) & set(vocabulary.special_ids)
        assert (batch["segment_ids"][row, picked] > 0).all()
        assert found["targets"][row][found["weights"][row] > 0].tolist() == batch["tokens"][row, picked].tolist()
        others = np.setdiff1d(np.arange(64), picked)
        np.testing.assert_array_equal(found["tokens"][row, others], batch["tokens"][row, others])


def test_a_row_without_candidates_picks_nothing(vocabulary):
    tokens = np.array([[2, 3] + [0] * 6, [0] * 8], np.int32)
    batch = {"tokens": tokens, "segment_ids": (tokens > 0).astype(np.int32), "row": np.arange(2, dtype=np.int32)}
    for whole_word in (False, True):
        found = masked(batch, vocabulary, 0.15, whole_word)
        assert found["weights"].sum() == 0
        np.testing.assert_array_equal(found["tokens"], tokens)


def test_of_the_picked_80_percent_are_hidden_10_kept_10_random(vocabulary):
    rows, length = 400, 128
    tokens = np.random.default_rng(0).integers(5, 120, (rows, length)).astype(np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "row": np.arange(rows, dtype=np.int32)}
    found = masked(batch, vocabulary)
    real = found["weights"] > 0
    seen = np.take_along_axis(found["tokens"], found["positions"], axis=1)[real]
    targets, n = found["targets"][real], real.sum()

    def expect(share, probability):
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / n)

    # A random token is now and then the [MASK] token or the old one.
    expect((seen == vocabulary.mask_id).mean(), 0.8 + 0.1 / 120)
    expect((seen == targets).mean(), 0.1 + 0.1 / 120)
    noise = seen[(seen != vocabulary.mask_id) & (seen != targets)]
    counts = np.bincount(noise, minlength=120)
    assert counts[vocabulary.mask_id] == 0
    counts = np.delete(counts, vocabulary.mask_id)
    # Chi-squared over 119 tokens: mean 118, standard deviation 15.
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 118 + 6 * 15
    # Positions are uniform too.
    places = np.bincount(found["positions"][real], minlength=length)
    assert ((places - places.mean()) ** 2 / places.mean()).sum() < 127 + 6 * 16


def test_whole_words_are_picked_whole_and_never_too_many(packed_rows, vocabulary):
    batch = packed_rows(200, 64, seed=1)
    found = masked(batch, vocabulary, 0.2, whole_word=True)
    split_words = 0
    for row in range(200):
        words = words_of(batch["tokens"][row], batch["segment_ids"][row], vocabulary)
        picked = set(picked_positions(found, row))
        taken = [word for word in words if picked & set(word)]
        assert picked == {position for word in taken for position in word}
        wanted = min(round(0.2 * 64), max(1, round(0.2 * int((batch["segment_ids"][row] > 0).sum()))))
        assert len(picked) <= wanted
        left = [len(word) for word in words if not picked & set(word)]
        assert not left or len(picked) + min(left) > wanted  # a word that would still have fitted was not left out
        split_words += sum(len(word) > 1 for word in taken)
    assert split_words > 100


def test_whole_word_picking_is_the_greedy_pass_of_the_original(packed_rows, vocabulary, monkeypatch):
    # The same draw of one number a word decides about the order here and there.
    batch = packed_rows(50, 40, seed=2)
    draw = np.random.default_rng(0).permutation(40).astype(np.float32) / 40
    monkeypatch.setattr(masking.jax.random, "uniform", lambda key, shape: jnp.asarray(draw[: shape[0]]))
    found = jax.device_get(mask_tokens(batch, jax.random.key(0), vocabulary, 0.2, whole_word=True))
    for row in range(50):
        words = words_of(batch["tokens"][row], batch["segment_ids"][row], vocabulary)
        wanted = min(8, max(1, round(0.2 * int((batch["segment_ids"][row] > 0).sum()))))
        picked = []
        for word in sorted(range(len(words)), key=lambda index: draw[index]):
            if len(picked) >= wanted:
                break
            if len(picked) + len(words[word]) <= wanted:
                picked += words[word]
        assert picked_positions(found, row) == sorted(picked)


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_row_is_masked_alike_in_any_batch(packed_rows, vocabulary, whole_word):
    batch = packed_rows(200, 64)
    full = masked(batch, vocabulary, 0.4, whole_word)
    order = np.random.default_rng(0).permutation(200)[:50]
    part = masked({name: array[order] for name, array in batch.items()}, vocabulary, 0.4, whole_word)
    for name, array in full.items():
        np.testing.assert_array_equal(array[order], part[name])


def test_masks_differ_between_rows_and_between_keys(vocabulary):
    tokens = np.full((8, 64), 9, np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "row": np.arange(8, dtype=np.int32)}
    one, other = masked(batch, vocabulary), masked(batch, vocabulary, key=1)
    assert len({tuple(row) for row in one["positions"].tolist()}) == 8
    assert (one["positions"] != other["positions"]).any(axis=1).all()


@pytest.mark.parametrize("hidden", [0.85, 1.0])
def test_without_random_tokens_a_picked_one_is_hidden_or_kept(packed_rows, vocabulary, hidden):
    batch = packed_rows(200, 64)
    mask = jax.jit(lambda b: mask_tokens(b, jax.random.key(0), vocabulary, 0.15, hidden=hidden, noise=0.0))
    found = jax.device_get(mask(batch))
    real = found["weights"] > 0
    seen = np.take_along_axis(found["tokens"], found["positions"], axis=1)[real]
    kept = seen == found["targets"][real]
    assert set(seen[~kept]) == {vocabulary.mask_id}
    assert abs(kept.mean() - (1 - hidden)) <= 5 * np.sqrt(hidden * (1 - hidden) / real.sum())
    np.testing.assert_array_equal(found["positions"], masked(batch, vocabulary)["positions"])


@pytest.mark.parametrize("span", [1, 3, 4])
def test_spans_are_taken_in_the_order_of_their_draws_until_the_count_is_reached(
    packed_rows, vocabulary, monkeypatch, span
):
    batch, length, ratio = packed_rows(50, 40, seed=3), 40, 0.35
    draw = np.random.default_rng(span).permutation(length + span - 1).astype(np.float32) / 64
    monkeypatch.setattr(masking.jax.random, "uniform", lambda key, shape: jnp.asarray(draw[: shape[0]]))
    mask = jax.jit(lambda b: mask_tokens(b, jax.random.key(0), vocabulary, ratio, span=span, hidden=1.0, noise=0.0))
    found = jax.device_get(mask(batch))
    cut = 0
    for row in range(50):
        tokens, segments = batch["tokens"][row].tolist(), batch["segment_ids"][row]
        candidates = {i for i in range(length) if segments[i] > 0 and tokens[i] not in vocabulary.special_ids}
        wanted, picked = max(1, round(ratio * int((segments > 0).sum()))), []
        for begin in sorted(range(length + span - 1), key=lambda begin: draw[begin]):
            places = range(begin - span + 1, begin + 1)  # the first begin before the row
            new = [i for i in places if i in candidates and i not in picked]
            cut += len(new) > wanted - len(picked) > 0
            picked += new[: wanted - len(picked)]
        assert picked_positions(found, row) == sorted(picked)
        assert (found["tokens"][row, sorted(picked)] == vocabulary.mask_id).all()
    assert cut > 0 or span == 1


def test_spans_are_runs_with_exact_counts_and_every_place_is_as_likely(vocabulary):
    rows, length = 2000, 40
    tokens = np.random.default_rng(0).integers(5, 120, (rows, length)).astype(np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "row": np.arange(rows, dtype=np.int32)}
    mask = jax.jit(lambda b: mask_tokens(b, jax.random.key(0), vocabulary, 0.3, span=4, hidden=1.0, noise=0.0))
    found = jax.device_get(mask(batch))
    assert (found["weights"].sum(axis=1) == 12).all()
    places = np.bincount(found["positions"].ravel(), minlength=length)
    # Places of a row hang together in fours, so counts spread wider than independent ones.
    assert np.abs(places / (rows * 0.3) - 1).max() < 0.15
    hidden = found["tokens"] == vocabulary.mask_id
    runs = (np.diff(hidden.astype(int), axis=1, prepend=0) == 1).sum(axis=1)
    assert 2 < runs.mean() < 4  # alone they would be about 8.6
    part = jax.device_get(mask({name: array[7:9] for name, array in batch.items()}))
    np.testing.assert_array_equal(part["positions"], found["positions"][7:9])
