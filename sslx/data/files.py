"""Files as sources: which ones a path, folder or glob means, what splits they are, and text and JSON from their bytes.

What is wrong with a file is named by its path and, where it has lines, by the line.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sslx.errors import UserError, nearest

HASHED_BYTES = 1 << 30  # a corpus up to here is known by its bytes, a larger one by paths, sizes and times
# What files and folders of a split are called.
SPLIT_WORDS = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing"),
    }.items()
    for word in words
}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})(?![a-z])")


def matching_files(spec: str, pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """Returns the absolute paths, sorted, of the files that ``pattern`` (a path, folder or glob) names.

    Raises:
      UserError: there are none with one of ``suffixes``; names what is near ``spec``.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        found = _below(pattern)
    else:
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    found = sorted(os.path.abspath(path) for path in found if os.path.isfile(path))
    readable = [path for path in found if Path(path).suffix.lower() in suffixes]
    if readable:
        return readable
    if found:
        raise UserError(f"{spec} matches {found[0]}, but reads only {', '.join(suffixes)} files")
    here = Path(pattern)
    while not here.exists() and here != here.parent:  # the deepest folder that is there, and in it the closest name
        missing, here = here.name, here.parent
    if here == Path(pattern):
        raise UserError(f"{spec} is a folder without {', '.join(suffixes)} files")
    raise UserError(f"no file matches {spec}; {here} exists, {nearest(missing, os.listdir(here)[:1000])}")


def bytes_of(path: str) -> bytes:
    """A whole file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _below(folder: str) -> Iterator[str]:
    """All that is below a folder, through links too, but for hidden names.

    A link to a folder that it lies in is not gone through: each file would be there dozens of times, in other classes.
    """
    around = {folder: (os.path.realpath(folder),)}  # of each place, the folders that it lies in
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = {os.path.join(place, name): name for name in folders if not name.startswith(".")}
        around |= {path: (*around[place], os.path.realpath(path)) for path in inner}
        folders[:] = [name for path, name in inner.items() if around[path][-1] not in around[place]]
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def splits_of_files(paths: list[str]) -> list[str]:
    """Returns the split of each file: ``train``, unless the names of all begin with that of a split.

    ``train-v2.0.json`` and ``dev-v2.0.json`` are such names (`SPLIT_WORDS`), and one has to be of ``train``.
    """
    matches = [SPLIT_WORD.match(Path(path).name.lower()) for path in paths]
    if not all(matches):
        return ["train"] * len(paths)
    names = [SPLIT_WORDS[match[1]] for match in matches]
    return names if "train" in names else ["train"] * len(paths)


def content_of(paths: list[str]) -> list[Any]:
    """Returns what changes when the files' content or kind does, an entry a file, for a fingerprint.

    Raises:
      UserError: one of them cannot be read.
    """
    digests = []
    try:
        stats = [os.stat(path) for path in paths]
        if sum(stat.st_size for stat in stats) > HASHED_BYTES:
            return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]
        for path in paths:
            with open(path, "rb") as file:
                digests.append([Path(path).suffix.lower(), hashlib.file_digest(file, "blake2b").hexdigest()])
    except OSError as error:
        raise UserError(f"cannot read {error.filename or paths[len(digests)]}: {error.strerror or error}") from error
    return digests


def decoded(data: bytes, where: str, offset: int = 0) -> str:
    """Decodes UTF-8, without a byte order mark. Raises UserError with ``where`` and the byte that is not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {offset + error.start:,}") from error


def without_halves(value: Any) -> Any:
    """A JSON value whose texts hold U+FFFD for each half of a surrogate pair; their lengths stay.

    JSON may escape such a half alone; it is no text, a tokenizer refuses it and UTF-8 cannot hold it.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [without_halves(item) for item in value]
    if isinstance(value, dict):
        return {without_halves(name): without_halves(item) for name, item in value.items()}
    return value


def json_object(line: str, where: Callable[[], str]) -> dict[str, Any]:
    """Parses one of a file's JSON lines, `without_halves`.

    Raises:
      UserError: it is no JSON object; says ``where()``.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where()}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where()}: expected a JSON object, got {type(record).__name__}")
    return without_halves(record)
