"""Prepared data on disk: where it goes, what it is called, and how it is written once by whoever comes first.

In: what decides the content, and a function that writes it. Out: a complete folder. Nothing in a cache is ever changed:
other content has another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import filelock

from sslx.errors import UserError
from sslx.storage import is_remote

_told_on: TextIO | None = None  # where what is done once is told; None: stdout, like the header that follows


def tell_on(stream: TextIO) -> None:
    """Lets this process say what it prepares there: of several, any may be the one that does it, and few are heard."""
    global _told_on
    _told_on = stream


def cache_folder(cache_dir: str = "") -> Path:
    """Returns where prepared data goes: ``cache_dir``, else ``$SSLX_CACHE``, else ``~/.cache/sslx``.

    Raises:
      UserError: it is on an object store, where nothing can be mapped.
    """
    if is_remote(cache_dir):
        raise UserError(
            f"the data cache {cache_dir} is no local folder; for rows on an object store see sslx.prepare --rows"
        )
    return Path(cache_dir or os.environ.get("SSLX_CACHE") or "~/.cache/sslx").expanduser()


def hash_of(*parts: Any) -> str:
    """Returns a 16-hex-digit name for JSON-like parts: what a cache key or a fingerprint is made of."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def prepare_once(cache_dir: str | os.PathLike[str], name: str, build: Callable[[Path], object]) -> Path:
    """Returns folder ``cache_dir/name``, letting ``build(folder)`` fill it if it is not there yet.

    Any number of processes may ask at once: one builds, the others wait. A folder that exists is complete, since it is
    built under a temporary name, brought to disk and renamed; what a killed process left is removed.

    Raises:
      UserError: the folder cannot be written (read-only, full), or ``build`` cannot read a file.
    """
    root = Path(cache_dir).expanduser()
    folder = root / name
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{name}.lock"):
            if not folder.is_dir():
                for stale in root.glob(f"{name}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                temporary = Path(tempfile.mkdtemp(prefix=f"{name}.tmp-", dir=root))
                try:
                    with contextlib.redirect_stdout(_told_on or sys.stdout):
                        print(f"preparing {folder} (once)", flush=True)  # a first start spends a minute here
                        _build(build, temporary)
                    temporary.chmod(0o755)  # mkdtemp's 0700 would shut other users out of a shared cache
                    _to_disk(temporary)
                    os.replace(temporary, folder)
                    _fsync(root)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {root}: {error.strerror or error}; set config.data.cache_dir or $SSLX_CACHE "
            "to a folder with space that can be written"
        ) from error
    with contextlib.suppress(OSError):
        (root / f"{name}.lock").unlink()  # only tidies: a waiting process holds its own handle and finds the folder
    return folder


def _build(build: Callable[[Path], object], folder: Path) -> None:
    """Calls ``build``; a file elsewhere that fails is one that it reads, and no other cache folder would help.

    Raises:
      OSError: writing failed.
      UserError: reading failed.
    """
    try:
        build(folder)
    except OSError as error:
        place = os.path.abspath(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
        if place and not Path(place).is_relative_to(folder.absolute()):
            raise UserError(f"cannot read {place}: {error.strerror or error}") from error
        raise


def _to_disk(folder: Path) -> None:
    """A rename may reach the disk before what it renames, and after a power cut the folder would look complete."""
    for place, _, names in os.walk(folder):
        for path in (*(os.path.join(place, name) for name in names), place):
            _fsync(path)


def _fsync(path: str | os.PathLike[str]) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
