"""Where documents come from: a TFDS dataset or files, opened as one random-access list of records.

In: a source spec (``python_docs``, ``tfds:NAME[/CONFIG]``, ``text:GLOB``, ``csv:GLOB``, ``jsonl:GLOB``) and a split in
TFDS slice syntax. Out: a `Source`, whose ``fingerprint`` names the content, so that what is made from it can be cached.

Files have one split, ``train``. Which documents a slice of it holds is decided in a fixed shuffled order, so that
slices are random samples and complementary ones share nothing; within a slice documents stay in file order, which
keeps reading sequential. TFDS slices are TFDS's own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sslx.data.cache import hash_of
from sslx.data.files import FileRecords, content_of, decoded, matching_files
from sslx.errors import UserError, first_line, nearest

SUFFIXES = {"text": (".txt", ".jsonl", ".parquet"), "csv": (".csv",), "jsonl": (".jsonl",)}
SPEC_FORMS = ("python_docs", "tfds:NAME[/CONFIG]", "text:GLOB", "csv:GLOB", "jsonl:GLOB", "rows:FOLDER")
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
            raise UserError(f"split {split!r} of {self.spec}: {first_line(error)}") from error
        return [(a.splitname, a.from_ or 0, len(self.splits[a.splitname]) if a.to is None else a.to) for a in absolute]


def open_source(spec: str, split: str, **options: Any) -> Source:
    """Opens one slice of a source; several are cheaper from one `open_collection`, whose ``options`` these are.

    Raises:
      UserError: as `open_collection` and `Collection.slice`.
    """
    return open_collection(spec, **options).slice(split)


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
        return _open_tfds(spec, prepared_builder(rest, tfds_dir), "", text_field, label_field)
    if scheme == "rows" and rest:
        raise UserError(f"{spec} holds prepared rows and no documents; they are read as they are, by training alone")
    if scheme not in SUFFIXES or not rest:
        form = f"{scheme}:GLOB" if rest else spec
        raise UserError(f"unknown data source {spec!r}; {nearest(form, SPEC_FORMS)}")
    paths = matching_files(spec, rest, SUFFIXES[scheme])
    records = FileRecords(paths, text_field, label_field if scheme != "text" else "")
    if scheme != "text" and label_field != "label" and records.label_names is None:
        raise UserError(f"{paths[0]}: no field {label_field!r} for labels")
    order = np.random.default_rng(SLICE_SEED).permutation(len(records))
    content = hash_of("files", text_field, label_field, content_of(paths))
    return Collection(spec, content, records.label_names, {"train": records}, {"train": order})


def prepared_builder(name: str, tfds_dir: str | os.PathLike[str] | None) -> Any:
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
    splits = {name: TfdsRecords(spec, opened, fields) for name, opened in data_sources(spec, builder).items()}
    names = getattr(features[label_field], "names", None) if "label" in fields else None
    content = hash_of("tfds", builder.info.full_name, content, described_splits(builder), fields)
    return Collection(spec, content, tuple(names) if names else None, splits, {})


def data_sources(spec: str, builder: Any) -> dict[str, Any]:
    """The random-access data source of each split of a prepared dataset.

    Raises:
      UserError: its file format has no random access.
    """
    try:
        return {name: builder.as_data_source(split=name) for name in builder.info.splits}
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{spec} is stored as {builder.info.file_format.value}, which has no random access; prepare it with "
            f"tfds build {builder.name} --file_format=array_record"
        ) from error


def described_splits(builder: Any) -> dict[str, list[Any]]:
    """What changes when a prepared dataset's content does, for a fingerprint."""
    return {name: [i.num_examples, i.num_bytes, list(i.shard_lengths)] for name, i in builder.info.splits.items()}


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
