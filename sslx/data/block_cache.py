"""Blocks of bytes from far storage: read ahead by threads, read once however many ask, kept while memory allows.

In: ranges of files, and a ``read(path, offset, length)``. Out: their bytes. `read_range` reads any storage that fsspec
knows (local files, ``gs://``); tests and benchmarks put a store of their own in its place.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from sslx.errors import Unavailable
from sslx.storage import require

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

THREADS = 16
ATTEMPTS = 5
FIRST_PAUSE = 0.2  # seconds, doubled after each attempt that failed
PATIENCE = 20.0  # seconds after which nothing is tried again: the storage's library has retried by itself
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

Read = Callable[[str, int, int], bytes]


class Block(NamedTuple):
    """One range of one file, and the CRC-32 of its bytes where it is known."""

    path: str
    offset: int
    length: int
    checksum: int | None = None


@functools.cache
def reading_threads() -> ThreadPoolExecutor:
    """The threads that all caches share, so that several row sets do not multiply the load."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="blocks")


class BlockCache:
    """Keeps the blocks used last, at most ``capacity`` bytes with those on their way.

    ``requests`` and ``hits`` count what ``get`` was asked for and what was there already or on its way; ``reads`` and
    ``bytes_read`` what came from the storage; ``held`` are the bytes kept now.
    """

    def __init__(self, read: Read, capacity: int):
        self._read, self._capacity = read, capacity
        self._lock = threading.Lock()
        self._blocks: collections.OrderedDict[Block, Future[bytes]] = collections.OrderedDict()  # oldest use first
        self.held = self.requests = self.hits = self.reads = self.bytes_read = 0

    def get(self, blocks: Iterable[Block]) -> list[bytes]:
        """Returns the bytes of blocks; those that are not here are read at the same time.

        Raises:
          Unavailable: one cannot be read; names file and offset.
        """
        with self._lock:
            blocks = list(blocks)
            self.requests += len(blocks)
            self.hits += sum(block in self._blocks for block in blocks)
            futures = [self._request(block) for block in blocks]
        return [future.result() for future in futures]

    def prefetch(self, blocks: Iterable[Block]) -> None:
        """Starts reading blocks, soonest needed first, as many as can be kept together; does not wait."""
        with self._lock:
            room = self._capacity
            for block in blocks:
                room -= block.length
                if room < 0:
                    break
                self._request(block)

    def _request(self, block: Block) -> Future[bytes]:
        future = self._blocks.get(block)
        if future is None:
            future = reading_threads().submit(self._load, block)
            self._blocks[block] = future
            self.held += block.length
            while self.held > self._capacity and len(self._blocks) > 1:
                evicted, _ = self._blocks.popitem(last=False)  # who waits for it has its future
                self.held -= evicted.length
        self._blocks.move_to_end(block)
        return future

    def _load(self, block: Block) -> bytes:
        try:
            data = read_with_retries(self._read, block)
        except BaseException:
            with self._lock:  # so that the next request tries again
                if self._blocks.pop(block, None) is not None:
                    self.held -= block.length
            raise
        with self._lock:
            self.reads += 1
            self.bytes_read += len(data)
        return data


def read_with_retries(read: Read, block: Block) -> bytes:
    """Reads a block, again after a growing pause where an error may pass.

    Raises:
      Unavailable: it stays unreadable, is not there, or is not what was written.
    """
    begin = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            data = read(block.path, block.offset, block.length)
            if len(data) != block.length:
                reason = f"it ends after {len(data):,} of {block.length:,} bytes"
            elif block.checksum is not None and zlib.crc32(data) != block.checksum:
                reason = "its bytes are not those that were written (checksum)"
            else:
                return data
        except PERMANENT as error:
            reason = error.strerror or type(error).__name__
            break
        except OSError as error:
            reason = str(error) or type(error).__name__
        if attempt == ATTEMPTS or time.monotonic() - begin > PATIENCE:
            break
        time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
    tried = "once" if attempt == 1 else f"{attempt} times"
    raise Unavailable(f"cannot read {block.path} at byte {block.offset:,} (tried {tried}): {reason}")


def read_range(path: str, offset: int, length: int) -> bytes:
    """Reads a range of a file on any storage that fsspec knows.

    Raises:
      OSError: whatever the storage's own library raises.
    """
    files, name = storage(path)
    try:
        return files.cat_file(name, start=offset, end=offset + length)
    except OSError:
        raise
    except Exception as error:  # each library has its own kinds: HTTP, credentials, time-outs
        raise OSError(f"{type(error).__name__}: {error}") from error


def storage(path: str) -> tuple[AbstractFileSystem, str]:
    """Returns the file system that a path or URL is on, and its name there.

    Raises:
      UserError: the library for this kind of storage is missing, or there is none.
    """
    from fsspec.core import url_to_fs

    require(path)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the traceback of what it then raises
    return url_to_fs(path)
