"""Tokenising to disk: the ids of the whole documents, one writer among many processes, nothing half-written."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import textwrap

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


SLOW_WRITER = textwrap.dedent(
    """
    import sys, time
    from sslx.data import sources, tokenizer, tokens
    spec, cache, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    source = sources.open_source(spec, "train", cache_dir=cache)
    words = tokenizer.load_tokenizer("wordpiece", source, vocab_size=150, lowercase=True, cache_dir=cache)
    write = tokens._write
    def slow(source, words, size, dtype, folder):
        print("writing", flush=True)
        (folder / "tokens.bin").write_bytes(b"half")
        time.sleep(seconds)
        write(source, words, size, dtype, folder)
    tokens._write = slow
    print(len(tokens.tokenize_corpus(source, words, cache_dir=cache).tokens), flush=True)
    """
)


def start_writer(corpus, cache, seconds):
    command = [sys.executable, "-c", SLOW_WRITER, corpus.spec, str(cache), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_write_once(corpus, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    both = [start_writer(corpus, cache, 1.5) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(len(words) for words in said) == [1, 2]  # only one said "writing"
    assert said[0][-1] == said[1][-1]


def test_a_kill_half_way_leaves_nothing_in_the_way(corpus, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    process = start_writer(corpus, cache, 60)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert list(cache.glob("tokens-*.tmp-*"))
    found = tokenize_corpus(corpus, tokenizer, cache_dir=cache)
    assert found.num_documents == 9
    assert not list(cache.glob("*.tmp-*"))


def test_a_cache_that_cannot_be_written_is_named(corpus, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the data cache .*/file/cache.*cache_dir"):
        tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path / "file" / "cache")


def test_a_full_disk_is_one_line_and_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens_module, "_write", full)
    with pytest.raises(UserError, match=r"cannot write the data cache .*: No space left on device"):
        tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path / "full")
    assert not list((tmp_path / "full").glob("tokens-*.tmp-*"))


def test_a_corpus_without_a_token_is_refused(tokenizer, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    source = open_source(f"jsonl:{tmp_path}/b.jsonl", "train", cache_dir=tmp_path)
    with pytest.raises(UserError, match="has no document with a token in it"):
        tokenize_corpus(source, tokenizer, cache_dir=tmp_path)
