"""Sentences whose words carry tags: from CoNLL columns, JSON lines or TFDS to rows of tokens.

In: a `TaggedWordsConfig`. Out: rows ``[CLS] pieces of the words [SEP]``, in which a word's tag stands on its first
piece. A sentence is tokenised as its words joined by spaces, as text is in pretraining, and character offsets tell
which piece belongs to which word. Words beyond ``seq_len`` and words of which a tokenizer makes no piece (control
characters) carry no tag in any row; they are counted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int, Int64

from sslx.data import python_names
from sslx.data.cache import hash_of
from sslx.data.files import decoded, json_object
from sslx.data.packing import flat_ranges
from sslx.data.records import (
    Parser,
    PreparedRecords,
    Record,
    RecordsConfig,
    all_records,
    open_records,
)
from sslx.data.rows import RowOrder
from sslx.data.text import entropy, sources_and_tokenizer
from sslx.data.tokenizer import vocabulary
from sslx.data.tokens import encoding_backend
from sslx.errors import MissingField, UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONLL_SUFFIXES = (".txt", ".conll", ".tsv", ".bio", ".iob", ".iob2", ".train", ".testa", ".testb")
NO_TAG = -1


@dataclass(frozen=True)
class TaggedWordsConfig(RecordsConfig):
    """``config.data`` of token tagging: ``python_names``, ``conll:GLOB``, ``jsonl:GLOB`` or ``tfds:NAME[/CONFIG]``."""

    tokens_field: str = "tokens"  # of jsonl and tfds
    tags_field: str = "tags"  # tfds:conll2003 has ner, pos and chunks
    tag_column: int = -1  # of conll, whose first column is the word; -1: the last


class TaggedRows:
    """A sentence a row, numbered from ``first_sentence``. ``tags`` are class ids by sentence, or None (not known)."""

    def __init__(
        self,
        sentences: Sequence[Sequence[str]],
        tags: Sequence[Sequence[int]] | None,
        tokenizer: PreTrainedTokenizerFast,
        seq_len: int,
        first_sentence: int = 0,
    ):
        self.seq_len, self._vocabulary = seq_len, vocabulary(tokenizer)
        self.first_sentence, self.tags = first_sentence, tags
        backend = encoding_backend(tokenizer.backend_tokenizer.to_str())
        encodings = backend.encode_batch([" ".join(words) for words in sentences], add_special_tokens=False)
        tokens, first, offsets = [], [], [0]
        self.words_cut, self.words_without_pieces = 0, 0
        for words, encoding in zip(sentences, encodings, strict=True):
            words_of_first = _first_pieces(words, encoding.offsets)
            kept = min(len(encoding.ids), seq_len - 2)
            self.words_cut += sum(word != NO_TAG for word in words_of_first[kept:])
            self.words_without_pieces += len(words) - sum(word != NO_TAG for word in words_of_first)
            tokens += encoding.ids[:kept]
            first += words_of_first[:kept]
            offsets.append(len(tokens))
        self._tokens, self._first = np.array(tokens, np.int32), np.array(first, np.int32)
        self._offsets, self._tags = np.array(offsets, np.int64), np.full(len(tokens), NO_TAG, np.int32)
        if tags is not None:
            starts = np.cumsum([0, *map(len, tags)])[:-1]
            sentence = np.repeat(np.arange(len(sentences)), np.diff(self._offsets))
            carrying = self._first != NO_TAG
            flat = np.fromiter(itertools.chain.from_iterable(tags), np.int32)
            self._tags[carrying] = flat[starts[sentence[carrying]] + self._first[carrying]]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, with [CLS] and [SEP]."""
        return len(self._tokens) + 2 * len(self)

    @property
    def tag_counts(self) -> Int64[np.ndarray, " tags"]:
        """How often each tag is to be predicted."""
        return np.bincount(self._tags[self._tags != NO_TAG])

    def order(self, seed: int) -> RowOrder:
        """Returns the order in which training takes the rows."""
        return RowOrder(len(self), seed)

    def words_at(self, row: int) -> Int[np.ndarray, " length"]:
        """The word whose first piece stands at each place of a row, or `NO_TAG`."""
        words = np.full(self.seq_len, NO_TAG, np.int32)
        start, stop = self._offsets[row : row + 2]
        words[1 : 1 + stop - start] = self._first[start:stop]
        return words

    def fetch(self, row_ids: Int64[np.ndarray, " n"]) -> Mapping[str, Int[np.ndarray, "n ..."]]:
        """Reads rows.

        Returns:
          int32 arrays. ``[n, seq_len]``: ``tokens``, ``segment_ids``, ``positions``, and ``tags``, `NO_TAG` where none
          is asked. ``[n]``: ``sentence``, its number.
        """
        row_ids = np.asarray(row_ids, np.int64)
        start, lengths = self._offsets[row_ids], np.diff(self._offsets)[row_ids]
        source = flat_ranges(start, lengths)
        row, column = np.repeat(np.arange(len(row_ids)), lengths), source - np.repeat(start, lengths) + 1
        shape, places = (len(row_ids), self.seq_len), np.arange(self.seq_len)
        tokens, tags = np.full(shape, self._vocabulary.pad_id, np.int32), np.full(shape, NO_TAG, np.int32)
        tokens[:, 0] = self._vocabulary.cls_id
        tokens[row, column], tags[row, column] = self._tokens[source], self._tags[source]
        tokens[np.arange(len(row_ids)), lengths + 1] = self._vocabulary.sep_id
        real = places < (lengths + 2)[:, None]
        positions = np.where(real, places, 0).astype(np.int32)
        batch = {"tokens": tokens, "segment_ids": real.astype(np.int32), "positions": positions, "tags": tags}
        return batch | {"sentence": (self.first_sentence + row_ids).astype(np.int32)}


def abstract_tagged_row(seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one row as ``TaggedRows.fetch`` gives it, without the axis of rows."""
    names = ("tokens", "segment_ids", "positions", "tags")
    row = {name: jax.ShapeDtypeStruct((seq_len,), np.int32) for name in names}
    return row | {"sentence": jax.ShapeDtypeStruct((), np.int32)}


def prepare_tagged_words(
    config: TaggedWordsConfig, tokenizer_override: str | None = None
) -> tuple[PreparedRecords, tuple[str, ...]]:
    """Prepares train, eval and, if asked for, test rows, and the names of the tags, sorted; no two sentences share a
    number.

    Raises:
      UserError: whatever the source, the splits or the tokenizer do not allow.
    """
    reads = (config.tokens_field, config.tags_field, config.tag_column)
    embedded = {python_names.NAME: python_names.python_names}
    collection = open_records(config, _parsers(config), functools.partial(_from_tfds, config), reads, embedded)
    sources, tokenizer = sources_and_tokenizer(config, collection, tokenizer_override)
    words = vocabulary(tokenizer)
    records = {role: all_records(source) for role, source in sources.items()}
    # Of everything the source holds, so that slices agree on the numbers.
    everything = itertools.chain.from_iterable(part.read(list(range(len(part)))) for part in collection.splits.values())
    names = tuple(sorted(set(itertools.chain.from_iterable(record["tags"] for record in everything))))
    number = {name: i for i, name in enumerate(names)}
    rows, statistics, taken = {}, {}, 0
    for role in sorted(records, key=("eval", "test", "train").index):
        found = [record for record in records[role] if record["words"]]
        if not found:
            raise UserError(f"split {sources[role].split!r} of {config.source} has no word in it")
        tags = [[number[tag] for tag in record["tags"]] for record in found]
        rows[role] = TaggedRows([record["words"] for record in found], tags, tokenizer, config.seq_len, taken)
        taken += len(rows[role])
        statistics |= {
            f"{role}_split": sources[role].split,
            f"{role}_rows": len(rows[role]),
            f"{role}_words": sum(map(len, tags)),
            f"{role}_tokens": rows[role].num_tokens,
            f"{role}_words_cut": rows[role].words_cut,
            f"{role}_words_without_pieces": rows[role].words_without_pieces,
        }
        lost = {"beyond config.data.seq_len": rows[role].words_cut, "without a piece": rows[role].words_without_pieces}
        for why, count in lost.items():
            if count:
                print(
                    f"{role}: {count:,} of {statistics[f'{role}_words']:,} words are {why} and get no tag", flush=True
                )
    statistics["unread_splits"] = collection.unread(source.split for source in sources.values())
    statistics["tokens_per_row"] = statistics["train_tokens"] / statistics["train_rows"]
    statistics["tag_entropy"] = entropy(rows["eval"].tag_counts)
    fingerprints = {role: source.fingerprint for role, source in sources.items()}
    statistics["fingerprint"] = hash_of("tagged words", fingerprints, words.fingerprint, config.seq_len, names)
    prepared = PreparedRecords(
        rows["train"], rows["eval"], rows.get("test"), tokenizer, words, statistics, {"labels.json": names}
    )
    return prepared, names


def as_word(item: Any, where: str) -> str:
    """A word or a tag as JSON has it, a string or a number.

    Raises:
      UserError: it is neither; says ``where``.
    """
    if isinstance(item, bool) or not isinstance(item, str | int | float):
        kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
        raise UserError(f"{where} is {kinds.get(type(item), type(item).__name__)}; expected a string or a number")
    return str(item)


def _first_pieces(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each token of the joined words, the word whose first piece it is, or `NO_TAG`."""
    ends = np.cumsum([len(word) + 1 for word in words]).tolist()  # beyond the space behind each word
    first, word, seen = [], 0, -1
    for start, stop in offsets:
        # A token may begin with the space before its word; its last character is the word's own.
        while word + 1 < len(words) and stop > ends[word]:
            word += 1
        is_space = stop == ends[word] and start == stop - 1 and word + 1 < len(words)
        first.append(word if word != seen and not is_space and stop > start else NO_TAG)
        seen = word if first[-1] != NO_TAG else seen
    return first


def _parsers(config: TaggedWordsConfig) -> dict[str, Parser]:
    return {
        "conll": Parser(CONLL_SUFFIXES, functools.partial(_read_conll, tag_column=config.tag_column)),
        "jsonl": Parser((".jsonl",), functools.partial(_read_json_lines, config=config)),
    }


def _record(words: list[str], tags: list[str]) -> Record:
    return {"text": " ".join(words), "words": words, "tags": tags}


def _lines(path: str) -> list[str]:
    with open(path, "rb") as file:
        return decoded(file.read(), path).split("\n")


def _read_conll(path: str, tag_column: int) -> list[Record]:
    records, words, tags = [], [], []
    for number, line in enumerate([*_lines(path), ""], 1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            if not -len(columns) <= tag_column < len(columns) or len(columns) < 2:
                wanted = "a word and a tag" if tag_column == -1 else f"a column {tag_column} (config.data.tag_column)"
                raise UserError(f"{path}:{number}: expected {wanted}, got {line.strip()[:60]!r}")
            words.append(columns[0])
            tags.append(columns[tag_column])
        elif words:
            records.append(_record(words, tags))
            words, tags = [], []
    return records


def _read_json_lines(path: str, config: TaggedWordsConfig) -> list[Record]:
    lines = enumerate(_lines(path), 1)
    return [_of_json(line, f"{path}:{number}", config) for number, line in lines if line.strip()]


def _fields(config: TaggedWordsConfig) -> dict[str, str]:
    """The fields of a record, and the keys of the config that name them."""
    return {config.tokens_field: "config.data.tokens_field", config.tags_field: "config.data.tags_field"}


def _of_json(line: str, where: str, config: TaggedWordsConfig) -> Record:
    given = json_object(line, lambda: where)
    lists = []
    for name, key in _fields(config).items():
        if name not in given:
            raise MissingField(f"{where}: no field {name!r}; {nearest(name, given)}", key)
        if not isinstance(given[name], list):
            raise UserError(f"{where}: field {name!r} is no list but {type(given[name]).__name__}")
        lists.append([as_word(item, f"{where}: {name}[{i}]") for i, item in enumerate(given[name])])
    words, tags = lists
    if len(words) != len(tags):
        raise UserError(f"{where}: {len(words)} tokens and {len(tags)} tags; expected a tag for each token")
    return _record(words, tags)


def _from_tfds(
    config: TaggedWordsConfig, spec: str, features: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], Record]:
    for name, key in _fields(config).items():
        if name not in features:
            raise MissingField(f"{spec} has no field {name!r}; {nearest(name, features)}", key)
    names = getattr(getattr(features[config.tags_field], "feature", None), "names", None)
    if names is None:
        raise UserError(f"{spec}: field {config.tags_field!r} is no sequence of class labels")

    def convert(example: Mapping[str, Any]) -> Record:
        words = [word if isinstance(word, str) else decoded(bytes(word), spec) for word in example[config.tokens_field]]
        return _record(words, [names[int(tag)] for tag in example[config.tags_field]])

    return convert
