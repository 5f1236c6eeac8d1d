"""Packing is tested on what a plan promises, and its best fit against a slow one-piece-at-a-time packer."""

from __future__ import annotations

import numpy as np
import pytest

from sslx.data.packing import causal_plan, documents_plan, flat_ranges, pack_histogram, packed_plan


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@pytest.fixture(params=["short", "long", "mixed", "one"])
def lengths(request):
    rng = np.random.default_rng(0)
    return {
        "short": rng.integers(1, 20, 3000),
        "long": rng.integers(500, 5000, 50),
        "mixed": np.maximum(1, rng.lognormal(4, 1.5, 2000)).astype(np.int64),
        "one": np.array([1]),
    }[request.param]


@pytest.mark.parametrize("seq_len", [16, 128])
def test_every_token_is_in_exactly_one_piece_and_no_row_is_over_length(lengths, seq_len):
    offsets = offsets_of(lengths)
    plan = packed_plan(offsets, seq_len)
    covered = np.sort(flat_ranges(plan.piece_start, plan.piece_length))
    np.testing.assert_array_equal(covered, np.arange(offsets[-1]))
    sizes = np.add.reduceat(plan.piece_length + 2, plan.row_offsets[:-1])
    assert sizes.max() <= seq_len
    assert plan.row_offsets[0] == 0
    assert plan.row_offsets[-1] == len(plan.piece_start)
    assert (np.diff(plan.row_offsets) > 0).all()


@pytest.mark.parametrize("seq_len", [16, 128])
def test_a_causal_plan_has_every_token_and_every_documents_end_as_a_target_once(lengths, seq_len):
    offsets = offsets_of(lengths)
    plan = causal_plan(offsets, seq_len)
    covered = flat_ranges(plan.piece_start, plan.piece_length - plan.closes)
    np.testing.assert_array_equal(np.sort(covered), np.arange(offsets[-1]))
    ends = (plan.piece_start + plan.piece_length - 1)[plan.closes]
    np.testing.assert_array_equal(np.sort(ends), offsets[1:])
    np.testing.assert_array_equal(np.sort(plan.piece_start[plan.opens]), offsets[:-1])
    sizes = np.add.reduceat(plan.piece_length, plan.row_offsets[:-1])
    assert sizes.max() <= seq_len
    assert plan.fill_share == pytest.approx((offsets[-1] + len(lengths)) / (plan.num_rows * seq_len))


def test_pieces_never_cross_documents(lengths):
    offsets = offsets_of(lengths)
    plan = packed_plan(offsets, 64)
    document = np.searchsorted(offsets, plan.piece_start, side="right")
    np.testing.assert_array_equal(
        document, np.searchsorted(offsets, plan.piece_start + plan.piece_length - 1, side="right")
    )


def test_packing_is_deterministic_and_dense():
    lengths = np.maximum(1, np.random.default_rng(1).lognormal(4, 1.2, 20_000)).astype(np.int64)
    one, two = packed_plan(offsets_of(lengths), 128), packed_plan(offsets_of(lengths), 128)
    np.testing.assert_array_equal(one.piece_start, two.piece_start)
    assert one.fill_share > 0.97
    filled = (lengths.sum() + 2 * len(one.piece_start)) / (one.num_rows * 128)
    assert one.fill_share == pytest.approx(filled)


def slow_best_fit_bins(sizes, capacity):
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(capacity - size)
    return len(rooms)


def test_histogram_packing_uses_as_few_bins_as_best_fit_one_by_one():
    for seed in range(10):
        sizes = np.random.default_rng(seed).integers(3, 33, 400)
        counts = np.bincount(sizes, minlength=33)
        groups = pack_histogram(counts, 32)
        packed = np.concatenate([np.repeat(group, count) for count, group in groups])
        np.testing.assert_array_equal(np.bincount(packed, minlength=33), counts)
        assert all(sum(group) <= 32 for _, group in groups)
        assert sum(count for count, _ in groups) <= slow_best_fit_bins(sizes.tolist(), 32) + 1


def test_rows_are_not_sorted_by_piece_length():
    lengths = np.concatenate([np.full(500, 126), np.full(5000, 10)])
    plan = packed_plan(offsets_of(lengths), 128)
    full = np.diff(plan.row_offsets) == 1
    half = len(full) // 2
    assert abs(full[:half].mean() - full[half:].mean()) < 0.15


def test_documents_layout_is_one_truncated_document_a_row():
    plan = documents_plan(offsets_of([3, 500, 126]), 128)
    assert plan.piece_start.tolist() == [0, 3, 503]
    assert plan.piece_length.tolist() == [3, 126, 126]
    assert plan.row_offsets.tolist() == [0, 1, 2, 3]


def test_a_million_documents_are_planned_in_seconds():
    import time

    lengths = np.maximum(1, np.random.default_rng(2).lognormal(4, 1, 1_000_000)).astype(np.int64)
    start = time.process_time()
    packed_plan(offsets_of(lengths), 128)
    assert time.process_time() - start < 10
