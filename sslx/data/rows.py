"""Rows of token ids by row number, and the order in which training takes them.

In: a tokenised corpus and a plan over it. Out: NumPy batches of any rows asked for, without a Python loop over rows or
pieces. `RowOrder` is the shuffling: row ids as a pure function of the seed and the global position, so that the step
number is all the state a resumed run needs.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Int, Int64

from sslx.data.packing import Plan, flat_ranges
from sslx.data.tokenizer import Vocabulary
from sslx.data.tokens import TokenCorpus


class TextRows:
    """Random access to the rows of a plan. ``labels`` are the documents', int32 or float32, where a row is one."""

    def __init__(self, corpus: TokenCorpus, plan: Plan, vocabulary: Vocabulary, labels: np.ndarray | None = None):
        self.corpus, self.plan, self._vocabulary, self._labels = corpus, plan, vocabulary, labels

    def __len__(self) -> int:
        return self.plan.num_rows

    @property
    def seq_len(self) -> int:
        return self.plan.seq_len

    def order(self, seed: int) -> RowOrder:
        """Returns the order in which training takes the rows."""
        return RowOrder(len(self), seed)

    def fetch(self, row_ids: Int64[np.ndarray, " n"]) -> Mapping[str, Int[np.ndarray, "n ..."]]:
        """Reads rows.

        Returns:
          int32 arrays (a ``label`` may be float32). ``[n, seq_len]``: ``tokens`` (pad id where padded), ``segment_ids``
          (1, 2, … per packed piece, 0 where padded) and ``positions`` (from 0 in each piece); for pairs (one segment,
          positions running through) ``token_types`` too; for a causal plan ``targets``, the next token of each.
          ``[n]``: ``sentence_label`` for sentence pairs, ``label`` for labelled documents and pairs of texts.

        Raises:
          IndexError: a row id is beyond the rows.
        """
        plan, words, paired = self.plan, self._vocabulary, self.plan.separators > 0
        causal = plan.opens is not None
        row_ids = np.asarray(row_ids, dtype=np.int64)
        shape, first = (len(row_ids), self.seq_len), plan.row_offsets[row_ids]
        per_row = plan.row_offsets[row_ids + 1] - first

        # One entry a piece: where it starts in its row, and its length with what stands before it (the head: [CLS], or
        # all separators of a pair but the first) and its [SEP]. Of a causal plan, places of the corpus are those of the
        # targets, and tokens come from the place before.
        piece = flat_ranges(first, per_row)
        row, slot = np.repeat(np.arange(len(row_ids)), per_row), piece - np.repeat(first, per_row)
        head = np.where(slot == 0, 1, plan.separators - 1) if paired else np.ones_like(slot)
        total = plan.piece_length[piece] + (0 if causal else head + 1)
        end = np.cumsum(total)
        begin = end - total
        offset = begin - np.repeat(begin[np.cumsum(per_row) - per_row], per_row)

        # One entry a token.
        flat = np.arange(end[-1] if len(end) else 0)
        source = flat + np.repeat(plan.piece_start[piece] - head - begin, total)
        place = flat + np.repeat(row * self.seq_len + offset - begin, total)

        # A special token's source is outside its piece, maybe outside the corpus; it is overwritten.
        def corpus_at(places: np.ndarray) -> np.ndarray:
            return self.corpus.tokens[np.clip(places, 0, len(self.corpus.tokens) - 1)].astype(np.int32)

        values = corpus_at(source)
        if causal:
            values[begin[plan.opens[piece]]] = words.cls_id
        else:
            values[begin[head > 0]] = np.where(paired & (slot[head > 0] > 0), words.sep_id, words.cls_id)
            values[end - 1] = words.sep_id

        def laid_out(entries: np.ndarray, padding: int = 0) -> np.ndarray:
            array = np.full(shape, padding, np.int32)
            array.ravel()[place] = entries
            return array

        batch = {"tokens": laid_out(values, words.pad_id)}
        if paired:
            batch["segment_ids"] = laid_out(np.ones_like(values))
            batch["positions"] = laid_out(flat + np.repeat(offset - begin, total))
            batch["token_types"] = laid_out(np.repeat(slot, total))
            if plan.sentence_label is not None:
                batch["sentence_label"] = plan.sentence_label[row_ids]
        else:
            batch["segment_ids"] = laid_out(np.repeat(slot + 1, total))
            batch["positions"] = laid_out(flat - np.repeat(begin, total))
        if causal:
            targets = corpus_at(source + 1)
            targets[end[plan.closes[piece]] - 1] = words.sep_id
            batch["targets"] = laid_out(targets, words.pad_id)
        if self._labels is not None:
            batch["label"] = self._labels[row_ids]
        return batch


def abstract_row(
    seq_len: int, layout: str, *, label: type | None = None, paired: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one row as ``TextRows.fetch`` gives it, without the axis of rows; ``label`` is its type, if any."""
    paired = paired or layout in ("nsp", "sop")
    names = ["tokens", "segment_ids", "positions"] + (["token_types"] if paired else [])
    names += ["targets"] if layout == "causal" else []
    row = {name: jax.ShapeDtypeStruct((seq_len,), np.int32) for name in names}
    if layout in ("nsp", "sop"):
        row["sentence_label"] = jax.ShapeDtypeStruct((), np.int32)
    if label is not None:
        row["label"] = jax.ShapeDtypeStruct((), label)
    return row


class RowOrder:
    """Endless epochs over ``num_rows`` rows, each a permutation of its own.

    Grain computes the place of one row without knowing the others, in about 20 µs, but walks cycles in a space of at
    least 2**16 places: with fewer rows a whole epoch still costs some 40 ms, so only toy corpora pay much for a row.
    """

    def __init__(self, num_rows: int, seed: int):
        import grain

        self._num_rows = num_rows
        # `.seed` and not `shuffle(seed=)`: there the second epoch of seed 0 is the first of seed 1.
        self._order = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()

    def rows_at(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Returns the row at each position of the sequence; pure, and random access to any epoch."""
        return np.array([self._order[position] for position in np.asarray(positions).tolist()], dtype=np.int64)
