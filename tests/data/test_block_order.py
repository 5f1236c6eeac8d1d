"""The two-level order: a permutation of every epoch, pure in its arguments, and local to windows of blocks."""

from __future__ import annotations

import numpy as np
import pytest

from sslx.data.block_order import BlockOrder

SIZES = [(1, 4, 2), (7, 4, 2), (96, 4, 3), (1001, 8, 5), (1024, 8, 16), (10, 256, 64)]


def order(rows=1001, seed=0, block_rows=8, window_blocks=5):
    return BlockOrder(rows, seed, block_rows=block_rows, window_blocks=window_blocks)


@pytest.mark.parametrize(("rows", "block_rows", "window_blocks"), SIZES)
def test_every_epoch_has_every_row_once(rows, block_rows, window_blocks):
    epochs = order(rows, 3, block_rows, window_blocks).rows_at(np.arange(4 * rows)).reshape(4, rows)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(rows), epochs.shape))
    if rows > 6:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_row_is_a_pure_function_of_seed_and_position():
    positions = np.random.default_rng(0).integers(0, 2**40, 300)
    rows = order().rows_at(positions)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(order().rows_at(positions[::-1])[::-1], rows)
    assert [order().rows_at(np.array([position]))[0] for position in positions[:5]] == rows[:5].tolist()


def test_seeds_are_unrelated_in_any_epoch():
    epochs = {}
    for seed in (0, 1, 2, 2**32, 2**32 + 1):
        rows = order(seed=seed).rows_at(np.arange(3 * 1001)).reshape(3, 1001)
        epochs |= {(seed, epoch): row for epoch, row in enumerate(rows)}
    keys = list(epochs)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:  # 1 agreement is expected by chance
            assert (epochs[one] == epochs[other]).sum() < 15, (one, other)


def test_a_window_of_positions_stays_in_few_blocks_which_are_drawn_from_everywhere():
    window = order(64 * 8).rows_at(np.arange(5 * 8))
    blocks = np.unique(window // 8)
    assert len(blocks) == 5
    assert np.ptp(blocks) > 16
    assert (np.diff(window // 8) != 0).mean() > 0.5  # rows of one block do not stand together


def test_rows_are_spread_over_the_places_of_a_window():
    first = np.array([order(64 * 8, seed).rows_at(np.arange(1))[0] for seed in range(400)])
    assert len(np.unique(first)) > 200
    assert abs(first.mean() - 255.5) < 4 * 512 / np.sqrt(12 * 400)


@pytest.mark.parametrize(
    ("first", "last", "start", "stop"),
    [
        (0, 0, 0, 80),
        (39, 39, 0, 80),
        (40, 79, 40, 120),
        (70, 90, 40, 160),  # across two windows
        (1010, 1023, 1000, 1064),  # the last window of an epoch, and the first of the next
        (3 * 1024 + 5, 3 * 1024 + 6, 3 * 1024, 3 * 1024 + 80),
    ],
)
def test_blocks_at_names_the_blocks_of_the_positions_windows_and_of_the_one_after(first, last, start, stop):
    made = order(1024)  # windows of 40 rows, and one of 24 at the end of an epoch
    blocks = made.blocks_at(np.arange(first, last + 1))
    assert set(blocks.tolist()) == set((made.rows_at(np.arange(start, stop)) // 8).tolist())
    needed = made.rows_at(np.arange(first, last + 1)) // 8
    assert set(needed.tolist()) <= set(blocks[: len(blocks) - 3].tolist())  # soonest first


def test_the_order_of_a_seed_stays_what_it_was():
    """A resumed run goes on in the order in which it was started, also after an update."""
    assert order(100, 0, 8, 3).rows_at(np.array([0, 1, 2, 50, 100, 10_000])).tolist() == [35, 83, 85, 64, 84, 50]
