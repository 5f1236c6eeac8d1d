"""Pairs are tested against a transcription of BERT's and ALBERT's steps on lists of sentences, draw for draw."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from sslx.data.pairs import pair_plan, pairs
from sslx.data.tokens import TokenCorpus


def corpus_of(documents):
    """Documents are lists of sentence lengths; token ids are 100, 101, ... so that places can be read off."""
    lengths = [length for document in documents for length in document]
    total = sum(lengths)
    return TokenCorpus(
        tokens=(100 + np.arange(total)).astype(np.uint16),
        document_offsets=np.concatenate([[0], np.cumsum([sum(d) for d in documents])]).astype(np.int64),
        sentence_starts=(np.cumsum(lengths) - lengths).astype(np.int64),
        labels=None,
        label_names=None,
        unigram_counts=np.zeros(1, np.int64),
        skipped_documents=0,
        fingerprint=str(hash(str(documents))),
    )


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 40, rng.integers(1, 60)).tolist() for _ in range(40)]


def reference_pairs(documents, seq_len, task, rng):
    """The published algorithm: lists of token lists, one sentence at a time."""
    counter, texts = 0, []
    for document in documents:
        text = []
        for length in document:
            text.append(list(range(counter, counter + length)))
            counter += length
        texts.append(text)
    most = seq_len - 3
    for index, text in enumerate(texts):
        target = most
        if rng.random() < 0.1:
            target = rng.randint(2, most)
        chunk, size, i = [], 0, 0
        while i < len(text):
            chunk.append(text[i])
            size += len(text[i])
            if i == len(text) - 1 or size >= target:
                a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
                a = list(itertools.chain(*chunk[:a_end]))
                b, label = list(itertools.chain(*chunk[a_end:])), 0
                if len(chunk) == 1 or (task == "nsp" and rng.random() < 0.5):
                    label, b = 1, []
                    for _ in range(10):
                        other = rng.randint(0, len(texts) - 1)
                        if other != index:
                            break
                    for sentence in texts[other][rng.randint(0, len(texts[other]) - 1) :]:
                        b += sentence
                        if len(b) >= target - len(a):
                            break
                    i -= len(chunk) - a_end
                elif task == "sop" and rng.random() < 0.5:
                    a, b, label = b, a, 1
                while len(a) + len(b) > most:
                    longer = a if len(a) > len(b) else b
                    if rng.random() < 0.5:
                        del longer[0]
                    else:
                        longer.pop()
                yield a, b, label
                chunk, size = [], 0
            i += 1


@pytest.mark.parametrize("task", ["nsp", "sop"])
@pytest.mark.parametrize("seq_len", [16, 128])
def test_pairs_equal_the_published_algorithm(documents, task, seq_len):
    found = list(pairs(corpus_of(documents), seq_len, task, random.Random(3)))
    expected = list(reference_pairs(documents, seq_len, task, random.Random(3)))
    assert [(list(range(*a)), list(range(*b)), label) for a, b, label in found] == expected


@pytest.mark.parametrize("task", ["nsp", "sop"])
def test_plan_fits_its_rows_and_has_both_labels_in_balance(documents, task, tmp_path):
    plan = pair_plan(corpus_of(documents * 5), 64, task, seed=0, cache_dir=tmp_path)
    lengths = plan.piece_length.reshape(-1, 2)
    assert lengths.min() >= 1
    assert lengths.sum(axis=1).max() <= 61
    assert 0.4 < plan.sentence_label.mean() < 0.7
    np.testing.assert_array_equal(plan.row_offsets, np.arange(0, 2 * plan.num_rows + 1, 2))


def test_plan_depends_on_the_seed_alone_and_is_cached(documents, tmp_path):
    corpus = corpus_of(documents)
    one = pair_plan(corpus, 64, "nsp", seed=1, cache_dir=tmp_path / "one")
    same = pair_plan(corpus, 64, "nsp", seed=1, cache_dir=tmp_path / "two")
    other = pair_plan(corpus, 64, "nsp", seed=2, cache_dir=tmp_path / "one")
    np.testing.assert_array_equal(one.piece_start, same.piece_start)
    assert one.piece_start.tolist() != other.piece_start.tolist()
    assert len(list((tmp_path / "one").glob("pairs-*"))) == 2


def test_a_corpus_of_one_document_still_gives_pairs(tmp_path):
    plan = pair_plan(corpus_of([[5, 9, 3, 7] * 10]), 32, "nsp", seed=0, cache_dir=tmp_path)
    assert plan.num_rows > 1
