"""Prepared rows as a folder that any number of hosts read directly, on a disk or on ``gs://``.

In: a folder that `row_writer.write_rows` has made of a `PreparedText`. Out: `open_rows` gives `StoredRows`, whose
``fetch`` returns what the `TextRows` returned that were written. The folder holds

- ``train-00000.rows``, …: blocks of 256 rows, each one contiguous range of a file, so that one read brings all of them.
  A row is a record of fields, each in the smallest type that holds it; the last block is filled up with zeros.
  Positions are not stored: they count from where their segment starts.
- ``tokenizer/``, and ``meta.json``, which is written last: a folder without it is incomplete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from sslx.data.block_cache import Block, BlockCache, Read, read_range, storage
from sslx.data.block_order import BlockOrder
from sslx.data.cache import hash_of, prepare_once
from sslx.errors import UserError, first_line, nearest
from sslx.storage import is_remote

FORMAT = 2
BLOCK_ROWS = 256
WINDOW_BLOCKS = 64  # of the order: 16,384 rows
READ_AHEAD = 16  # blocks, where rows are read in their order
DERIVED = "positions"


class Column(NamedTuple):
    """One field of a row, of NumPy's ``dtype``, byte order included."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Meta:
    """What ``meta.json`` says. ``rows``: how many there are of ``train``, ``eval`` and, if any, ``test``.

    Blocks and windows are said here too, so that a folder's order stays what it was. ``checksums`` has the CRC-32 of
    each block of a role, eight hexadecimal digits each.
    """

    format: int
    layout: str
    seq_len: int
    columns: tuple[Column, ...]
    block_rows: int
    window_blocks: int
    blocks_per_shard: int
    rows: dict[str, int]
    checksums: dict[str, str]
    vocabulary: str  # fingerprint of the tokenizer's
    label_names: tuple[str, ...] | None
    statistics: dict[str, Any]
    fingerprint: str

    @functools.cached_property
    def row_type(self) -> np.dtype:
        return np.dtype([tuple(column) for column in self.columns])

    @functools.cached_property
    def block_bytes(self) -> int:
        return self.block_rows * self.row_type.itemsize

    def blocks(self, role: str) -> int:
        return -(-self.rows[role] // self.block_rows)

    def block(self, folder: str, role: str, number: int) -> Block:
        """Where a block lies."""
        shard, place = divmod(number, self.blocks_per_shard)
        checksum = int(self.checksums[role][8 * number : 8 * number + 8], 16)
        return Block(f"{folder}/{role}-{shard:05d}.rows", place * self.block_bytes, self.block_bytes, checksum)

    def files(self) -> dict[str, int]:
        """Every file of rows with its bytes."""
        shards = {}
        for role in self.rows:
            for first in range(0, self.blocks(role), self.blocks_per_shard):
                name = f"{role}-{first // self.blocks_per_shard:05d}.rows"
                shards[name] = self.block_bytes * min(self.blocks_per_shard, self.blocks(role) - first)
        return shards


class StoredRows:
    """Random access to the rows of one role (``train``, ``eval``, ``test``) of a folder.

    Args:
      folder: a path or URL.
      meta: what the folder says of itself.
      role: which rows.
      read: reads a range of a file.
      cache_bytes: what may be kept in memory; by default two windows of the order, which is enough to read each block
        once an epoch.
    """

    def __init__(self, folder: str, meta: Meta, role: str, *, read: Read = read_range, cache_bytes: int | None = None):
        self._folder, self._meta, self._role = folder, meta, role
        self.cache = BlockCache(read, cache_bytes or 2 * meta.window_blocks * meta.block_bytes)

    def __len__(self) -> int:
        return self._meta.rows[self._role]

    @property
    def seq_len(self) -> int:
        return self._meta.seq_len

    def order(self, seed: int) -> ReadAheadOrder:
        """Returns the order in which training takes the rows; asking it for rows starts reading their blocks."""
        meta = self._meta
        order = BlockOrder(len(self), seed, block_rows=meta.block_rows, window_blocks=meta.window_blocks)
        return ReadAheadOrder(self, order)

    def prefetch(self, blocks: Int64[np.ndarray, " blocks"]) -> None:
        """Starts reading blocks by number, soonest needed first; does not wait."""
        self.cache.prefetch(self._place(number) for number in blocks.tolist())

    def fetch(self, row_ids: Int64[np.ndarray, " n"]) -> Mapping[str, Int[np.ndarray, "n ..."]]:
        """Reads rows.

        Returns:
          Arrays as `TextRows.fetch` gives them.

        Raises:
          IndexError: a row id is beyond the rows.
          UserError: a file cannot be read.
        """
        row_ids = np.asarray(row_ids, dtype=np.int64)
        if len(row_ids) and not 0 <= row_ids.min() <= row_ids.max() < len(self):
            raise IndexError(f"row ids from {row_ids.min()} to {row_ids.max()} of {len(self)} rows")
        numbers, places = np.divmod(row_ids, self._meta.block_rows)
        wanted, which = np.unique(numbers, return_inverse=True)
        by_block = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[by_block], np.arange(len(wanted) + 1))
        if len(row_ids) > 1 and (np.diff(row_ids) == 1).all():
            stop = min(wanted[-1] + 1 + READ_AHEAD, self._meta.blocks(self._role))
            self.prefetch(np.arange(wanted[0], stop))
        blocks = self.cache.get(self._place(number) for number in wanted.tolist())
        rows = np.empty(len(row_ids), self._meta.row_type)
        for block, (low, high) in zip(blocks, itertools.pairwise(bounds), strict=True):
            here = by_block[low:high]
            rows[here] = np.frombuffer(block, rows.dtype)[places[here]]
        batch = {name: rows[name].astype(_wide(rows.dtype[name])) for name in rows.dtype.names}
        return batch | {DERIVED: positions_of(batch["segment_ids"])}

    def _place(self, number: int) -> Block:
        return self._meta.block(self._folder, self._role, number)


def _wide(kind: np.dtype) -> type:
    return np.float32 if kind.kind == "f" else np.int32


class ReadAheadOrder:
    """A `BlockOrder` that has the blocks of the rows it names, and of those soon after, read by then."""

    def __init__(self, rows: StoredRows, order: BlockOrder):
        self._rows, self._order = rows, order
        self._asked = np.empty(0, np.int64)

    def rows_at(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Returns the row at each position of the sequence; pure, and random access to any epoch."""
        if len(positions):
            blocks = self._order.blocks_at(positions)
            if not np.array_equal(blocks, self._asked):
                self._asked = blocks
                self._rows.prefetch(blocks)
        return self._order.rows_at(positions)


def positions_of(segment_ids: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n length"]:
    """Counts from 0 in each segment; 0 where padded."""
    places = np.arange(segment_ids.shape[1], dtype=np.int32)
    starts = np.zeros(segment_ids.shape, np.int32)
    np.multiply(segment_ids[:, 1:] != segment_ids[:, :-1], places[1:], out=starts[:, 1:])
    np.maximum.accumulate(starts, axis=1, out=starts)
    return np.where(segment_ids > 0, places - starts, 0).astype(np.int32)


def open_rows(folder: str | os.PathLike[str]) -> tuple[str, Meta]:
    """Reads what a folder holds.

    Returns:
      The folder as `StoredRows` takes it, and its description.

    Raises:
      UserError: there is no such folder, it is incomplete, or of another format.
    """
    folder = full_path(folder)
    files, root = storage(folder)
    try:
        text = files.cat_file(f"{root}/meta.json")
    except FileNotFoundError:
        raise UserError(_missing(files, root, folder)) from None
    except Exception as error:  # credentials, network; each storage has its own kinds
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {folder}/meta.json: {reason}") from error
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise UserError(
                f"{folder} holds prepared rows of format {found['format']}, expected {FORMAT}; prepare them again"
            )
        columns = tuple(Column(name, dtype, tuple(shape)) for name, dtype, shape in found["columns"])
        names = tuple(found["label_names"]) if found["label_names"] else None
        meta = Meta(**found | {"columns": columns, "label_names": names})
        if any(len(meta.checksums[role]) != 8 * meta.blocks(role) for role in meta.rows):
            raise ValueError("not a checksum for each block")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/meta.json is damaged or not of prepared rows; prepare them again") from error
    _check_files(files, root, folder, meta)
    return folder, meta


def tokenizer_folder(folder: str, meta: Meta, cache_dir: str | os.PathLike[str]) -> Path:
    """Returns a local folder with the rows' tokenizer, copied once if the rows are elsewhere.

    Raises:
      UserError: it cannot be read, or the cache cannot be written.
    """
    files, root = storage(f"{folder}/tokenizer")

    def copy(to: Path) -> None:
        for name in files.ls(root, detail=False):
            (to / os.path.basename(name)).write_bytes(files.cat_file(name))

    try:
        return prepare_once(cache_dir, f"tokenizer-{hash_of(meta.fingerprint, meta.vocabulary)}", copy)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {folder}/tokenizer: {error}") from error


def full_path(folder: str | os.PathLike[str]) -> str:
    """A folder of rows as it is named everywhere: an absolute path, or a URL."""
    folder = os.path.expanduser(folder)
    return (folder if is_remote(folder) else os.path.abspath(folder)).rstrip("/")


def _check_files(files: Any, root: str, folder: str, meta: Meta) -> None:
    there = {os.path.basename(one["name"]): one["size"] for one in files.ls(root, detail=True)}
    for name, size in meta.files().items():
        if there.get(name) != size:
            found = f"has {there[name]:,} bytes" if name in there else "is missing"
            raise UserError(f"{folder}/{name} {found}, expected {size:,}; copy or prepare the rows again")


def _missing(files: Any, root: str, folder: str) -> str:
    with contextlib.suppress(Exception):  # only words the message
        names = [os.path.basename(name.rstrip("/")) for name in files.ls(root, detail=False)]
        if any(name.endswith(".rows") for name in names):
            return f"{folder} is incomplete (no meta.json): its preparation was interrupted or goes on; run it again"
        if names:
            return f"{folder} holds no prepared rows (no meta.json); make some with python -m sslx.prepare"
    siblings: list[str] = []
    with contextlib.suppress(Exception):
        parent = root.rpartition("/")[0]
        siblings = [os.path.basename(name.rstrip("/")) for name in files.ls(parent, detail=False)]
    close = f"; {nearest(os.path.basename(root), siblings)}" if siblings else ""
    return f"{folder} does not exist{close}"
