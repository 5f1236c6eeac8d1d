"""Text rows a second from an object store that takes 30 ms to answer.

The store is simulated over real files: each ranged read sleeps 30 ms, and as long as its bytes take at 100 MB/s. Rows
are `python_docs` packed to 128 and repeated 20 times, so that the cache holds a small part of them, as `write_rows`
writes them; sixteen threads read. Three ways:

- blocks, block order: what training does (`StoredRows.order`), one consumer;
- blocks, full shuffle: the same cache (two windows) under the order of rows that are read from their tokens;
- rows, full shuffle: no cache; every row is a read of its own.

    python tests/benchmarks/far_rows.py

Every run starts cold, and the time to fill the first window counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sslx.data.block_cache import THREADS, read_range
from sslx.data.row_writer import write_rows
from sslx.data.rows import RowOrder, TextRows
from sslx.data.stored_rows import StoredRows, open_rows
from sslx.data.text import TextConfig, prepare_text

LATENCY, BYTES_PER_SECOND = 0.030, 100e6


class Repeated:
    """Rows several times over."""

    def __init__(self, rows: TextRows, copies: int):
        self._rows, self._copies, self.seq_len = rows, copies, rows.seq_len

    def __len__(self) -> int:
        return len(self._rows) * self._copies

    def fetch(self, row_ids: np.ndarray) -> Mapping[str, np.ndarray]:
        """Reads rows."""
        return self._rows.fetch(row_ids % len(self._rows))


def far_read(path: str, offset: int, length: int) -> bytes:
    """A ranged read as a far store answers it."""
    time.sleep(LATENCY + length / BYTES_PER_SECOND)
    return read_range(path, offset, length)


def with_blocks(folder: str, batch: int, rows: int, seed: int, *, block_order: bool) -> dict[str, float]:
    """Fetches batches one after another, as training does."""
    stored = StoredRows(*open_rows(folder), "train", read=far_read)
    order = stored.order(seed) if block_order else RowOrder(len(stored), seed)
    begin = time.perf_counter()
    for start in range(0, rows, batch):
        stored.fetch(order.rows_at(np.arange(start, start + batch)))
    seconds, cache = time.perf_counter() - begin, stored.cache
    return {
        "rows/s": -(-rows // batch) * batch / seconds,
        "reads": cache.reads,
        "MB": cache.bytes_read / 1e6,
        "hits": cache.hits / cache.requests,
    }


def with_rows(folder: str, batch: int, rows: int, seed: int) -> dict[str, float]:
    """Reads each row by itself, sixteen at a time."""
    _, meta = open_rows(folder)
    order, row_bytes = RowOrder(meta.rows["train"], seed), meta.row_type.itemsize

    def read(row: int) -> bytes:
        block = meta.block(folder, "train", row // meta.block_rows)
        return far_read(block.path, block.offset + row % meta.block_rows * row_bytes, row_bytes)

    begin = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, rows, batch):
            list(pool.map(read, order.rows_at(np.arange(start, min(start + batch, rows))).tolist()))
    return {"rows/s": rows / (time.perf_counter() - begin), "reads": rows, "MB": rows * row_bytes / 1e6, "hits": 0.0}


def main() -> None:
    """Prints the median and spread over seeds of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000, help="fetched the first way; the others fetch fewer")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_text(TextConfig(seq_len=arguments.seq_len), layout="packed")
        write_rows(dataclasses.replace(prepared, train=Repeated(prepared.train, arguments.copies)), folder)
        _, meta = open_rows(folder)
        print(
            f"{meta.rows['train']:,} rows of {meta.seq_len} tokens in {meta.blocks('train')} blocks of "
            f"{meta.block_bytes:,} bytes; batches of {arguments.batch}; {THREADS} threads, "
            f"{LATENCY * 1e3:.0f} ms a read and {BYTES_PER_SECOND / 1e6:.0f} MB/s a stream"
        )
        ways = {
            "blocks, block order": (functools.partial(with_blocks, block_order=True), arguments.rows),
            "blocks, full shuffle": (functools.partial(with_blocks, block_order=False), arguments.rows // 20),
            "rows, full shuffle": (with_rows, arguments.rows // 100),
        }
        for name, (measure, rows) in ways.items():
            runs = [measure(folder, arguments.batch, rows, seed) for seed in range(arguments.seeds)]
            rates = [run["rows/s"] for run in runs]
            last = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(
                f"{name:<22} {last['rows/s']:8,.0f} rows/s ({min(rates):,.0f} to {max(rates):,.0f}, "
                f"{arguments.seeds} seeds)  {rows:,} rows: {last['reads']:,.0f} reads, {last['MB']:.1f} MB, "
                f"{last['hits']:.0%} of block requests were there or on their way",
                flush=True,
            )


if __name__ == "__main__":
    main()
