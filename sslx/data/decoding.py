"""Many pictures decoded together: the threads that do it, and what becomes of the pictures that cannot be.

At preparation every picture of a slice is looked at once. One that cannot be decoded is named, counted and left out;
more than ``config.data.broken_share`` of them are an error, also when it is found in the cache later.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from sslx.data.pictures import BrokenPicture
from sslx.data.sources import Source
from sslx.errors import UserError

AT_ONCE = 256  # pictures that are decoded together


@functools.cache
def decoders() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that decode: Pillow lets go of Python's lock while it works."""
    return concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="pictures")


@contextlib.contextmanager
def still_decodable(record: dict[str, Any]) -> Iterator[None]:
    """Around the decoding of a record that could be decoded at preparation.

    Raises:
      UserError: it no longer can.
    """
    try:
        yield
    except BrokenPicture as error:
        raise UserError(f"{record['name']} has become undecodable: {error}") from error


def looked_at(
    source: Source, broken_share: float, note: Callable[[dict[str, Any]], Any], broken: list[str]
) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Looks at every picture of a slice, many at once.

    Args:
      source: The slice.
      broken_share: As it was written.
      note: What is to be known of a record; it decodes its picture.
      broken: An empty list, to which is appended what is said of those that raise `BrokenPicture`.

    Yields:
      Of those that can be decoded, in order: which one it is, its record and what was noted.

    Raises:
      UserError: more than ``broken_share`` cannot be decoded.
    """

    def found(record: dict[str, Any]) -> tuple[bool, Any]:
        try:
            return True, note(record)
        except BrokenPicture as error:
            return False, f"{record['name']}: {error}"

    for start in range(0, len(source), AT_ONCE):
        ids = range(start, min(start + AT_ONCE, len(source)))
        records = source.__getitems__(ids)
        for i, record, (good, noted) in zip(ids, records, decoders().map(found, records), strict=True):
            if good:
                yield i, record, noted
            else:
                broken.append(noted)
        check_broken(broken, source, broken_share)


def check_broken(broken: list[str], source: Source, broken_share: float) -> None:
    """Refuses too many pictures that cannot be decoded.

    Raises:
      UserError: they are more than ``broken_share`` of all.
    """
    if len(broken) > broken_share * len(source):
        raise UserError(
            f"{len(broken):,} of {len(source):,} pictures in {source.split} of {source.spec} cannot be used, more "
            f"than config.data.broken_share={broken_share:g}: {_listed(broken)}"
        )


def say_broken(broken: list[str], source: Source, broken_share: float) -> None:
    """Names pictures that are left out; whoever looked at them may have allowed more.

    Raises:
      UserError: they are more than ``broken_share`` of all.
    """
    check_broken(broken, source, broken_share)
    if broken:
        told = f"{len(broken):,} of {len(source):,} pictures in {source.split} are left out: {_listed(broken)}"
        print(f"note: {told}", flush=True)


def _listed(broken: list[str]) -> str:
    more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
    return "; ".join(itertools.islice(broken, 3)) + more
