"""Folders on this machine's disks or on ``gs://``, used alike through epath.

What epath does not hide is here: a file that is written whole or not at all, a folder that a library can only read or
write on a local disk, and storage that is missing its library or its credentials.
"""

from __future__ import annotations

import atexit
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path as LocalPath
from typing import TYPE_CHECKING

import numpy as np
from etils.epath import Path
from PIL import Image

from sslx.errors import Unavailable, UserError, first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an object store."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path from the root of its storage."""
    return Path(path) if is_remote(path) else Path(path).absolute()


def check(path: str | os.PathLike[str]) -> None:
    """Looks whether remote storage can be reached at all; says nothing of a local path.

    Raises:
      UserError: an unknown kind of storage, or its library is missing.
      Unavailable: it does not answer, or not without other credentials.
    """
    require(path)
    if not is_remote(path):
        return
    try:
        Path(path).exists()
    except Exception as error:  # gcsfs, aiohttp and google.auth each have kinds of their own
        raise Unavailable(f"cannot reach {path}: {first_line(error)}") from None


def require(path: str | os.PathLike[str]) -> None:
    """Looks whether the library for a path's storage is here; asks nothing of the storage.

    Raises:
      UserError: an unknown kind of storage, or its library is missing.
    """
    if not is_remote(path):
        return
    scheme = os.fspath(path).partition("://")[0]
    if scheme != "gs":
        raise UserError(f"{path} is on storage of an unknown kind, {scheme}://; expected a folder or gs://")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} needs gcsfs, which is not installed: pip install 'sslx[gcs]'")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
      UserError: the folder cannot be written, or the disk is full.
    """
    write_bytes(path, text.encode("utf8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
      UserError: the folder cannot be written, or the disk is full.
      Unavailable: the object store does not take it.
    """
    temporary, path = None, Path(path)
    if is_remote(path):
        try:
            path.write_bytes(content)  # an object appears when it is complete
        except Exception as error:  # gcsfs, aiohttp and google.auth each have kinds of their own
            raise Unavailable(f"cannot write {path}: {first_line(error)}") from None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            LocalPath(temporary).unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Writes a figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_bytes(path, content.getvalue())


def write_picture(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """Writes pixels uint8[height, width, 3] as PNG."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    write_bytes(path, content.getvalue())


def upload(folder: LocalPath, target: str | os.PathLike[str]) -> None:
    """Copies the files of a local folder, and of the folders in it, over those of another."""
    for file in sorted(path for path in LocalPath(folder).rglob("*") if path.is_file()):
        write_bytes(Path(target) / str(file.relative_to(folder)), file.read_bytes())


def local_copy(folder: str | os.PathLike[str]) -> LocalPath:
    """The folder itself if it is local, else a copy of its files that stays until the process ends."""
    if not is_remote(folder):
        return LocalPath(folder)
    copy = LocalPath(tempfile.mkdtemp(prefix="sslx-"))
    _remove_at_exit(copy)
    for path in Path(folder).iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def staging(folder: str | os.PathLike[str]) -> LocalPath:
    """Where to write what grows by appending: the folder itself if it is local, else a temporary one to upload."""
    if not is_remote(folder):
        return LocalPath(folder)
    made = LocalPath(tempfile.mkdtemp(prefix="sslx-"))
    _remove_at_exit(made)
    return made


def _remove_at_exit(folder: LocalPath) -> None:
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
