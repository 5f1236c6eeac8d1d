"""Sentences in several views, and pairs of sentences with a score of how similar they are.

In: a text config, and the fields of a record that hold its other texts. Out: rows of one text each, with those of the
other fields beside it under a prefix; held-out rows begin with the sentences of the scored pairs, if there are any, so
that evaluation embeds them with the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int, Int64

from sslx.data.batches import RandomAccessRows, RowOrder
from sslx.data.cache import cache_folder, hash_of
from sslx.data.packing import documents_plan
from sslx.data.rows import TextRows, abstract_row
from sslx.data.sources import open_collection
from sslx.data.text import PreparedText, TextConfig, prepare_text
from sslx.data.tokens import tokenize_corpus
from sslx.errors import MissingField, UserError

PAIR, NEGATIVE = "pair_", "negative_"  # prefixes of the arrays of a record's other texts
NAMES = ("tokens", "segment_ids", "positions")


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Pairs of sentences: their rows, and how similar people find them."""

    first: TextRows
    second: TextRows
    scores: Float32[np.ndarray, " pairs"]
    fingerprint: str


class SentenceRows:
    """Rows of records seen through one or more fields; in front of them, two rows for each of the scored pairs.

    ``fetch`` gives, by prefix (`PAIR`, `NEGATIVE` or none), ``tokens``, ``segment_ids`` and ``positions``, and int32[n]
    ``scored``: 0 for a row of a record, ``i + 1`` for sentence ``i`` of the pairs (``2 k`` and ``2 k + 1`` are pair
    ``k``), whose other views are the sentence itself.
    """

    def __init__(self, views: Mapping[str, RandomAccessRows], pairs: ScoredPairs | None = None):
        self._views, self._pairs = views, pairs
        self._front = 2 * len(pairs.scores) if pairs is not None else 0

    def __len__(self) -> int:
        return self._front + len(self._views[""])

    def order(self, seed: int) -> RowOrder:
        """Returns the order in which training takes the rows, of records alone."""
        assert not self._front
        return self._views[""].order(seed)

    def fetch(self, row_ids: Int64[np.ndarray, " n"]) -> Mapping[str, Int[np.ndarray, "n ..."]]:
        """Reads rows."""
        ids = np.asarray(row_ids, np.int64)
        batch: dict[str, np.ndarray] = {}

        def place(name: str, where: np.ndarray, rows: np.ndarray) -> None:
            if name not in batch:
                batch[name] = np.zeros((len(ids), *rows.shape[1:]), np.int32)
            batch[name][where] = rows

        (records,) = np.nonzero(ids >= self._front)
        for prefix, view in self._views.items():
            if len(records):
                found = view.fetch(ids[records] - self._front)
                for name in NAMES:
                    place(prefix + name, records, found[name])
            for side in (0, 1):
                (here,) = np.nonzero((ids < self._front) & (ids % 2 == side))
                if len(here):
                    found = (self._pairs.second if side else self._pairs.first).fetch(ids[here] // 2)
                    for name in NAMES:
                        place(prefix + name, here, found[name])
        return batch | {"scored": np.where(ids < self._front, ids + 1, 0).astype(np.int32)}


def abstract_sentence_row(seq_len: int, prefixes: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one row as ``SentenceRows.fetch`` gives it, without the axis of rows."""
    row = abstract_row(seq_len, "documents")
    named = {prefix + name: row[name] for prefix in prefixes for name in NAMES}
    return named | {"scored": jax.ShapeDtypeStruct((), np.int32)}


def prepare_sentences(
    config: TextConfig, fields: Mapping[str, str], scored: str, tokenizer_override: str | None = None
) -> tuple[PreparedText, ScoredPairs | None]:
    """Prepares rows of sentences.

    Args:
      config: The records; ``config.text_field`` is the text itself.
      fields: The fields of the records' other texts, by prefix.
      scored: Source of the scored pairs (fields ``text``, ``text2`` and ``score``), or "".
      tokenizer_override: As for `prepare_text`.

    Raises:
      UserError: as `prepare_text`; a record lacks one of its texts; scores are no numbers.
    """
    data = prepare_text(config, layout="documents", tokenizer_override=tokenizer_override)
    views = {"": data}
    for prefix, name in fields.items():
        other = dataclasses.replace(config, text_field=name)
        try:
            views[prefix] = prepare_text(
                other, layout="documents", tokenizer_override=tokenizer_override or data.tokenizer.name_or_path
            )
        except MissingField as error:
            raise MissingField(error.said, f"config.task.{prefix}field") from None
    roles = [role for role in ("train", "eval", "test") if getattr(data, role) is not None]
    if fields:
        # Empty documents are left out, and what follows would be paired with the wrong text.
        for prefix, name in {"": config.text_field, **fields}.items():
            empty = sum(views[prefix].statistics[f"{role}_skipped_documents"] for role in roles)
            if empty:
                raise UserError(f"{config.source}: field {name!r} is empty in {empty:,} records; expected whole pairs")
    pairs = _scored_pairs(scored, config, data) if scored else None
    rows = {
        role: SentenceRows(
            {prefix: getattr(view, role) for prefix, view in views.items()}, None if role == "train" else pairs
        )
        for role in roles
    }
    fingerprints = [view.statistics["fingerprint"] for view in views.values()]
    statistics = data.statistics | {"scored_pairs": 0 if pairs is None else len(pairs.scores)}
    statistics["fingerprint"] = hash_of("sentences", fingerprints, pairs.fingerprint if pairs is not None else "")
    return dataclasses.replace(data, **rows, statistics=statistics), pairs


def _scored_pairs(spec: str, config: TextConfig, data: PreparedText) -> ScoredPairs:
    made: list[TextRows] = []
    corpora: list[Any] = []
    for name in ("text", "text2"):
        where = cache_folder(config.cache_dir)
        try:
            collection = open_collection(
                spec, text_field=name, label_field="score", label_type="number", cache_dir=where
            )
            corpus = tokenize_corpus(collection.slice("train"), data.tokenizer, cache_dir=where)
        except MissingField as error:
            raise UserError(f"{error.said}; config.task.sts is read from text, text2 and score") from None
        if corpus.skipped_documents:
            raise UserError(f"{spec}: field {name!r} is empty in {corpus.skipped_documents:,} records")
        corpora.append(corpus)
        made.append(TextRows(corpus, documents_plan(corpus.document_offsets, config.seq_len), data.vocabulary))
    return ScoredPairs(*made, corpora[0].labels, hash_of([corpus.fingerprint for corpus in corpora]))
