"""Writes prepared rows into a folder, laid out as `stored_rows` says.

In: a `PreparedText`. Out: a new folder on a disk or on ``gs://``, whose ``meta.json`` comes last. The blocks of a
role (``train``, ``eval``, ``test``) go into files of about `SHARD_BYTES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sslx.data.block_cache import storage
from sslx.data.cache import hash_of
from sslx.data.stored_rows import BLOCK_ROWS, DERIVED, FORMAT, WINDOW_BLOCKS, Column, Meta, full_path
from sslx.errors import UserError, first_line

if TYPE_CHECKING:
    from sslx.data.rows import TextRows
    from sslx.data.stored_rows import StoredRows
    from sslx.data.text import PreparedText

SHARD_BYTES = 1 << 28


def write_rows(
    prepared: PreparedText,
    folder: str | os.PathLike[str],
    *,
    block_rows: int = BLOCK_ROWS,
    window_blocks: int = WINDOW_BLOCKS,
) -> None:
    """Writes all rows, the tokenizer and then ``meta.json``.

    What an interrupted call has left in the folder is replaced.

    Args:
      prepared: what to write.
      folder: a path or URL.
      block_rows: rows read at once.
      window_blocks: blocks among which training shuffles rows; its readers keep two such windows in memory.

    Raises:
      UserError: the folder already holds prepared rows or anything else, or cannot be written.
    """
    folder = full_path(folder)
    files, root = storage(folder)
    meta = _describe(prepared, block_rows, window_blocks)
    try:
        _make_room(files, root, folder)
        checksums = {role: _write_role(getattr(prepared, role), meta, role, files, root) for role in meta.rows}
        meta = dataclasses.replace(meta, checksums=checksums)
        with tempfile.TemporaryDirectory() as temporary:
            prepared.tokenizer.save_pretrained(temporary)
            files.makedirs(f"{root}/tokenizer", exist_ok=True)
            for file in sorted(Path(temporary).iterdir()):
                files.pipe_file(f"{root}/tokenizer/{file.name}", file.read_bytes())
        files.pipe_file(f"{root}/meta.json", json.dumps(dataclasses.asdict(meta), indent=1).encode())
    except UserError:
        raise
    except Exception as error:  # each storage has its own kinds
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write prepared rows to {folder}: {reason}") from error


def check_room(folder: str | os.PathLike[str]) -> None:
    """Refuses, ahead of all work, what `write_rows` would.

    Raises:
      UserError: the folder already holds prepared rows or anything else, or its storage cannot be reached.
    """
    folder = full_path(folder)
    try:
        files, root = storage(folder)
        _names_in(files, root, folder)
    except UserError:
        raise
    except Exception as error:  # each storage has its own kinds
        raise UserError(f"cannot write prepared rows to {folder}: {first_line(error)}") from error


def _describe(prepared: PreparedText, block_rows: int, window_blocks: int) -> Meta:
    seq_len = prepared.train.seq_len
    small = {
        "tokens": "<u2" if prepared.vocabulary.size <= 1 << 16 else "<u4",
        "targets": "<u2" if prepared.vocabulary.size <= 1 << 16 else "<u4",
        # A segment has at least three tokens: [CLS], one of text and [SEP]; for a causal model, one.
        "segment_ids": "|u1" if seq_len // (1 if prepared.layout == "causal" else 3) < 1 << 8 else "<u2",
        "token_types": "|u1",
        "sentence_label": "|u1",
        "label": "<i4",
    }
    sample = prepared.train.fetch(np.zeros(1, np.int64))
    small |= {name: "<f4" for name, values in sample.items() if values.dtype.kind == "f"}
    columns = tuple(Column(name, small[name], sample[name].shape[1:]) for name in sample if name != DERIVED)
    sets = {"train": prepared.train, "eval": prepared.eval, "test": prepared.test}
    row_bytes = np.dtype([tuple(column) for column in columns]).itemsize
    # The order is part of what a resumed run relies on, and it is not that of rows read from their tokens.
    fingerprint = hash_of("rows", FORMAT, prepared.statistics["fingerprint"], block_rows, window_blocks)
    return Meta(
        format=FORMAT,
        layout=prepared.layout,
        seq_len=seq_len,
        columns=columns,
        block_rows=block_rows,
        window_blocks=window_blocks,
        blocks_per_shard=max(1, SHARD_BYTES // (block_rows * row_bytes)),
        rows={role: len(rows) for role, rows in sets.items() if rows is not None},
        checksums={},
        vocabulary=prepared.vocabulary.fingerprint,
        label_names=prepared.label_names,
        statistics=prepared.statistics | {"fingerprint": fingerprint},
        fingerprint=fingerprint,
    )


def _names_in(files: Any, root: str, folder: str) -> list[str]:
    """What an interrupted call has left in a folder, which holds nothing else."""
    names = []
    with contextlib.suppress(FileNotFoundError):
        files.invalidate_cache()
        names = [os.path.basename(name.rstrip("/")) for name in files.ls(root, detail=False)]
    if "meta.json" in names:
        raise UserError(f"{folder} already holds prepared rows; give another folder, or delete it first")
    others = sorted(name for name in names if name and name != "tokenizer" and not name.endswith(".rows"))
    if others:
        raise UserError(f"{folder} already holds {others[0]!r}, which is not of prepared rows; give another folder")
    return names


def _make_room(files: Any, root: str, folder: str) -> None:
    for name in _names_in(files, root, folder):
        if name.endswith(".rows"):
            files.rm_file(f"{root}/{name}")
    files.makedirs(root, exist_ok=True)


def _write_role(rows: TextRows | StoredRows, meta: Meta, role: str, files: Any, root: str) -> str:
    """Returns the blocks' checksums."""
    checksums = []
    for first in range(0, meta.blocks(role), meta.blocks_per_shard):
        name = f"{role}-{first // meta.blocks_per_shard:05d}.rows"
        with files.open(f"{root}/{name}", "wb") as file:
            for number in range(first, min(first + meta.blocks_per_shard, meta.blocks(role))):
                start = number * meta.block_rows
                batch = rows.fetch(np.arange(start, min(start + meta.block_rows, len(rows))))
                block = np.zeros(meta.block_rows, meta.row_type)
                for column in meta.columns:
                    block[column.name][: len(batch[column.name])] = batch[column.name]
                file.write(block.tobytes())
                checksums.append(f"{zlib.crc32(block.tobytes()):08x}")
    return "".join(checksums)
