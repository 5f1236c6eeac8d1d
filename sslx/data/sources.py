"""Where documents come from: a TFDS dataset or files, opened as one random-access list of records.

In: a source spec (``python_docs``, ``tfds:NAME[/CONFIG]``, ``text:GLOB``, ``csv:GLOB``, ``jsonl:GLOB``) and a split in
TFDS slice syntax. Out: a `Source`, whose ``fingerprint`` names the content, so that what is made from it can be cached.

Files have one split, ``train``. Which documents a slice of it holds is decided in a fixed shuffled order, so that
slices are random samples and complementary ones share nothing; within a slice documents stay in file order, which
keeps reading sequential. TFDS slices are TFDS's own.
"""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sslx.errors import UserError, choose, nearest

SUFFIXES = {"text": (".txt", ".jsonl", ".parquet"), "csv": (".csv",), "jsonl": (".jsonl",)}
SPEC_FORMS = ("python_docs", "tfds:NAME[/CONFIG]", "text:GLOB", "csv:GLOB", "jsonl:GLOB")
HASHED_BYTES = 1 << 30  # a corpus up to here is known by its bytes, a larger one by paths, sizes and times
SLICE_SEED = 20181011


class Records(Protocol):
    """The records of one split before slicing: ``read(ids)`` gives ``{"text": str, "label": int}`` (label if any)."""

    def __len__(self) -> int: ...

    def read(self, ids: list[int]) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, eq=False)
class Source:
    """One slice of a source; ``ids`` (int64) are its records in the whole source, its splits laid end to end."""

    spec: str
    split: str
    fingerprint: str
    label_names: tuple[str, ...] | None
    records: Sequence[Records] = field(repr=False)
    ids: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads many records at once; neighbours in one call cost least. Raises UserError where one is unreadable."""
        ids = self.ids[np.asarray(indices, dtype=np.int64)]
        ends = np.cumsum([len(records) for records in self.records])
        parts = np.searchsorted(ends, ids, side="right")
        rows: list[dict[str, Any]] = [{}] * len(ids)
        for part in np.unique(parts):
            (places,) = np.nonzero(parts == part)
            local = (ids[places] - (ends[part] - len(self.records[part]))).tolist()
            for place, row in zip(places, self.records[part].read(local), strict=True):
                rows[place] = row
        return rows


@dataclass(frozen=True, eq=False)
class Collection:
    """A whole source before slicing: opened (and hashed) once, sliced into train, eval and test."""

    spec: str
    content: str  # hash of everything that determines what the records hold
    label_names: tuple[str, ...] | None
    splits: Mapping[str, Records] = field(repr=False)
    orders: Mapping[str, np.ndarray] = field(repr=False)  # the order slices cut, where it is not the records' own

    def slice(self, split: str) -> Source:
        """Returns the records of a TFDS split expression.

        Raises:
          UserError: bad syntax, an unknown split, a slice beyond the data, or one that holds nothing.
        """
        starts = dict(zip(self.splits, itertools.accumulate(map(len, self.splits.values()), initial=0), strict=False))
        ranges = self._ranges(split)
        ids = []
        for name, start, stop in ranges:
            chosen = np.sort(self.orders[name][start:stop]) if name in self.orders else np.arange(start, stop)
            ids.append(starts[name] + chosen.astype(np.int64))
        ids = np.concatenate(ids)
        if not len(ids):
            sizes = ", ".join(f"{name} has {len(records):,}" for name, records in self.splits.items())
            raise UserError(f"split {split!r} of {self.spec} is empty ({sizes} records)")
        fingerprint = hash_of(self.content, ranges)
        return Source(self.spec, split, fingerprint, self.label_names, tuple(self.splits.values()), ids)

    def check_disjoint(self, splits: Mapping[str, str]) -> None:
        """Refuses splits (role -> expression; "" is skipped) that share records.

        Raises:
          UserError: two of them overlap; names both and how much they share.
        """
        ranges = {role: self._ranges(split) for role, split in splits.items() if split}
        for one, other in itertools.combinations(ranges, 2):
            pairs = itertools.product(ranges[one], ranges[other])
            shared = sum(max(0, min(a[2], b[2]) - max(a[1], b[1])) for a, b in pairs if a[0] == b[0])
            if shared:
                raise UserError(
                    f"{one} split {splits[one]!r} and {other} split {splits[other]!r} of {self.spec} "
                    f"share {shared:,} records; slice them apart, e.g. train[:98%] and train[98%:]"
                )

    def _ranges(self, split: str) -> list[tuple[str, int, int]]:
        """Resolves a split expression into ``(split name, start, stop)``, in its order."""
        import tensorflow_datasets as tfds

        try:
            instruction = tfds.core.ReadInstruction.from_spec(split)
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            example = "train, train[:98%], train[2000:] or train[:50%]+validation"
            raise UserError(f"bad split {split!r} for {self.spec}; expected a TFDS slice such as {example}") from error
        for part in split.split("+"):
            name = part.partition("[")[0].strip()
            if name not in self.splits and name != "all":
                raise UserError(f"{self.spec} has no split {name!r}; {nearest(name, self.splits)}")
        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=[len(r)], num_bytes=0) for name, r in self.splits.items()
        }
        try:
            absolute = instruction.to_absolute(infos)
        except ValueError as error:
            raise UserError(f"split {split!r} of {self.spec}: {str(error).splitlines()[0]}") from error
        return [(a.splitname, a.from_ or 0, len(self.splits[a.splitname]) if a.to is None else a.to) for a in absolute]


def open_source(
    spec: str,
    split: str,
    *,
    text_field: str = "text",
    label_field: str = "label",
    cache_dir: str | os.PathLike[str],
    tfds_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Opens one slice of a source; several are cheaper from one `open_collection`, whose arguments these are.

    Raises:
      UserError: as `open_collection` and `Collection.slice`.
    """
    collection = open_collection(
        spec, text_field=text_field, label_field=label_field, cache_dir=cache_dir, tfds_dir=tfds_dir
    )
    return collection.slice(split)


def check_disjoint(spec: str, splits: Mapping[str, str], **options: Any) -> None:
    """`Collection.check_disjoint` for a spec; ``options`` are those of `open_collection`."""
    open_collection(spec, **options).check_disjoint(splits)


def open_collection(
    spec: str,
    *,
    text_field: str = "text",
    label_field: str = "label",
    cache_dir: str | os.PathLike[str],
    tfds_dir: str | os.PathLike[str] | None = None,
) -> Collection:
    """Opens everything a spec names.

    Labels are optional, but a ``label_field`` that is not the default has to be there. ``text:`` has none. In files
    they become ids by sorted order over the whole file set (numeric where all are integers), so that slices agree.

    Raises:
      UserError: an unknown form, no matching or an empty or unreadable file, a missing field, a dataset not prepared.
    """
    scheme, _, rest = spec.partition(":")
    if spec == "python_docs":
        from sslx.data import python_docs

        builder = python_docs.python_docs(cache_dir)
        return _open_tfds(spec, builder, python_docs.fingerprint(), text_field, label_field)
    if scheme == "tfds" and rest:
        return _open_tfds(spec, _prepared_builder(rest, tfds_dir), "", text_field, label_field)
    if scheme not in SUFFIXES or not rest:
        raise UserError(f"unknown data source {spec!r}; {nearest(spec, SPEC_FORMS)}")
    paths = _matching_files(spec, rest, SUFFIXES[scheme])
    records = FileRecords(paths, text_field, label_field if scheme != "text" else "")
    if scheme != "text" and label_field != "label" and records.label_names is None:
        raise UserError(f"{paths[0]}: no field {label_field!r} for labels")
    order = np.random.default_rng(SLICE_SEED).permutation(len(records))
    content = hash_of("files", text_field, label_field, _content_of(paths))
    return Collection(spec, content, records.label_names, {"train": records}, {"train": order})


def hash_of(*parts: Any) -> str:
    """Returns a 16-hex-digit name for JSON-like parts: what a cache key or a fingerprint is made of."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


# --- TFDS -------------------------------------------------------------------------------------------------------------


def _prepared_builder(name: str, tfds_dir: str | os.PathLike[str] | None) -> Any:
    """Finds a prepared dataset by its files alone: neither its generating code nor the network is touched."""
    import tensorflow_datasets as tfds

    folder = str(Path(tfds_dir).expanduser()) if tfds_dir else None
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except (tfds.core.DatasetNotFoundError, ValueError, FileNotFoundError) as error:
        where = folder or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        root = Path(where).expanduser()
        ready = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise UserError(
            f"TFDS dataset {name!r} is not prepared in {where} ({nearest(name, ready)}); prepare it with: "
            f"tfds build {name} --file_format=array_record --data_dir={where}"
        ) from error


def _open_tfds(spec: str, builder: Any, content: str, text_field: str, label_field: str) -> Collection:
    features = builder.info.features
    if text_field not in features:
        raise UserError(f"{spec} has no field {text_field!r}; {nearest(text_field, features)}")
    if label_field not in features and label_field != "label":
        raise UserError(f"{spec} has no field {label_field!r}; {nearest(label_field, features)}")
    fields = {"text": text_field} | ({"label": label_field} if label_field in features else {})
    infos = builder.info.splits
    try:
        splits = {name: TfdsRecords(spec, builder.as_data_source(split=name), fields) for name in infos}
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{spec} is stored as {builder.info.file_format.value}, which has no random access; prepare it with "
            f"tfds build {builder.name} --file_format=array_record"
        ) from error
    names = getattr(features[label_field], "names", None) if "label" in fields else None
    described = {name: [i.num_examples, i.num_bytes, list(i.shard_lengths)] for name, i in infos.items()}
    content = hash_of("tfds", builder.info.full_name, content, described, fields)
    return Collection(spec, content, tuple(names) if names else None, splits, {})


class TfdsRecords:
    """One TFDS split through its random-access data source."""

    def __init__(self, spec: str, data_source: Any, fields: Mapping[str, str]):
        self._spec, self._data_source, self._fields = spec, data_source, fields

    def __len__(self) -> int:
        return len(self._data_source)

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        rows = []
        for record, example in zip(ids, self._data_source.__getitems__(ids), strict=True):
            text = example[self._fields["text"]]
            text = text if isinstance(text, str) else decoded(bytes(text), f"{self._spec}, record {record}")
            row = {"text": text}
            if "label" in self._fields:
                row["label"] = int(example[self._fields["label"]])
            rows.append(row)
        return rows


# --- files ------------------------------------------------------------------------------------------------------------


def _matching_files(spec: str, pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        found = glob.glob(os.path.join(glob.escape(pattern), "**", "*"), recursive=True)
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


def _content_of(paths: list[str]) -> list[Any]:
    stats = [os.stat(path) for path in paths]
    if sum(stat.st_size for stat in stats) > HASHED_BYTES:
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]
    digests = []
    for path in paths:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return digests


def decoded(data: bytes, where: str, offset: int = 0) -> str:
    """Decodes UTF-8, without a byte order mark. Raises UserError with ``where`` and the byte that is not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {offset + error.start:,}") from error


class FileRecords:
    """Documents of many files as one list; a few files are kept open at a time, so reading in order is fastest."""

    def __init__(self, paths: list[str], text_field: str, label_field: str):
        for path in paths:
            if os.path.getsize(path) == 0:
                raise UserError(f"{path} is an empty file")
        self._paths = paths
        self._open = functools.lru_cache(maxsize=4)(
            lambda f: _READERS[Path(paths[f]).suffix.lower()](paths[f], text_field)
        )
        counts, labels = [], []
        for number, path in enumerate(paths):
            reader = self._open(number)
            if len(reader) == 0:
                raise UserError(f"{path} holds no records")
            counts.append(len(reader))
            if label_field:
                labels.append(reader.labels(label_field))
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.label_names, self._labels = None, None
        if any(label is not None for label in labels):
            for path, label in zip(paths, labels, strict=True):
                if label is None:
                    raise UserError(f"{path} has no field {label_field!r} for labels, but other files of the source do")
            flat = [label for file in labels for label in file]
            names = sorted(set(flat))
            if all(name.lstrip("-").isdecimal() for name in names):
                names.sort(key=int)
            number_of = {name: i for i, name in enumerate(names)}
            self.label_names = tuple(names)
            self._labels = np.array([number_of[name] for name in flat], dtype=np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

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
            for place, text in zip(places.tolist(), texts, strict=True):
                rows[place] = {"text": text}
        if self._labels is not None:
            for row, label in zip(rows, self._labels[records].tolist(), strict=True):
                row["label"] = label
        return rows


class _TextFile:
    """A .txt file: one document."""

    def __init__(self, path: str, text_field: str):
        self._path = path

    def __len__(self) -> int:
        return 1

    def texts(self, rows: list[int]) -> list[str]:
        text = decoded(Path(self._path).read_bytes(), self._path)
        return [text] * len(rows)


class _JsonLinesFile:
    """A .jsonl file: line positions in memory, the file itself mapped. Blank lines are no records."""

    def __init__(self, path: str, text_field: str):
        self._path, self._text_field = path, text_field
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(self._bytes, dtype=np.uint8)
        ends = [start + np.flatnonzero(data[start : start + (1 << 26)] == 10) for start in range(0, len(data), 1 << 26)]
        ends = np.append(np.concatenate(ends), len(data))
        starts = np.concatenate([[0], ends[:-1] + 1])
        first = data[np.minimum(starts, len(data) - 1)]
        blank = (ends == starts) | ((ends == starts + 1) & (first == 13))
        self._starts, self._ends = starts[~blank], ends[~blank]

    def __len__(self) -> int:
        return len(self._starts)

    def texts(self, rows: list[int]) -> list[str]:
        return [self._text(row) for row in rows]

    def labels(self, label_field: str) -> list[str] | None:
        labels = [self._record(row).get(label_field) for row in range(len(self))]
        missing = next((row for row, label in enumerate(labels) if label is None), None)
        if missing is not None and any(label is not None for label in labels):
            raise UserError(f"{self._where(missing)}: no field {label_field!r}, but other lines have it")
        return None if missing is not None else [str(label) for label in labels]

    def _text(self, row: int) -> str:
        record = self._record(row)
        if self._text_field not in record:
            raise UserError(f"{self._where(row)}: no field {self._text_field!r}; {nearest(self._text_field, record)}")
        text = record[self._text_field]
        if not isinstance(text, str):
            raise UserError(f"{self._where(row)}: field {self._text_field!r} is not a string but {type(text).__name__}")
        # JSON may escape half a surrogate pair, which is no text and which the tokenizer refuses.
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _record(self, row: int) -> dict[str, Any]:
        start = int(self._starts[row])
        line = self._bytes[start : int(self._ends[row])]
        try:
            record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except UnicodeDecodeError:
            record = decoded(line, self._where(row), start)
        except json.JSONDecodeError as error:
            raise UserError(f"{self._where(row)}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict):
            raise UserError(f"{self._where(row)}: expected a JSON object, got {type(record).__name__}")
        return record

    def _where(self, row: int) -> str:
        return f"{self._path}:{self._bytes[: int(self._starts[row])].count(10) + 1}"


class _ParquetFile:
    """A .parquet file; the row group read last stays in memory."""

    def __init__(self, path: str, text_field: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._text_field = path, text_field
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error
        choose(text_field, self._file.schema_arrow.names, f"field of {path}")
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._column = functools.lru_cache(maxsize=1)(lambda g: self._file.read_row_group(g, columns=[text_field])[0])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def texts(self, rows: list[int]) -> list[str]:
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        texts = []
        for row, group in zip(rows, groups.tolist(), strict=True):
            text = self._column(group)[row - int(self._starts[group])].as_py()
            if not isinstance(text, str):
                raise UserError(f"{self._path}, row {row}: field {self._text_field!r} is not a string")
            texts.append(text)
        return texts


class _CsvFile:
    """A .csv file with a header line, parsed whole: labelled sets are small."""

    def __init__(self, path: str, text_field: str):
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        text = decoded(Path(path).read_bytes(), path)
        header = next(csv.reader(io.StringIO(text, newline="")), [])
        choose(text_field, header, f"field of {path}")
        parse = arrow_csv.ParseOptions(newlines_in_values=True)
        convert = arrow_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
        try:
            self._table = arrow_csv.read_csv(
                pa.BufferReader(text.encode()), parse_options=parse, convert_options=convert
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not CSV ({str(error).splitlines()[0]})") from error
        self._text_field = text_field

    def __len__(self) -> int:
        return self._table.num_rows

    def texts(self, rows: list[int]) -> list[str]:
        return self._table[self._text_field].take(rows).to_pylist()

    def labels(self, label_field: str) -> list[str] | None:
        return self._table[label_field].to_pylist() if label_field in self._table.column_names else None


_READERS = {".txt": _TextFile, ".jsonl": _JsonLinesFile, ".parquet": _ParquetFile, ".csv": _CsvFile}
