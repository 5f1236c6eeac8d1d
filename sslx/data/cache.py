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
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from sslx.errors import UserError


def cache_folder(cache_dir: str = "") -> Path:
    """Returns where prepared data goes: ``cache_dir``, else ``$SSLX_CACHE``, else ``~/.cache/sslx``."""
    return Path(cache_dir or os.environ.get("SSLX_CACHE") or "~/.cache/sslx").expanduser()


def hash_of(*parts: Any) -> str:
    """Returns a 16-hex-digit name for JSON-like parts: what a cache key or a fingerprint is made of."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def prepare_once(cache_dir: str | os.PathLike[str], name: str, build: Callable[[Path], object]) -> Path:
    """Returns folder ``cache_dir/name``, letting ``build(folder)`` fill it if it is not there yet.

    Any number of processes may ask at once: one builds, the others wait. A folder that exists is complete, since it is
    built under a temporary name and renamed; what a killed process left is removed.

    Raises:
      UserError: the folder cannot be written (read-only, full).
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
                # Said on stdout like the header that follows: a first start spends a minute here.
                print(f"preparing {folder} (once)", flush=True)
                try:
                    build(temporary)
                    temporary.chmod(0o755)  # mkdtemp's 0700 would shut other users out of a shared cache
                    os.replace(temporary, folder)
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
