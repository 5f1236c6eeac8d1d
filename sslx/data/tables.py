"""Documents in tables, Parquet and CSV: a reader a file, of the columns that are asked for.

In: a path and the names of its columns of text. Out: their texts and labels by row, counted from 0. In errors a record
is named by its line (CSV) or by its number from 1.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.files import decoded
from sslx.data.labels import class_name
from sslx.errors import MissingField, UserError, first_line, nearest, quoted

_SEPARATORS = {";": "semicolons", "\t": "tabs"}  # that are read for nobody, and that spreadsheets write


def field_key(name: str) -> str:
    """The key of a config that names the field of a record's ``text``, ``pair`` or ``label``."""
    return f"config.data.{name}_field"


def check_fields(path: str, given: Mapping[str, str], columns: Sequence[str]) -> None:
    """Refuses columns among which there is not one of each name of ``given`` (``text``, ``pair`` -> its column).

    Raises:
      UserError: as said.
    """
    for name, field in given.items():
        if field not in columns:
            raise MissingField(f"{path}: no field {field!r}; {nearest(field, columns)}", field_key(name))
        _check_once(path, field, columns)


def _check_once(path: str, field: str, columns: Sequence[str]) -> None:
    count = list(columns).count(field)
    if count > 1:
        raise UserError(f"{path}: {count} columns are named {field!r}; expected one of each name that is read")


@contextlib.contextmanager
def _arrow(path: str, otherwise: str) -> Iterator[None]:
    """Names the file that Arrow cannot read, and ``otherwise`` what is wrong with it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # Arrow raises OSError for what the file holds, too, and then the system has said nothing.
        raise UserError(f"{path}: {otherwise} ({getattr(error, 'strerror', None) or first_line(error)})") from error


class ParquetFile:
    """A .parquet file; the row group read last stays in memory."""

    def __init__(self, path: str, text_fields: Mapping[str, str]):
        import pyarrow.parquet as pq

        self._path, self._columns = path, tuple(text_fields.values())
        with _arrow(path, "not a parquet file"):
            self._file = pq.ParquetFile(path)
        check_fields(path, text_fields, self.fields())
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._group = functools.lru_cache(maxsize=1)(self._read_group)

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
        _check_once(self._path, label_field, self.fields())
        with _arrow(self._path, f"cannot read column {label_field!r}"):
            labels = self._file.read(columns=[label_field])[label_field].to_pylist()
        missing = next((row for row, label in enumerate(labels) if label is None), None)
        if missing is not None:
            raise UserError(f"{self.where(missing)}: field {label_field!r} is null")
        return [class_name(label, functools.partial(self.where, row), label_field) for row, label in enumerate(labels)]

    def _read_group(self, group: int) -> Any:
        with _arrow(self._path, f"cannot read row group {group + 1}"):
            return self._file.read_row_group(group, columns=list(self._columns))

    def _text(self, row: int, group: int, field: str) -> str:
        text = self._group(group)[field][row - int(self._starts[group])].as_py()
        text = "" if text is None else text
        if not isinstance(text, str):
            raise UserError(f"{self.where(row)}: field {field!r} is not a string")
        return text

    def where(self, row: int) -> str:
        """A record's place, for an error."""
        return f"{self._path}, record {row + 1}"


class CsvFile:
    """A .csv file with a header line, parsed whole: labelled sets are small."""

    def __init__(self, path: str, text_fields: Mapping[str, str]):
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        self._path, self._columns = path, tuple(text_fields.values())
        text = decoded(Path(path).read_bytes(), path)
        _, header = next(_lines(text), (1, []))
        separator = next((mark for mark in _SEPARATORS if len(header) == 1 and mark in header[0]), None)
        if separator and header[0] not in self._columns:
            found = f"its columns are separated by {_SEPARATORS[separator]}"
            raise UserError(f"{path}: {found} ({quoted(header[0])}); expected commas")
        check_fields(path, text_fields, header)
        parse = arrow_csv.ParseOptions(newlines_in_values=True)
        convert = arrow_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
        try:
            self._table = arrow_csv.read_csv(
                pa.BufferReader(text.encode()), parse_options=parse, convert_options=convert
            )
        except pa.ArrowException as error:
            for line, row in _lines(text):
                if len(row) != len(header):
                    found = f"expected {len(header)} columns, as in the header, got {len(row)}"
                    raise UserError(f"{path}:{line}: not CSV ({found})") from error
            raise UserError(f"{path}: not CSV ({first_line(error)})") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def fields(self) -> list[str]:
        return self._table.column_names

    def texts(self, rows: list[int]) -> list[tuple[str, ...]]:
        return list(zip(*(self._table[field].take(rows).to_pylist() for field in self._columns), strict=True))

    def labels(self, label_field: str) -> list[str] | None:
        if label_field not in self.fields():
            return None
        _check_once(self._path, label_field, self.fields())
        labels = self._table[label_field].to_pylist()
        if "" in labels:
            raise UserError(f"{self.where(labels.index(''))}: the field {label_field!r} is empty")
        return labels

    def where(self, row: int) -> str:
        """A record's place, for an error: the line where it begins, if both readers of the file count alike."""
        lines = [line for line, _ in _lines(decoded(Path(self._path).read_bytes(), self._path))]
        return f"{self._path}:{lines[row + 1]}" if len(lines) == len(self) + 1 else f"{self._path}, record {row + 1}"


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of CSV, its header first, each with the line in which it begins, from 1; ends at what it cannot read."""
    reader = csv.reader(io.StringIO(text, newline=""))
    before = 0
    with contextlib.suppress(csv.Error):  # a field of more than 128 KiB
        for row in reader:
            if row:  # empty lines are none
                yield before + 1, row
            before = reader.line_num
