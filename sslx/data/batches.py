"""From random-access rows to global device arrays: the rows of step ``k`` are a pure function of the seed and ``k``.

There is no iterator state. Each host reads the rows that the batch's sharding assigns to its devices, found from the
sharding's index map, and batches are prepared by a thread ahead of the step that uses them.
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from sslx.errors import UserError


class RandomAccessRows(Protocol):
    """Prepared rows, whatever the modality."""

    def __len__(self) -> int: ...

    def fetch(self, row_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays ``[len(row_ids), ...]`` of the rows with these ids, int64[n]."""
        ...

    def order(self, seed: int) -> RowOrder:
        """The order in which training takes the rows: what is cheap to read decides how far they are shuffled."""
        ...


@runtime_checkable
class DrawnRows(RandomAccessRows, Protocol):
    """Rows of which training reads another random part each time, such as crops of large pictures."""

    def draw(self, row_ids: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """As ``fetch``; what is random is a function of the seed, the epoch of each row (int64[n]) and the row."""
        ...


class RowOrder(Protocol):
    """Which row stands at which position of an endless sequence of shuffled epochs."""

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """int64[n] row ids at int64[n] positions."""
        ...


class TrainBatches:
    """Batches by step: step ``k`` takes positions ``k * batch_size`` and following of the order.

    Raises:
      UserError: there are fewer rows than one batch takes.
    """

    def __init__(
        self,
        rows: RandomAccessRows,
        order: RowOrder,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        seed: int = 0,
        packed: bool = False,
    ):
        """``packed`` tells that a row is as many texts as its length has room for, which only an error says."""
        if len(rows) < batch_size:
            shorter = ", or a smaller config.data.seq_len, which makes more rows" if packed else ""
            raise UserError(
                f"the training data has {len(rows)} rows, fewer than one batch of config.batch_size={batch_size}; "
                f"expected more data or a smaller batch{shorter}"
            )
        self._rows, self._order, self._batch_size, self._sharding = rows, order, batch_size, sharding
        self._seed = seed

    def at(self, step: int) -> dict[str, jax.Array]:
        """The global batch of a step, with the rows' ids as int32[batch] ``row``."""

        def read(offsets: np.ndarray) -> dict[str, np.ndarray]:
            return training_rows(self._rows, self._order, step * self._batch_size + offsets, self._seed)

        return _global_batch(read, self._batch_size, self._sharding)

    def stream(self, start: int, stop: int, ahead: int = 2) -> Iterator[dict[str, jax.Array]]:
        """Batches of steps ``start`` to ``stop - 1``, prepared up to ``ahead`` steps early by a thread."""
        yield from _ahead(self.at, range(start, stop), ahead)


def training_rows(rows: RandomAccessRows, order: RowOrder, positions: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """What training reads at int64[n] positions of the order, with the rows' ids as int32[n] ``row``."""
    ids = order.rows_at(positions)
    batch = rows.draw(ids, positions // len(rows), seed) if isinstance(rows, DrawnRows) else rows.fetch(ids)
    return batch | {"row": ids.astype(np.int32)}


class SomeRows:
    """So many of some rows, or all if there are no more, drawn by a seed."""

    def __init__(self, rows: RandomAccessRows, count: int, seed: int):
        self._rows = rows
        self._ids = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])

    def __len__(self) -> int:
        return len(self._ids)

    def fetch(self, row_ids: np.ndarray) -> dict[str, np.ndarray]:
        """As that of the rows, whose ids are counted anew."""
        return self._rows.fetch(self._ids[row_ids])


class EvalBatches:
    """All rows once, in their order; the last batch is filled up with copies marked 0 in float32[batch] ``valid``."""

    def __init__(
        self,
        rows: RandomAccessRows | SomeRows,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        batches: int | None = None,
    ):
        self._rows, self._batch_size, self._sharding = rows, batch_size, sharding
        self._count = -(-len(rows) // batch_size)
        if batches is not None:
            self._count = min(self._count, batches)

    def __len__(self) -> int:
        return self._count

    def at(self, index: int) -> dict[str, jax.Array]:
        """The ``index``-th global batch."""

        def read(offsets: np.ndarray) -> dict[str, np.ndarray]:
            ids = index * self._batch_size + offsets
            valid = ids < len(self._rows)
            ids = np.where(valid, ids, 0)
            return self._rows.fetch(ids) | {"row": ids.astype(np.int32), "valid": valid.astype(np.float32)}

        return _global_batch(read, self._batch_size, self._sharding)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        yield from _ahead(self.at, range(self._count), 2)


def _global_batch(
    read: Callable[[np.ndarray], dict[str, np.ndarray]], batch_size: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
    """Reads only this process's rows, once each, and makes global arrays of them."""
    slices = {
        index[0].indices(batch_size)[:2] for index in sharding.addressable_devices_indices_map((batch_size,)).values()
    }
    offsets = np.unique(np.concatenate([np.arange(*bounds) for bounds in slices]))
    local = read(offsets)

    def place(array: np.ndarray) -> jax.Array:
        shape = (batch_size, *array.shape[1:])

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(offsets, start)
            return array[first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: place(array) for name, array in local.items()}


def _ahead(make: Callable[[int], Any], indices: range, ahead: int) -> Iterator[Any]:
    # One thread: the order of reads stays that of the steps, and NumPy's gathers release the lock for the main thread.
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
    pending: collections.deque = collections.deque()
    try:
        for index in indices:
            pending.append(pool.submit(make, index))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.shutdown(wait=True)
