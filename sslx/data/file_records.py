"""Documents in files: .txt, .jsonl, .parquet and .csv, as one random-access list of records over many files.

In: paths. Out: `FileRecords`. A record that cannot be read is named by file and line, of Parquet by its number from 1.
One without text (an empty .txt file, a null) is an empty document; a .jsonl file without lines adds none.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.files import decoded, json_object
from sslx.data.labels import class_name, number_of
from sslx.data.tables import CsvFile, ParquetFile, check_fields, field_key
from sslx.errors import MissingField, UserError, nearest


class FileRecords:
    """Documents of many files as one list; a few files are kept open at a time, so reading in order is fastest.

    ``text_fields`` are the fields of a record's texts by their names in what `read` gives: ``text`` and, for pairs,
    ``pair``. Labels are class ids, or with ``numbers`` the values themselves; ``labelled`` tells whether there are any.
    """

    def __init__(self, paths: list[str], text_fields: Mapping[str, str], label_field: str, *, numbers: bool = False):
        sizes = {path: os.path.getsize(path) for path in paths}
        kind = {path: Path(path).suffix.lower() for path in paths}
        all_empty = not any(sizes.values())
        for path in paths:
            # No text is an empty document and no lines are no records; the other formats begin with a header.
            if not sizes[path] and (all_empty or kind[path] not in (".txt", ".jsonl")):
                raise UserError(f"{path} is an empty file{_like_the_others(paths) if all_empty else ''}")
        self._paths = paths = [path for path in paths if sizes[path] or kind[path] == ".txt"]
        self._open = functools.lru_cache(maxsize=4)(lambda f: _READERS[kind[paths[f]]](paths[f], text_fields))
        self._names = tuple(text_fields)
        counts, labels = [], {}
        for number in range(len(paths)):
            reader = self._open(number)
            counts.append(len(reader))
            if label_field and len(reader):
                labels[number] = reader.labels(label_field)
        if not any(counts):
            raise UserError(f"{paths[0]} holds no records{_like_the_others(paths)}")
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.label_names, self._labels = None, None
        if any(label is not None for label in labels.values()):
            for number, label in labels.items():
                if label is None:
                    missing = f"{paths[number]} has no field {label_field!r} for labels"
                    raise UserError(f"{missing}, but other files of the source do")
            if numbers:
                flat = [
                    number_of(label, lambda n=number, r=row: self._open(n).where(r))
                    for number, file in labels.items()
                    for row, label in enumerate(file)
                ]
                self._labels = np.array(flat, dtype=np.float32)
                return
            flat = [label for file in labels.values() for label in file]
            names = sorted(set(flat))
            if all(name.removeprefix("-").isdecimal() for name in names):
                names.sort(key=int)
            ids = {name: i for i, name in enumerate(names)}
            self.label_names = tuple(names)
            self._labels = np.array([ids[name] for name in flat], dtype=np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def labelled(self) -> bool:
        return self._labels is not None

    def require_labels(self, label_field: str) -> None:
        """Refuses records without labels.

        Raises:
          UserError: there are none; names the fields that the first file with records has.
        """
        if self.labelled:
            return
        first = int(np.flatnonzero(np.diff(self._starts))[0])
        path, fields = self._paths[first], self._open(first).fields()
        if label_field in fields:
            raise UserError(f"{path}: field {label_field!r} is null in all records; expected labels")
        raise MissingField(
            f"{path}: no field {label_field!r} for labels; {nearest(label_field, fields)}", field_key("label")
        )

    def of_files(self, paths: set[str]) -> RecordsOfFiles:
        """The records of some of the files; labels mean what they do in all of them."""
        parts = [np.arange(*self._starts[f : f + 2]) for f, path in enumerate(self._paths) if path in paths]
        return RecordsOfFiles(self, np.concatenate([np.zeros(0, np.int64), *parts]))

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{}] * len(ids)
        records = np.asarray(ids, dtype=np.int64)
        files = np.searchsorted(self._starts, records, side="right") - 1
        for file in np.unique(files).tolist():
            (places,) = np.nonzero(files == file)
            try:
                texts = self._open(file).texts((records[places] - self._starts[file]).tolist())
            except OSError as error:
                raise UserError(f"cannot read {self._paths[file]}: {error.strerror or error}") from error
            for place, found in zip(places.tolist(), texts, strict=True):
                rows[place] = dict(zip(self._names, found, strict=True))
        if self._labels is not None:
            for row, label in zip(rows, self._labels[records].tolist(), strict=True):
                row["label"] = label
        return rows


class RecordsOfFiles:
    """Those records of many files that stand in some of the files."""

    def __init__(self, records: FileRecords, ids: np.ndarray):
        self._records, self._ids = records, ids

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        return self._records.read(self._ids[np.asarray(ids, dtype=np.int64)].tolist())


class DocumentPart:
    """A source of one document, of which it holds the characters from one share of the text to another."""

    def __init__(self, records: Any, start: float, stop: float):
        self._records, self._start, self._stop = records, start, stop

    def __len__(self) -> int:
        return 1

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        text = self._records.read([0])[0]["text"]
        part = text[int(self._start * len(text)) : int(self._stop * len(text))]
        return [{"text": part} for _ in ids]


def _like_the_others(paths: list[str]) -> str:
    return f", like the {len(paths) - 1} others" if paths[1:] else ""


class _TextFile:
    """A .txt file: one document."""

    def __init__(self, path: str, text_fields: Mapping[str, str]):
        self._path = path

    def __len__(self) -> int:
        return 1

    def texts(self, rows: list[int]) -> list[tuple[str, ...]]:
        text = decoded(Path(self._path).read_bytes(), self._path)
        return [(text,)] * len(rows)


class _JsonLinesFile:
    """A .jsonl file: line positions in memory, the file itself mapped. Blank lines are no records."""

    def __init__(self, path: str, text_fields: Mapping[str, str]):
        self._path, self._text_fields = path, text_fields
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(self._bytes, dtype=np.uint8)
        ends = [start + np.flatnonzero(data[start : start + (1 << 26)] == 10) for start in range(0, len(data), 1 << 26)]
        ends = np.append(np.concatenate(ends), len(data))
        starts = np.concatenate([[0], ends[:-1] + 1])
        first = data[np.minimum(starts, len(data) - 1)]
        blank = ends == starts
        # Few lines begin with white space: only these are read to see whether there is anything else.
        for line in np.flatnonzero(~blank & np.isin(first, list(b" \t\r\v\f"))).tolist():
            blank[line] = not self._bytes[int(starts[line]) : int(ends[line])].strip()
        self._starts, self._ends = starts[~blank], ends[~blank]

    def __len__(self) -> int:
        return len(self._starts)

    def fields(self) -> list[str]:
        return list(self._record(0))

    def texts(self, rows: list[int]) -> list[tuple[str, ...]]:
        return [self._texts(row) for row in rows]

    def labels(self, label_field: str) -> list[str] | None:
        labels = [self._record(row).get(label_field) for row in range(len(self))]
        missing = next((row for row, label in enumerate(labels) if label is None), None)
        if missing is not None and any(label is not None for label in labels):
            raise UserError(f"{self.where(missing)}: no field {label_field!r}, but other lines have it")
        if missing is not None:
            return None
        return [class_name(label, functools.partial(self.where, row), label_field) for row, label in enumerate(labels)]

    def _texts(self, row: int) -> tuple[str, ...]:
        record = self._record(row)
        for field in self._text_fields.values():
            if field not in record:  # asked first, since only then the place costs nothing
                check_fields(self.where(row), self._text_fields, list(record))
        return tuple(self._text(record, field, row) for field in self._text_fields.values())

    def _text(self, record: dict[str, Any], field: str, row: int) -> str:
        text = "" if record[field] is None else record[field]
        if not isinstance(text, str):
            raise UserError(f"{self.where(row)}: field {field!r} is not a string but {type(text).__name__}")
        return text

    def _record(self, row: int) -> dict[str, Any]:
        start = int(self._starts[row])
        line = self._bytes[start : int(self._ends[row])]
        try:
            text = line.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            text = decoded(line, self.where(row), start)
        return json_object(text, functools.partial(self.where, row))

    def where(self, row: int) -> str:
        """A record's place, for an error."""
        return f"{self._path}:{self._bytes[: int(self._starts[row])].count(10) + 1}"


_READERS = {".txt": _TextFile, ".jsonl": _JsonLinesFile, ".parquet": ParquetFile, ".csv": CsvFile}
