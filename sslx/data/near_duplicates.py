"""Near-duplicate documents of a corpus: every pair that shares enough word shingles, and one text kept of each.

In: a list of texts. Out: for every text, the index of the kept text that stands for it. Two texts are near-duplicates
when their sets of word 5-shingles overlap enough by containment, ``|A ∩ B| / min(|A|, |B|)``: one is quoted inside the
other, however long that is. The same text with edits needs no second measure: a Jaccard similarity of j is a
containment of at least 2j / (1 + j), so a threshold of 0.4 on containment finds every pair of Jaccard 0.25.

Pairs are counted exactly, as a sparse product of the text × shingle matrix with its transpose. Its cost is the sum over
shingles of the squared number of texts that hold them: 18 million for 20 MB of docstrings, one second. MinHash with LSH
banding (Broder 1997) took longer here, and missed what matters most: a short text inside one ten times its length has
a Jaccard similarity under 0.1, which no useful banding proposes (64 bands of 2 rows left 137 such pairs there). It is
the right tool from some 10⁶ documents on, which this is not for.

Longest first, a text is kept unless it is a near-duplicate of one kept before: no two kept texts are near-duplicates,
so splits made of kept texts share none. Connected components of the pairs would promise the same and lose far more:
twins of twins chain through stock phrases ("X : array-like of shape (n_samples, n_features)") into groups of hundreds
of texts about different things.

Everything is a function of the texts alone: words are hashed with BLAKE2b, never with Python's salted ``hash``.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import scipy.sparse
from jaxtyping import Int64, UInt64

SHINGLE_WORDS = 5

_WORD = re.compile(r"\w+")
# Rows of the product held at a time: bounds its memory to some tens of MB.
_TEXTS_PER_CHUNK = 1024

# The spaces inside one-word shape strings keep Ruff from taking them for quoted types.
Words = UInt64[np.ndarray, " words"]
Shingles = UInt64[np.ndarray, " shingles"]


def representatives(texts: Sequence[str], *, containment: float) -> Int64[np.ndarray, " texts"]:
    """Returns for each text the index of the text that stands for it: itself, or a longer near-duplicate that is kept.

    Ties of length go to the text that is smaller as a string, so the texts kept do not depend on the order they came
    in. Texts without words are nobody's near-duplicates.

    Args:
      texts: the corpus, without exact copies: n copies of one text are n² pairs.
      containment: pairs whose smaller set lies in the other by at least this share are near-duplicates. In (0, 1].

    Raises:
      ValueError: ``containment`` is outside (0, 1].
    """
    neighbours = defaultdict(list)
    for i, j in near_pairs(shingle_sets(texts), containment=containment).tolist():
        neighbours[i].append(j)
        neighbours[j].append(i)
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i], i))
    rank = {i: place for place, i in enumerate(order)}
    keeper = np.full(len(texts), -1, dtype=np.int64)
    for i in order:
        kept = [j for j in neighbours[i] if keeper[j] == j]
        keeper[i] = min(kept, key=rank.__getitem__, default=i)
    return keeper


def near_pairs(sets: Sequence[Shingles], *, containment: float) -> Int64[np.ndarray, "pairs 2"]:
    """Returns all pairs ``(i, j)``, ``i < j``, of sets whose containment reaches the threshold, sorted.

    Raises:
      ValueError: ``containment`` is outside (0, 1].
    """
    if not 0 < containment <= 1:
        raise ValueError(f"containment must be in (0, 1], not {containment}")
    sizes = np.array([len(shingles) for shingles in sets], dtype=np.int64)
    found = [np.zeros((0, 2), dtype=np.int64)]
    if sizes.any():
        _, columns, holders = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
        row_ends = np.concatenate([[0], np.cumsum(sizes)])
        marks = scipy.sparse.csr_array((np.ones(len(columns), dtype=np.int32), columns, row_ends))
        # Most shingles stand in one text alone and count for no pair.
        marks = marks[:, holders > 1]
        transposed = marks.T.tocsr()
        for begin in range(0, len(sets), _TEXTS_PER_CHUNK):
            product = (marks[begin : begin + _TEXTS_PER_CHUNK] @ transposed).tocoo()
            i, j, shared = product.row.astype(np.int64) + begin, product.col.astype(np.int64), product.data
            near = (i < j) & (shared >= containment * np.minimum(sizes[i], sizes[j]))
            found.append(np.stack([i[near], j[near]], axis=1))
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def shingle_sets(texts: Sequence[str], size: int = SHINGLE_WORDS) -> list[Shingles]:
    """Returns each text's set of word shingles as sorted, unique 64-bit hashes.

    Words are runs of letters, digits and underscores in lower case: layout and punctuation do not count. A text of
    fewer than ``size`` words has one shingle, of all its words; a text without words has none.
    """
    hashes = _WordHashes()
    words = [np.array([hashes[word] for word in _WORD.findall(text.lower())], dtype=np.uint64) for text in texts]
    # All texts at once; the shingles that reach into the next text are cut off below.
    rolled = _shingles(np.concatenate([*words, np.zeros(size, dtype=np.uint64)]), size)
    sets, begin = [], 0
    for own in words:
        count = len(own) - size + 1
        sets.append(np.unique(rolled[begin : begin + count]) if count > 0 else _shingles(own, len(own)))
        begin += len(own)
    return sets


class _WordHashes(dict):
    """The 64-bit hash of each word, computed at its first use: a corpus has far fewer words than word occurrences."""

    def __missing__(self, word: str) -> int:
        self[word] = value = int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
        return value


def _shingles(words: Words, size: int) -> Shingles:
    """The hash of every ``size`` words in a row; none for size 0."""
    shingles = np.zeros(len(words) - size + 1 if size else 0, dtype=np.uint64)
    for offset in range(size):
        # Mixing between words makes the hash depend on their order.
        shingles = _mix(shingles + words[offset : offset + len(shingles)])
    return shingles


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser: every input bit reaches every output bit. Arithmetic is modulo 2⁶⁴."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
