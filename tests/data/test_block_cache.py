"""The block cache over a store that counts its reads, blocks them, or fails."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sslx.data import block_cache
from sslx.data.block_cache import THREADS, Block, BlockCache, read_range
from sslx.errors import Unavailable, UserError

WAIT = 30  # seconds; only a failing test waits so long


class Store:
    """Byte ``i`` of a file is ``i % 251``; reads are listed, wait while ``open`` is not set, and may fail at first."""

    def __init__(self, failures=()):
        self.reads, self.failures = [], list(failures)
        self.open = threading.Event()
        self.open.set()
        self._lock = threading.Lock()

    def read(self, path, offset, length):
        with self._lock:
            self.reads.append((path, offset))
            failure = self.failures.pop(0) if self.failures else None
        assert self.open.wait(WAIT)
        if failure:
            raise failure
        return content(offset, length)


def content(offset, length):
    return bytes(i % 251 for i in range(offset, offset + length))


def block(number, length=100):
    return Block("store/file.rows", number * length, length)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(block_cache, "FIRST_PAUSE", 0.0)


def test_get_returns_the_blocks_in_the_order_asked_for():
    cache = BlockCache(Store().read, 10_000)
    assert cache.get([block(3), block(0), block(3)]) == [content(300, 100), content(0, 100), content(300, 100)]


def test_requests_for_one_block_share_one_read_even_while_it_is_under_way():
    store = Store()
    store.open.clear()
    cache = BlockCache(store.read, 10_000)
    with ThreadPoolExecutor(8) as askers:
        asked = [askers.submit(cache.get, [block(1), block(2)]) for _ in range(8)]
        while cache.requests < 16 and not any(future.done() for future in asked):  # until all have asked
            time.sleep(0.001)
        store.open.set()
        assert all(future.result() == [content(100, 100), content(200, 100)] for future in asked)
    cache.get([block(2)])
    assert sorted(store.reads) == [("store/file.rows", 100), ("store/file.rows", 200)]
    assert (cache.requests, cache.hits, cache.reads, cache.bytes_read) == (17, 15, 2, 200)


def test_sixteen_blocks_are_read_at_the_same_time():
    barrier = threading.Barrier(THREADS)

    def read(path, offset, length):
        barrier.wait(WAIT)  # passes only when as many are in here
        return content(offset, length)

    assert len(BlockCache(read, 10_000).get([block(i) for i in range(THREADS)])) == THREADS == 16


def test_the_block_unused_for_longest_is_dropped_when_the_bytes_are_full():
    store = Store()
    cache = BlockCache(store.read, 300)
    for number in (0, 1, 2, 0, 3):  # 3 drops 1
        cache.get([block(number)])
    store.reads.clear()
    cache.get([block(0), block(2), block(3)])
    assert store.reads == []
    cache.get([block(1)])
    assert store.reads == [("store/file.rows", 100)]


def test_more_blocks_than_fit_are_all_returned():
    cache = BlockCache(Store().read, 250)
    assert cache.get([block(i) for i in range(20)]) == [content(100 * i, 100) for i in range(20)]
    assert cache.held <= 250


def test_prefetch_reads_what_fits_soonest_first_and_get_then_reads_nothing():
    store = Store()
    cache = BlockCache(store.read, 500)
    cache.prefetch([block(i) for i in range(9)])
    cache.get([block(i) for i in range(5)])
    assert sorted(offset for _, offset in store.reads) == [0, 100, 200, 300, 400]
    assert cache.hits == 5


def test_prefetch_does_not_drop_what_is_needed_first():
    store = Store()
    cache = BlockCache(store.read, 600)
    cache.prefetch([block(i) for i in range(6)])
    cache.get([block(2), block(1), block(0)])  # now used last
    cache.prefetch([block(i) for i in range(3, 9)])
    cache.get([block(i) for i in range(3, 9)])
    assert len(store.reads) == len(set(store.reads)) == 9


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("slow"), OSError("HTTP 503")])
def test_errors_that_pass_are_retried(error):
    store = Store([error, error])
    assert BlockCache(store.read, 1000).get([block(1)]) == [content(100, 100)]
    assert len(store.reads) == 3


def test_an_error_that_stays_names_file_and_offset_and_the_next_request_tries_again():
    store = Store([OSError("HTTP 503")] * block_cache.ATTEMPTS)
    cache = BlockCache(store.read, 1000)
    with pytest.raises(Unavailable, match=r"^cannot read store/file.rows at byte 1,200 \(tried 5 times\): HTTP 503$"):
        cache.get([block(12)])
    assert cache.held == 0
    assert cache.get([block(12)]) == [content(1200, 100)]


def test_a_prefetch_that_fails_is_told_when_the_block_is_needed():
    store = Store([OSError("HTTP 503")] * block_cache.ATTEMPTS * 2)
    cache = BlockCache(store.read, 1000)
    cache.prefetch([block(0)])
    with pytest.raises(Unavailable, match="HTTP 503"):
        cache.get([block(0)])


def test_nothing_is_tried_again_when_the_storage_has_been_patient_itself(monkeypatch):
    monkeypatch.setattr(block_cache, "PATIENCE", -1.0)
    store = Store([OSError("gave up")])
    with pytest.raises(Unavailable, match=r"\(tried once\): gave up"):
        BlockCache(store.read, 1000).get([block(0)])


def test_a_missing_file_is_not_tried_again(tmp_path):
    missing = tmp_path / "train-00000.rows"
    with pytest.raises(Unavailable, match=rf"{missing} at byte 0 \(tried once\): No such file"):
        BlockCache(read_range, 1000).get([Block(str(missing), 0, 10)])


def test_a_file_that_ends_early_is_an_error_and_not_short_data(tmp_path):
    (tmp_path / "short.rows").write_bytes(b"0123456789")
    assert read_range(str(tmp_path / "short.rows"), 2, 3) == b"234"
    with pytest.raises(Unavailable, match=r"short.rows at byte 8 .*it ends after 2 of 8 bytes"):
        BlockCache(read_range, 1000).get([Block(str(tmp_path / "short.rows"), 8, 8)])


def test_storage_of_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="gss://bucket/x is on storage of an unknown kind, gss://; expected a folder"):
        read_range("gss://bucket/x", 0, 1)
