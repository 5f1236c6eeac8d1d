"""Tokenising to disk: the ids of the whole documents, sentences, labels and counts; written once."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from sslx.data import tokens as tokens_module
from sslx.data.sources import open_source
from sslx.data.tokenizer import load_tokenizer
from sslx.data.tokens import split_sentences, tokenize_corpus
from sslx.errors import UserError

TEXTS = [
    'The cat sat. It was 3 o\'clock! "Was it?" He said so.\n\n  A new line, e.g. this one.\n',
    "   \n",
    "Literal [MASK] and [SEP] in the text. Ünïcode too…",
    "",
    "last",
]


@pytest.fixture
def corpus(tmp_path):
    records = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS * 3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_source(f"jsonl:{tmp_path}/a.jsonl", "train", cache_dir=tmp_path)


@pytest.fixture
def tokenizer(corpus, tmp_path):
    return load_tokenizer("wordpiece", corpus, vocab_size=150, lowercase=True, cache_dir=tmp_path / "cache")


def test_tokens_are_those_of_whole_documents(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "CHUNK_DOCUMENTS", 4)
    found = tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path)
    assert found.tokens.dtype == np.uint16
    assert not found.tokens.flags.writeable
    assert (found.num_documents, found.skipped_documents) == (9, 6)
    # Whole documents through the caller's tokenizer, whose [MASK] in the text is not taken for the token here.
    plain = [text.replace("[MASK]", "[ MASK ]").replace("[SEP]", "[ SEP ]") for text in TEXTS * 3 if text.strip()]
    for i, text in enumerate(plain):
        document = found.tokens[found.document_offsets[i] : found.document_offsets[i + 1]]
        assert document.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert not np.isin(found.tokens, [0, 2, 3, 4]).any()
    np.testing.assert_array_equal(found.unigram_counts, np.bincount(found.tokens, minlength=len(tokenizer)))
    assert found.labels.tolist() == [i % 2 for i, text in enumerate(TEXTS * 3) if text.strip()]
    assert found.label_names == ("a", "b")


def test_sentences_start_where_documents_and_sentences_do(corpus, tokenizer, tmp_path):
    found = tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path)
    assert np.isin(found.document_offsets[:-1], found.sentence_starts).all()
    assert (np.diff(found.sentence_starts) > 0).all()
    first = found.sentence_starts[found.sentence_starts <= found.document_offsets[1]]
    sentences = [tokenizer.decode(found.tokens[a:b]) for a, b in itertools.pairwise(first)]
    assert len(sentences) == 5
    assert sentences[0] == "the cat sat."
    assert sentences[4].startswith("a new line, e. g. this one")


def test_splitting_loses_nothing():
    for text in [*TEXTS, "a\r\n\r\nb. C", "\n\n", "x.Y. z", "one.\n\n\ntwo"]:
        assert "".join(split_sentences(text)) == text
    assert split_sentences("One. Two\nthree (e.g. four)") == ["One.", " Two", "\nthree (e.g. four)"]


def test_a_second_call_maps_what_the_first_wrote(corpus, tokenizer, tmp_path, monkeypatch):
    one = tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path)
    monkeypatch.setattr(tokens_module, "_write", lambda *args: pytest.fail("tokenised again"))
    two = tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path)
    assert two.fingerprint == one.fingerprint
    np.testing.assert_array_equal(two.tokens, one.tokens)


def test_tokens_without_labels_are_no_ones_who_reads_labels(corpus, tokenizer, tmp_path):
    plain = tokenize_corpus(
        open_source(f"text:{tmp_path}/a.jsonl", "train", cache_dir=tmp_path), tokenizer, cache_dir=tmp_path
    )
    labelled = tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path)
    assert plain.labels is None
    assert labelled.labels.tolist() == [i % 2 for i, text in enumerate(TEXTS * 3) if text.strip()]


def test_documents_without_text_are_counted_and_left_out(tokenizer, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n')
    source = open_source(f"jsonl:{tmp_path}/b.jsonl", "train", cache_dir=tmp_path)
    found = tokenize_corpus(source, tokenizer, cache_dir=tmp_path)
    assert (found.num_documents, found.skipped_documents) == (2, 2)
    assert tokenizer.decode(found.tokens) == "one two"


def test_a_corpus_without_a_token_is_refused(tokenizer, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": " "}\n{"text": ""}\n{"text": null}\n')
    source = open_source(f"jsonl:{tmp_path}/b.jsonl", "train", cache_dir=tmp_path)
    with pytest.raises(UserError, match="has no document with a token in it"):
        tokenize_corpus(source, tokenizer, cache_dir=tmp_path)
