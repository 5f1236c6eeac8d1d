"""Sentence pairs for next-sentence (BERT) and sentence-order (ALBERT) prediction, as an index plan.

In: a tokenised corpus with sentence starts. Out: a `Plan` of rows ``[CLS] A [SEP] B [SEP]`` and their labels. The
steps and the order of random draws are those of ``create_pretraining_data.py`` in google-research/bert and
google-research/albert:

- sentences are collected until they reach a target length (one document in ten aims for a shorter one), then cut into
  A and B at a random sentence;
- NSP: for half of them B comes from a random document instead, and the sentences of the real B are put back;
- SOP: half of them are swapped. A chunk of one sentence has nothing to swap and, as in ALBERT's code, takes a random B;
- the longer of A and B loses tokens, at front or back at random, until the row fits.

Differences: one pass over the corpus (the originals duplicate it with other draws), in the corpus's document order.
"""

from __future__ import annotations

import functools
import os
import random
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from sslx.data.cache import hash_of, prepare_once
from sslx.data.packing import Plan
from sslx.data.tokens import TokenCorpus

FORMAT = 1
SHORT_TARGET_SHARE = 0.1

Span = tuple[int, int]  # start and stop in the flat tokens


def pair_plan(
    corpus: TokenCorpus,
    seq_len: int,
    task: Literal["nsp", "sop"],
    *,
    seed: int,
    cache_dir: str | os.PathLike[str],
) -> Plan:
    """Plans one pass of pairs, in random order; the same for the same seed, and made once (cached).

    Raises:
      UserError: the cache cannot be written.
    """
    key = hash_of("pairs", FORMAT, corpus.fingerprint, seq_len, task, seed)
    folder = prepare_once(cache_dir, f"pairs-{key}", functools.partial(_write, corpus, seq_len, task, seed))
    return Plan(
        seq_len,
        np.load(folder / "piece_start.npy"),
        np.load(folder / "piece_length.npy"),
        2 * np.arange(len(np.load(folder / "sentence_label.npy", mmap_mode="r")) + 1, dtype=np.int64),
        1,
        np.load(folder / "sentence_label.npy"),
    )


def _write(corpus: TokenCorpus, seq_len: int, task: str, seed: int, folder: Path) -> None:
    flat = (value for a, b, label in pairs(corpus, seq_len, task, random.Random(seed)) for value in (*a, *b, label))
    found = np.fromiter(flat, np.int64).reshape(-1, 5)
    found = found[np.random.default_rng(seed).permutation(len(found))]
    np.save(folder / "piece_start.npy", found[:, [0, 2]].ravel())
    np.save(folder / "piece_length.npy", (found[:, [1, 3]] - found[:, [0, 2]]).ravel().astype(np.int32))
    np.save(folder / "sentence_label.npy", found[:, 4].astype(np.int32))


def pairs(corpus: TokenCorpus, seq_len: int, task: str, rng: random.Random) -> Iterator[tuple[Span, Span, int]]:
    """Yields ``(A, B, label)`` of every chunk of every document, in order."""
    bounds = np.append(corpus.sentence_starts, len(corpus.tokens))
    first = np.searchsorted(bounds, corpus.document_offsets)
    room = seq_len - 3  # [CLS] and two [SEP]
    for document in range(corpus.num_documents):
        ends = bounds[first[document] : first[document + 1] + 1].tolist()
        target = rng.randint(2, room) if rng.random() < SHORT_TARGET_SHARE else room
        i = 0
        while i < len(ends) - 1:
            stop = _reach(ends, i, target)
            cut = i + (rng.randint(1, stop - i - 1) if stop - i >= 2 else 1)
            a, b, label = (ends[i], ends[cut]), (ends[cut], ends[stop]), 0
            if stop - i == 1 or (task == "nsp" and rng.random() < 0.5):
                b, label = _random_span(bounds, first, document, target - (a[1] - a[0]), rng), 1
                stop = cut  # the sentences of the real B are put back
            elif task == "sop" and rng.random() < 0.5:
                a, b, label = b, a, 1
            yield *_truncate(a, b, room, rng), label
            i = stop


def _reach(ends: list[int], start: int, length: int) -> int:
    """Returns the first bound after ``start`` that is at least ``length`` tokens away, or the last."""
    return min(bisect_left(ends, ends[start] + length, start + 1), len(ends) - 1)


def _random_span(bounds: np.ndarray, first: np.ndarray, document: int, length: int, rng: random.Random) -> Span:
    other = document
    for _ in range(10):  # a corpus of one document has no other
        other = rng.randint(0, len(first) - 2)
        if other != document:
            break
    start = int(first[other]) + rng.randint(0, int(first[other + 1] - first[other]) - 1)
    stop = np.searchsorted(bounds[start + 1 : first[other + 1]], bounds[start] + length) + start + 1
    return int(bounds[start]), int(bounds[stop])


def _truncate(a: Span, b: Span, room: int, rng: random.Random) -> tuple[Span, Span]:
    (a0, a1), (b0, b1) = a, b
    while (a1 - a0) + (b1 - b0) > room:
        front = rng.random() < 0.5
        if a1 - a0 > b1 - b0:
            a0, a1 = (a0 + 1, a1) if front else (a0, a1 - 1)
        else:
            b0, b1 = (b0 + 1, b1) if front else (b0, b1 - 1)
    return (a0, a1), (b0, b1)
