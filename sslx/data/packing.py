"""Index plans: which pieces of the flat corpus make each row of ``seq_len``.

In: document offsets and a length. Out: a `Plan`, a few arrays; `rows` turns it into batches. Three layouts are here
(sentence pairs are in `pairs`):

- packed: documents are cut into pieces of at most ``seq_len - 2``, each stands as ``[CLS] piece [SEP]``, and pieces
  share rows without being cut again. Pieces are packed by best fit, longest first, on the *histogram* of their sizes
  (Krell et al., arXiv 2107.02027), so the cost of choosing does not grow with the number of documents.
- causal: every token and the end of every document is a target once. A document stands as ``[BOS] tokens`` with
  targets ``tokens [EOS]``, cut into pieces of at most ``seq_len``, which are packed in the same way.
- documents: one document a row, cut at ``seq_len - 2``; a pair of texts is cut where it is longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

ROW_SEED = 4242


@dataclass(frozen=True, eq=False)
class Plan:
    """Row ``r`` holds pieces ``row_offsets[r]:row_offsets[r + 1]``; each is a run of the corpus's tokens.

    With ``separators`` (how many stand between the two: 1 as in BERT, 2 as in RoBERTa) rows are pairs
    ``[CLS] A [SEP] B [SEP]``, two pieces each, perhaps with a ``sentence_label`` (int32, 0 = in order, 1 = random or
    swapped); with ``opens`` and ``closes`` (bool: whether a piece begins and ends its document) pieces are targets
    of a causal model, and ``piece_length`` counts a document's end too; otherwise every piece stands as
    ``[CLS] piece [SEP]``.
    """

    seq_len: int
    piece_start: Int64[np.ndarray, " pieces"] = field(repr=False)
    piece_length: Int32[np.ndarray, " pieces"] = field(repr=False)
    row_offsets: Int64[np.ndarray, " rows+1"] = field(repr=False)
    separators: int = 0
    sentence_label: Int32[np.ndarray, " rows"] | None = field(default=None, repr=False)
    opens: Bool[np.ndarray, " pieces"] | None = field(default=None, repr=False)
    closes: Bool[np.ndarray, " pieces"] | None = field(default=None, repr=False)

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def fill_share(self) -> float:
        """The share of places that are not padding."""
        specials = (2 + self.separators) * self.num_rows if self.separators else 2 * len(self.piece_start)
        specials = 0 if self.opens is not None else specials
        return float(self.piece_length.sum(dtype=np.int64) + specials) / (self.num_rows * self.seq_len)


def packed_plan(document_offsets: Int64[np.ndarray, " documents+1"], seq_len: int) -> Plan:
    """Cuts documents into pieces and packs these into rows; every token is in exactly one. Deterministic."""
    start, length = _cut(document_offsets, seq_len - 2)
    pieces, row_offsets = _pack(length + 2, seq_len)
    return Plan(seq_len, start[pieces], length[pieces].astype(np.int32), row_offsets)


def causal_plan(document_offsets: Int64[np.ndarray, " documents+1"], seq_len: int) -> Plan:
    """Cuts documents, their ends included, into pieces of targets and packs these into rows. Deterministic.

    A piece that is a document's end alone starts where the next document does.
    """
    # With a place for each document's end, offsets are those of a corpus that is longer by a token a document.
    document = np.arange(len(document_offsets))
    start, length = _cut(document_offsets + document, seq_len)
    of = np.searchsorted(document_offsets + document, start, side="right") - 1
    opens = start == (document_offsets + document)[of]
    closes = start + length == (document_offsets + document)[of + 1]
    pieces, row_offsets = _pack(length, seq_len)
    return Plan(
        seq_len,
        (start - of)[pieces],
        length[pieces].astype(np.int32),
        row_offsets,
        opens=opens[pieces],
        closes=closes[pieces],
    )


def _pack(size: Int64[np.ndarray, " pieces"], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces stand in each row, from their sizes: the pieces in order, and the rows' offsets into them.

    Rows are in a fixed random order: packing leaves them sorted by size, and the first batches of an evaluation would
    see nothing but long pieces.
    """
    groups = pack_histogram(np.bincount(size, minlength=seq_len + 1), seq_len)
    by_size = np.argsort(
        size.astype(np.uint16 if seq_len < 1 << 16 else np.int64), kind="stable"
    )  # 16 bits: radix sort
    next_of_size = np.cumsum(np.bincount(size, minlength=seq_len + 1)) - np.bincount(size, minlength=seq_len + 1)
    blocks, pieces_per_row = [], []
    for count, sizes in groups:
        columns = []
        for s in sizes:
            columns.append(by_size[next_of_size[s] : next_of_size[s] + count])
            next_of_size[s] += count
        blocks.append(np.stack(columns, axis=1).ravel())
        pieces_per_row.append(np.full(count, len(sizes), np.int64))
    pieces, per_row = np.concatenate(blocks), np.concatenate(pieces_per_row)
    order = np.random.default_rng(ROW_SEED).permutation(len(per_row))
    pieces = pieces[flat_ranges((np.cumsum(per_row) - per_row)[order], per_row[order])]
    return pieces, np.concatenate([[0], np.cumsum(per_row[order])])


def documents_plan(document_offsets: Int64[np.ndarray, " documents+1"], seq_len: int) -> Plan:
    """One document a row, in their order; what is beyond ``seq_len - 2`` tokens is left out."""
    length = np.minimum(np.diff(document_offsets), seq_len - 2).astype(np.int32)
    return Plan(seq_len, document_offsets[:-1], length, np.arange(len(document_offsets), dtype=np.int64))


def text_pairs_plan(
    document_offsets: Int64[np.ndarray, " documents+1"],
    pair_lengths: Int64[np.ndarray, " documents"],
    seq_len: int,
    separators: int,
) -> Plan:
    """One pair of texts a row, in their order; of too long ones the longer text loses its end.

    The lengths are those of Hugging Face's ``truncation="longest_first"``: if the shorter text has more than half of
    the room, both get half of it, and the longer one (of equals the second) the odd token.
    """
    room = seq_len - 2 - separators
    second = pair_lengths
    first = np.diff(document_offsets) - second
    a = np.where(first <= second, np.minimum(first, room // 2), room - np.minimum(second, room // 2))
    fits = first + second <= room
    length = np.stack([np.where(fits, first, a), np.where(fits, second, room - a)], axis=1)
    start = np.stack([document_offsets[:-1], document_offsets[:-1] + first], axis=1)
    rows = np.arange(len(document_offsets), dtype=np.int64)
    return Plan(seq_len, start.ravel(), length.ravel().astype(np.int32), 2 * rows, separators)


def pack_histogram(counts: Int[np.ndarray, " sizes"], capacity: int) -> list[tuple[int, tuple[int, ...]]]:
    """Packs ``counts[s]`` items of each size ``s`` into bins by best fit, largest first.

    Returns:
      ``(number of bins, sizes in each)``; the numbers times the sizes give back ``counts``.
    """
    open_bins: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in range(capacity + 1)]  # by room left
    has_bins = np.zeros(capacity + 1, bool)

    def put(count: int, sizes: tuple[int, ...], room: int) -> None:
        open_bins[room].append((count, sizes))
        has_bins[room] = True

    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left and has_bins[size:].any():
            room = size + int(np.argmax(has_bins[size:]))
            count, sizes = open_bins[room].pop()
            has_bins[room] = bool(open_bins[room])
            taken = min(count, left)
            put(taken, (*sizes, size), room - size)
            if count > taken:
                put(count - taken, sizes, room)
            left -= taken
        whole, rest = divmod(left, capacity // size)
        if whole:
            put(whole, (size,) * (capacity // size), capacity % size)
        if rest:
            put(1, (size,) * rest, capacity - rest * size)
    return [group for groups in open_bins for group in groups]


def flat_ranges(starts: Int64[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " total"]:
    """Concatenates ``range(start, start + length)`` of every pair."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _cut(document_offsets: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(document_offsets)
    pieces = -(-lengths // longest)
    within = flat_ranges(np.zeros_like(pieces), pieces) * longest
    start = np.repeat(document_offsets[:-1], pieces) + within
    return start, np.minimum(np.repeat(lengths, pieces) - within, longest)
