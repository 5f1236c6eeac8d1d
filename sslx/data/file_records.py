"""Documents in files: .txt, .jsonl, .parquet and .csv, as one random-access list of records over many files.

In: paths. Out: `FileRecords`. A record that cannot be read is named by file and line. One without text (an empty .txt
file, a null) is an empty document; a .jsonl file without lines adds none.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.files import decoded, json_object
from sslx.errors import MissingField, UserError, first_line, nearest


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
        for number, path in enumerate(paths):
            reader = self._open(number)
            counts.append(len(reader))
            if label_field and len(reader):
                labels[path] = reader.labels(label_field)
        if not any(counts):
            raise UserError(f"{paths[0]} holds no records{_like_the_others(paths)}")
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.label_names, self._labels = None, None
        if any(label is not None for label in labels.values()):
            for path, label in labels.items():
                if label is None:
                    raise UserError(f"{path} has no field {label_field!r} for labels, but other files of the source do")
            if numbers:
                flat = [_number(label, path, row) for path, file in labels.items() for row, label in enumerate(file)]
                self._labels = np.array(flat, dtype=np.float32)
                return
            flat = [label for file in labels.values() for label in file]
            names = sorted(set(flat))
            if all(name.removeprefix("-").isdecimal() for name in names):
                names.sort(key=int)
            number_of = {name: i for i, name in enumerate(names)}
            self.label_names = tuple(names)
            self._labels = np.array([number_of[name] for name in flat], dtype=np.int32)

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
            f"{path}: no field {label_field!r} for labels; {nearest(label_field, fields)}", _key("label")
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


def _key(name: str) -> str:
    """The key of a config that names the field of a record's ``text``, ``pair`` or ``label``."""
    return f"config.data.{name}_field"


def _check_fields(path: str, given: Mapping[str, str], columns: Sequence[str]) -> None:
    for name, field in given.items():
        if field not in columns:
            raise MissingField(f"{path}: no field {field!r}; {nearest(field, columns)}", _key(name))


def _label(label: Any, where: Callable[[], str], field: str) -> str:
    """A label as the name of its class; 1 and 1.0 are the same.

    Raises:
      UserError: it is empty or holds several values; says ``where()``.
    """
    if label == "":
        raise UserError(f"{where()}: the field {field!r} is empty")
    if isinstance(label, list | dict):
        kind = "a list" if isinstance(label, list) else "an object"
        raise UserError(f"{where()}: the field {field!r} is {kind}; expected a label, a string or a number")
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def _number(label: str, path: str, row: int) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}, record {row}: label {label!r} is no number")
    return value


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
            raise UserError(f"{self._where(missing)}: no field {label_field!r}, but other lines have it")
        if missing is not None:
            return None
        return [_label(label, functools.partial(self._where, row), label_field) for row, label in enumerate(labels)]

    def _texts(self, row: int) -> tuple[str, ...]:
        record = self._record(row)
        for field in self._text_fields.values():
            if field not in record:  # asked first, since only then the place costs nothing
                _check_fields(self._where(row), self._text_fields, list(record))
        return tuple(self._text(record, field, row) for field in self._text_fields.values())

    def _text(self, record: dict[str, Any], field: str, row: int) -> str:
        text = "" if record[field] is None else record[field]
        if not isinstance(text, str):
            raise UserError(f"{self._where(row)}: field {field!r} is not a string but {type(text).__name__}")
        return text

    def _record(self, row: int) -> dict[str, Any]:
        start = int(self._starts[row])
        line = self._bytes[start : int(self._ends[row])]
        try:
            text = line.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            text = decoded(line, self._where(row), start)
        return json_object(text, functools.partial(self._where, row))

    def _where(self, row: int) -> str:
        return f"{self._path}:{self._bytes[: int(self._starts[row])].count(10) + 1}"


class _ParquetFile:
    """A .parquet file; the row group read last stays in memory."""

    def __init__(self, path: str, text_fields: Mapping[str, str]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._columns = path, tuple(text_fields.values())
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a parquet file ({first_line(error)})") from error
        _check_fields(path, text_fields, self.fields())
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._group = functools.lru_cache(maxsize=1)(
            lambda g: self._file.read_row_group(g, columns=list(self._columns))
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def fields(self) -> list[str]:
        return self._file.schema_arrow.names

    def texts(self, rows: list[int]) -> list[tuple[str, ...]]:
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        return [
            tuple(self._text(row, group, field) for field in self._columns)
            for row, group in zip(rows, groups.tolist(), strict=True)
        ]

    def labels(self, label_field: str) -> list[str] | None:
        if label_field not in self.fields():
            return None
        labels = self._file.read(columns=[label_field])[label_field].to_pylist()
        missing = next((row for row, label in enumerate(labels) if label is None), None)
        if missing is not None:
            raise UserError(f"{self._path}, row {missing}: field {label_field!r} is null")
        return [_label(label, lambda r=row: f"{self._path}, row {r}", label_field) for row, label in enumerate(labels)]

    def _text(self, row: int, group: int, field: str) -> str:
        text = self._group(group)[field][row - int(self._starts[group])].as_py()
        text = "" if text is None else text
        if not isinstance(text, str):
            raise UserError(f"{self._path}, row {row}: field {field!r} is not a string")
        return text


class _CsvFile:
    """A .csv file with a header line, parsed whole: labelled sets are small."""

    def __init__(self, path: str, text_fields: Mapping[str, str]):
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        text = decoded(Path(path).read_bytes(), path)
        header = next(csv.reader(io.StringIO(text, newline="")), [])
        _check_fields(path, text_fields, header)
        parse = arrow_csv.ParseOptions(newlines_in_values=True)
        convert = arrow_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
        try:
            self._table = arrow_csv.read_csv(
                pa.BufferReader(text.encode()), parse_options=parse, convert_options=convert
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not CSV ({first_line(error)})") from error
        self._path = path
        self._columns = tuple(text_fields.values())

    def __len__(self) -> int:
        return self._table.num_rows

    def fields(self) -> list[str]:
        return self._table.column_names

    def texts(self, rows: list[int]) -> list[tuple[str, ...]]:
        return list(zip(*(self._table[field].take(rows).to_pylist() for field in self._columns), strict=True))

    def labels(self, label_field: str) -> list[str] | None:
        if label_field not in self.fields():
            return None
        labels = self._table[label_field].to_pylist()
        if "" in labels:
            raise UserError(f"{self._path}, record {labels.index('')}: the field {label_field!r} is empty")
        return labels


_READERS = {".txt": _TextFile, ".jsonl": _JsonLinesFile, ".parquet": _ParquetFile, ".csv": _CsvFile}
