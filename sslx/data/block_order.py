"""A shuffled order that reads far storage in large pieces: blocks are shuffled, then rows inside a window of blocks.

In: how many rows there are, a seed, and the position in an endless sequence of epochs. Out: row ids, as a pure function
of these. Neighbouring positions stay within one window, so a reader that holds a window reads each block once an epoch;
a full shuffle of rows (`rows.RowOrder`) would want another block for almost every row.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int64


class BlockOrder:
    """Endless epochs over ``num_rows`` rows, in blocks of ``block_rows`` of which the last may be shorter.

    Each epoch has a permutation of the blocks of its own, cut into windows, and each window a permutation of its rows.
    """

    def __init__(self, num_rows: int, seed: int, *, block_rows: int, window_blocks: int):
        self._num_rows, self._seed = num_rows, seed
        self._block_rows, self._window_blocks = block_rows, window_blocks
        self._num_blocks = -(-num_rows // block_rows)
        self._num_windows = -(-self._num_blocks // window_blocks)
        self._epoch = functools.lru_cache(2)(self._make_epoch)
        self._window = functools.lru_cache(8)(self._make_window)

    def rows_at(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Returns the row at each position of the sequence; pure, and random access to any epoch."""
        epochs, windows, places = self._locate(positions)
        rows = np.empty(len(epochs), np.int64)
        for epoch, window in np.unique(np.stack([epochs, windows], axis=1), axis=0).tolist():
            here = (epochs == epoch) & (windows == window)
            rows[here] = self._window(epoch, window)[places[here]]
        return rows

    def blocks_at(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " blocks"]:
        """Returns the blocks of the windows that hold these positions, then those of the window that follows."""
        epochs, windows, _ = self._locate(positions)
        numbers = np.unique(epochs * self._num_windows + windows)
        wanted = [divmod(number, self._num_windows) for number in [*numbers.tolist(), int(numbers[-1]) + 1]]
        return np.concatenate([self._blocks_of(epoch, window) for epoch, window in wanted])

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the epoch, the window in it and the place in the window of each position."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self._num_rows)
        windows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here, starts = epochs == epoch, self._epoch(epoch)[1]
            windows[here] = np.searchsorted(starts, places[here], side="right") - 1
            places[here] -= starts[windows[here]]
        return epochs, windows, places

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of the blocks and the position in the epoch where each window starts."""
        blocks = self._permutation(self._num_blocks, epoch)
        sizes = np.minimum(self._num_rows - blocks * self._block_rows, self._block_rows)
        firsts = np.arange(0, self._num_blocks, self._window_blocks)
        return blocks, np.concatenate([[0], np.cumsum(np.add.reduceat(sizes, firsts))[:-1]])

    def _blocks_of(self, epoch: int, window: int) -> np.ndarray:
        return self._epoch(epoch)[0][window * self._window_blocks : (window + 1) * self._window_blocks]

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        rows = self._blocks_of(epoch, window)[:, None] * self._block_rows + np.arange(self._block_rows)
        rows = rows[rows < self._num_rows]
        return rows[self._permutation(len(rows), epoch, window)]

    def _permutation(self, size: int, *key: int) -> np.ndarray:
        # A spawn key, so that no seed's epochs are another's. Raw bits: NumPy keeps its bit streams from version to
        # version, but not its shuffles.
        bits = np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=key)).random_raw(size)
        return np.argsort(bits, kind="stable")
