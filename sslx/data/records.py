"""Records of tasks that need more than a text and a label: tagged words, questions. They are held in memory.

In: a source spec whose scheme one of the task's parsers reads, the name of a set that the task makes from what is
installed (`Embedded`), or a prepared TFDS dataset. Out: a `Collection` that is sliced as any other, and what an
objective and the loop need of the rows made from it (`PreparedRecords`). A record is a dict with what its parser found
and ``text``, all of its text, for a tokenizer that is trained on it. Rows are made, and tokenised, at every start: they
need to know which characters a token stands for, which no cached corpus keeps.

Files are of one split or several, as `sslx.data.files.splits_of_files` reads their names.

A slice of files is a random sample of records or, where a parser says what belongs together (questions about one
context), of whole groups of them: a percentage or a number of records is then kept as nearly as groups allow, and no
group is in two slices that do not overlap. TFDS slices are TFDS's own, which cut between any two records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sslx.data.batches import RandomAccessRows
from sslx.data.cache import cache_folder, hash_of
from sslx.data.files import content_of, matching_files, splits_of_files
from sslx.data.sources import SLICE_SEED, Collection, Source, data_sources, described_splits, prepared_builder
from sslx.data.text import MIN_SEQ_LEN
from sslx.data.tokenizer import Vocabulary
from sslx.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Record = dict[str, Any]


@dataclass(frozen=True)
class RecordsConfig:
    """What ``config.data`` of these tasks has in common."""

    source: str = ""
    train_split: str = "train"  # TFDS slices, also for files
    eval_split: str = "validation"
    test_split: str = ""  # "" = none
    tokenizer: str = "wordpiece"  # where no run gives one; as for text
    vocab_size: int = 8192
    lowercase: bool = True
    seq_len: int = 128
    cache_dir: str = ""  # of an embedded set and of a tokenizer that is trained; "" = $SSLX_CACHE or ~/.cache/sslx
    tfds_dir: str = ""  # "" = TFDS's own default

    def __post_init__(self):
        if self.seq_len < MIN_SEQ_LEN:
            raise UserError(f"config.data.seq_len={self.seq_len} is too short; expected at least {MIN_SEQ_LEN}")


@dataclass(frozen=True)
class Parser:
    """How the files of one scheme are read: their suffixes, and a function from a path to its records.

    Records that have the same in their field ``together`` are in one slice; "" = each stands for itself.
    The function raises UserError where a file is not what it should be, with its line if it has lines.
    """

    suffixes: tuple[str, ...]
    read: Callable[[str], list[Record]]
    together: str = ""


# Makes a set from what is installed, in a cache folder, and returns the spec of its files.
Embedded = Callable[[Path], str]


@dataclass(frozen=True, eq=False)
class PreparedRecords:
    """Rows of each role, the tokenizer, ``statistics`` (as of `PreparedText`), and JSON files that a run keeps."""

    train: RandomAccessRows
    eval: RandomAccessRows
    test: RandomAccessRows | None
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    statistics: dict[str, Any]
    kept: Mapping[str, Any] = field(default_factory=dict)  # file name -> its content

    def save(self, folder: Path) -> None:
        """Writes ``folder/tokenizer/`` and the JSON files: what readers of a run need."""
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        for name, content in self.kept.items():
            (Path(folder) / name).write_text(json.dumps(content) + "\n", encoding="utf8")


class _InMemory:
    """The records of one split of files."""

    def __init__(self, records: Sequence[Record]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, ids: list[int]) -> list[Record]:
        return [self._records[i] for i in ids]


class _FromTfds:
    """One split of a prepared dataset, each example turned into a record as it is read."""

    def __init__(self, examples: Any, convert: Callable[[Mapping[str, Any]], Record]):
        self._examples, self._convert = examples, convert

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, ids: list[int]) -> list[Record]:
        return [self._convert(example) for example in self._examples.__getitems__(ids)]


def open_records(
    config: RecordsConfig,
    parsers: Mapping[str, Parser],
    from_tfds: Callable[[str, Mapping[str, Any]], Callable[[Mapping[str, Any]], Record]],
    reads: Sequence[str | int] = (),
    embedded: Mapping[str, Embedded] = MappingProxyType({}),
) -> Collection:
    """Opens everything that ``config.source`` names.

    Args:
      config: The source, and where TFDS keeps its datasets.
      parsers: By scheme.
      from_tfds: From a spec and its features to the function that makes a record of an example.
      reads: The fields and columns that the functions read, where a config chooses them; for the fingerprint.
      embedded: Sets that are made here, by the name that is their spec.

    Raises:
      UserError: an unknown form, no matching file, one that its parser refuses or that holds nothing, a dataset that
        is not prepared or has other features.
    """
    spec = config.source
    scheme, _, rest = spec.partition(":")
    forms = [*embedded, *(f"{name}:GLOB" for name in parsers), "tfds:NAME[/CONFIG]"]
    if not spec:
        raise UserError(f"config.data.source is empty; expected one of {', '.join(forms)}")
    if scheme == "tfds" and rest:
        builder = prepared_builder(rest, config.tfds_dir or None)
        convert = from_tfds(spec, builder.info.features)
        splits = {name: _FromTfds(examples, convert) for name, examples in data_sources(spec, builder).items()}
        content = hash_of("tfds records", builder.info.full_name, described_splits(builder), reads)
        return Collection(spec, content, None, splits, {})
    if spec in embedded:
        scheme, _, rest = embedded[spec](cache_folder(config.cache_dir)).partition(":")
    if scheme not in parsers or not rest:
        raise UserError(f"unknown data source {spec!r}; {nearest(f'{scheme}:GLOB' if rest else spec, forms)}")
    parser = parsers[scheme]
    paths = matching_files(spec, rest, parser.suffixes)
    found: dict[str, list[Record]] = {}
    split_of_file = splits_of_files(paths)
    for path, split in zip(paths, split_of_file, strict=True):
        found.setdefault(split, []).extend(parser.read(path))
    for split, records in found.items():
        if not records:
            raise UserError(f"{spec} holds no records for split {split!r}")
    ordered = {name: _ordered(records, parser.together) for name, records in found.items()}
    orders = {name: order for name, (order, _) in ordered.items()}
    edges = {name: edges for name, (_, edges) in ordered.items()} if parser.together else {}
    digests = list(zip(split_of_file, content_of(paths), strict=True))
    content = hash_of("records", scheme, digests, reads, parser.together)
    splits = {name: _InMemory(records) for name, records in found.items()}
    return Collection(spec, content, None, splits, orders, parser.together, edges)


def all_records(source: Source) -> list[Record]:
    """The records of a slice."""
    return source.__getitems__(range(len(source)))


def _ordered(records: Sequence[Record], together: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of records in a fixed random order, each group a block; and the places where blocks begin and end."""
    number: dict[Any, int] = {}
    keys = (record[together] if together else i for i, record in enumerate(records))
    group = np.array([number.setdefault(key, len(number)) for key in keys])
    place = np.argsort(np.random.default_rng(SLICE_SEED).permutation(len(number)))[group]
    return np.argsort(place, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(place))])
