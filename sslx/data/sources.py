"""Where documents come from: a TFDS dataset or files, opened as one random-access list of records.

In: a source spec (``python_docs``, ``tfds:NAME[/CONFIG]``, ``text:GLOB``, ``csv:GLOB``, ``jsonl:GLOB``,
``parquet:GLOB``), the fields to read and a split in TFDS slice syntax. Out: a `Source`, whose ``fingerprint`` names the
content, so that what is made from it can be cached.

Files have one split, ``train``, or those that their names say (`sslx.data.files.splits_of_files`). Which documents a
slice of one holds is decided in a fixed shuffled order, so that slices are random samples and complementary ones share
nothing; within a slice documents stay in file order, which keeps reading sequential. TFDS slices are TFDS's own.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sslx.data.cache import hash_of
from sslx.data.file_records import DocumentPart, FileRecords
from sslx.data.files import content_of, decoded, matching_files, splits_of_files
from sslx.errors import MissingField, UserError, choose, first_line, nearest

SUFFIXES = {
    "text": (".txt", ".jsonl", ".parquet"),
    "csv": (".csv",),
    "jsonl": (".jsonl",),
    "parquet": (".parquet",),
}
SPEC_FORMS = ("python_docs", "tfds:NAME[/CONFIG]", *(f"{scheme}:GLOB" for scheme in SUFFIXES), "rows:FOLDER")
SLICE_SEED = 20181011
HIDDEN = -1  # the label of each record of a benchmark's test set
HELD_OUT_FROM = 0.9  # of a source that is one document


class Records(Protocol):
    """The records of one split before slicing.

    ``read(ids)`` gives ``{"text": str, "pair": str, "label": int or float}``; the pair and the label if there are any.
    """

    def __len__(self) -> int: ...

    def read(self, ids: list[int]) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read: its text, the second text of a pair ("" = none) and its label."""

    text: str = "text"
    pair: str = ""
    label: str = "label"
    label_type: str = "class"  # | number

    @property
    def texts(self) -> dict[str, str]:
        return {"text": self.text} | ({"pair": self.pair} if self.pair else {})

    @property
    def numbers(self) -> bool:
        return self.label_type == "number"

    @property
    def rare(self) -> list[str]:
        """What a fingerprint says beyond text and label; nothing where nothing more is read."""
        return [self.pair, self.label_type] if self.pair or self.numbers else []


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
    """A whole source before slicing: opened (and hashed) once, sliced into train, eval and test.

    Where records of one ``together`` ("context") are not to be parted, ``edges`` are the places of an order, its ends
    included, at which it may be cut; a slice that would end elsewhere ends at the nearest one inside the split.
    """

    spec: str
    content: str  # hash of everything that determines what the records hold
    label_names: tuple[str, ...] | None
    splits: Mapping[str, Records] = field(repr=False)
    orders: Mapping[str, np.ndarray] = field(repr=False)  # the order slices cut, where it is not the records' own
    together: str = ""
    edges: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    def divided(self) -> Collection:
        """Of a ``train`` that is one document: its last tenth as the split ``validation``, the rest as ``train``."""
        records = self.splits["train"]
        parts = {
            **self.splits,
            "train": DocumentPart(records, 0, HELD_OUT_FROM),
            "validation": DocumentPart(records, HELD_OUT_FROM, 1),
        }
        orders = {name: order for name, order in self.orders.items() if name != "train"}
        return Collection(self.spec, hash_of(self.content, HELD_OUT_FROM), None, parts, orders)

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
            whole = f"; those of one {self.together} stay together" if self.together else ""
            raise UserError(f"split {split!r} of {self.spec} is empty ({sizes} records{whole})")
        fingerprint = hash_of(self.content, ranges)
        return Source(self.spec, split, fingerprint, self.label_names, tuple(self.splits.values()), ids)

    def parts(self, name: str) -> int:
        """Into how many slices a split can be cut."""
        return len(self.edges[name]) - 1 if name in self.edges else len(self.splits[name])

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

    def unread(self, splits: Iterable[str]) -> list[str]:
        """The splits of which these expressions read nothing, but for those whose labels are hidden."""
        read = {name for split in splits for name, _, _ in self._ranges(split)}
        others = [name for name, records in self.splits.items() if name not in read and len(records)]
        return [name for name in others if self.splits[name].read([0])[0].get("label") != HIDDEN]

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
        found = []
        for part in absolute:
            size = len(self.splits[part.splitname])
            ends = (part.from_ or 0, size if part.to is None else part.to)
            found.append((part.splitname, *(self._edge(part.splitname, end, size) for end in ends)))
        return found

    def _edge(self, name: str, place: int, size: int) -> int:
        """Where a split is cut that is to be cut at a place."""
        if name not in self.edges or place in (0, size):
            return place
        # Never at an end, if there is another edge: half a split is not to become all of it or nothing.
        inner = self.edges[name][1:-1] if self.parts(name) > 1 else self.edges[name]
        return int(inner[np.argmin(np.abs(inner - place))])


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
    pair_field: str = "",
    label_field: str = "label",
    label_type: str = "class",
    cache_dir: str | os.PathLike[str],
    tfds_dir: str | os.PathLike[str] | None = None,
) -> Collection:
    """Opens everything a spec names.

    Labels are optional, but a ``label_field`` that is not the default has to be there. ``text:`` has none. In files
    they become ids by sorted order over the whole file set (numeric where all are integers), so that slices agree; with
    ``label_type="number"`` they stay the numbers they are.

    Raises:
      UserError: an unknown form, no matching or an empty or unreadable file, a missing field, a dataset not prepared.
    """
    fields = Fields(text_field, pair_field, label_field, choose(label_type, ("class", "number"), "label type"))
    scheme, _, rest = spec.partition(":")
    if spec == "python_docs":
        from sslx.data import python_docs

        builder = python_docs.python_docs(cache_dir)
        return _open_tfds(spec, builder, python_docs.fingerprint(), fields)
    if scheme == "tfds" and rest:
        return _open_tfds(spec, prepared_builder(rest, tfds_dir), "", fields)
    if scheme == "rows" and rest:
        raise UserError(f"{spec} holds prepared rows and no documents; they are read as they are, by training alone")
    if scheme not in SUFFIXES or not rest:
        forms = {form.partition(":")[0]: form for form in SPEC_FORMS}
        close = difflib.get_close_matches(scheme, forms, n=1, cutoff=0.5)  # what follows says nothing of what was meant
        raise UserError(f"unknown data source {spec!r}; {nearest(forms[close[0]] if close else '', SPEC_FORMS)}")
    paths = matching_files(spec, rest, SUFFIXES[scheme])
    if scheme == "text" and pair_field:
        labelled = ", ".join(form for form in SPEC_FORMS if not form.startswith(("python_docs", "text", "rows")))
        raise UserError(f"{spec} is read without labels, so pairs ({pair_field!r}) mean nothing; expected {labelled}")
    records = FileRecords(paths, fields.texts, label_field if scheme != "text" else "", numbers=fields.numbers)
    if scheme != "text" and label_field != "label":
        records.require_labels(label_field)
    split_of_file = splits_of_files(paths)
    names = list(dict.fromkeys(split_of_file))
    several = names[1:]
    digests = content_of(paths)
    content = hash_of(
        "files",
        text_field,
        label_field if records.labelled else "",
        list(zip(split_of_file, digests, strict=True)) if several else digests,
        *fields.rare,
    )
    splits: dict[str, Records] = {"train": records}
    if several:
        of_split = {name: {path for path, of in zip(paths, split_of_file, strict=True) if of == name} for name in names}
        splits = {name: records.of_files(files) for name, files in of_split.items()}
    for name, part in splits.items():
        if not len(part):
            raise UserError(f"{spec} holds no records for split {name!r}")
    orders = {name: np.random.default_rng(SLICE_SEED).permutation(len(part)) for name, part in splits.items()}
    return Collection(spec, content, records.label_names, splits, orders)


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


def _open_tfds(spec: str, builder: Any, content: str, fields: Fields) -> Collection:
    features, label_field = builder.info.features, fields.label
    wanted = fields.texts | ({"label": label_field} if label_field != "label" else {})
    for name, field_name in wanted.items():
        if field_name not in features:
            said = f"{spec} has no field {field_name!r}; {nearest(field_name, features)}"
            raise MissingField(said, f"config.data.{name}_field")
    # A float is no class, and pretraining on such records needs no label.
    labelled = label_field in features and (fields.numbers or not _is_float(features[label_field]))
    read = fields.texts | ({"label": label_field} if labelled else {})
    splits = {
        name: TfdsRecords(spec, opened, read, fields.numbers) for name, opened in data_sources(spec, builder).items()
    }
    names = getattr(features[label_field], "names", None) if labelled and not fields.numbers else None
    content = hash_of("tfds", builder.info.full_name, content, described_splits(builder), read, *fields.rare[1:])
    return Collection(spec, content, tuple(names) if names else None, splits, {})


def data_sources(spec: str, builder: Any, decoders: Any = None) -> dict[str, Any]:
    """The random-access data source of each split of a prepared dataset; ``decoders`` as TFDS takes them.

    Raises:
      UserError: its file format has no random access.
    """
    try:
        return {name: builder.as_data_source(split=name, decoders=decoders) for name in builder.info.splits}
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{spec} is stored as {builder.info.file_format.value}, which has no random access; prepare it with "
            f"tfds build {builder.name} --file_format=array_record"
        ) from error


def described_splits(builder: Any) -> dict[str, list[Any]]:
    """What changes when a prepared dataset's content does, for a fingerprint."""
    return {name: [i.num_examples, i.num_bytes, list(i.shard_lengths)] for name, i in builder.info.splits.items()}


def _is_float(feature: Any) -> bool:
    return isinstance(feature.np_dtype, np.dtype | type) and np.issubdtype(feature.np_dtype, np.floating)


class TfdsRecords:
    """One TFDS split through its random-access data source."""

    def __init__(self, spec: str, data_source: Any, fields: Mapping[str, str], numbers: bool):
        self._spec, self._data_source, self._fields, self._numbers = spec, data_source, fields, numbers

    def __len__(self) -> int:
        return len(self._data_source)

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        rows = []
        for record, example in zip(ids, self._data_source.__getitems__(ids), strict=True):
            row = {}
            for name in self._fields:
                value = example[self._fields[name]]
                if name == "label":
                    row[name] = float(value) if self._numbers else int(value)
                else:
                    where = f"{self._spec}, record {record + 1}"
                    row[name] = value if isinstance(value, str) else decoded(bytes(value), where)
            rows.append(row)
        return rows
