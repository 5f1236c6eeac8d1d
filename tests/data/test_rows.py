"""Rows against a slow NumPy layout, the order's purity, and `prepare_text` from files to rows."""

from __future__ import annotations

import itertools
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from sslx.data.packing import Plan, causal_plan, documents_plan, packed_plan
from sslx.data.rows import RowOrder, TextRows, abstract_row
from sslx.data.text import TextConfig, prepare_text, text_collection
from sslx.data.tokenizer import Vocabulary
from sslx.errors import UserError

WORDS = Vocabulary(1000, 0, 1, 2, 3, 4, (0, 1, 2, 3, 4), bytes(1000), "test")
LENGTHS = np.maximum(1, np.random.default_rng(0).lognormal(3, 1.2, 400)).astype(np.int64)
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
CORPUS = SimpleNamespace(tokens=np.random.default_rng(1).integers(5, 1000, OFFSETS[-1]).astype(np.uint16))


def slow_row(plan, row):
    """One row, piece by piece."""
    out = {name: [] for name in ("tokens", "segment_ids", "positions", "token_types")}
    paired = plan.sentence_label is not None
    for slot, piece in enumerate(range(plan.row_offsets[row], plan.row_offsets[row + 1])):
        start = plan.piece_start[piece]
        ids = CORPUS.tokens[start : start + plan.piece_length[piece]].tolist()
        ids = [*ids, 3] if paired and slot else [2, *ids, 3]
        first = len(out["tokens"]) if paired else 0
        out["tokens"] += ids
        out["segment_ids"] += [1 if paired else slot + 1] * len(ids)
        out["positions"] += range(first, first + len(ids))
        out["token_types"] += [slot] * len(ids)
    return {name: values + [0] * (plan.seq_len - len(values)) for name, values in out.items()}


def pairs_plan():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 14, 80).astype(np.int32)
    starts = rng.integers(0, OFFSETS[-1] - 14, 80)
    return Plan(32, starts, lengths, np.arange(0, 81, 2), 1, rng.integers(0, 2, 40).astype(np.int32))


@pytest.mark.parametrize("plan", [packed_plan(OFFSETS, 32), documents_plan(OFFSETS, 32), pairs_plan()])
def test_fetch_equals_a_slow_layout(plan):
    rows = TextRows(CORPUS, plan, WORDS)
    ids = np.random.default_rng(3).integers(0, len(rows), 50)
    batch = rows.fetch(ids)
    for i, row in enumerate(ids):
        expected = slow_row(plan, row)
        for name in batch.keys() & expected.keys():
            assert batch[name][i].tolist() == expected[name], name
    assert all(array.dtype == np.int32 for array in batch.values())
    assert ("token_types" in batch) == ("sentence_label" in batch) == (plan.sentence_label is not None)
    if plan.sentence_label is not None:
        np.testing.assert_array_equal(batch["sentence_label"], plan.sentence_label[ids])


@pytest.mark.parametrize("seq_len", [8, 32, 5000])
def test_causal_rows_are_documents_with_their_next_tokens(seq_len):
    rows = TextRows(CORPUS, causal_plan(OFFSETS, seq_len), WORDS)
    batch = rows.fetch(np.arange(len(rows)))
    found = []
    for row in range(len(rows)):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            places = segments == segment
            assert batch["positions"][row][places].tolist() == list(range(places.sum()))
            found.append((batch["tokens"][row][places].tolist(), batch["targets"][row][places].tolist()))
        assert not batch["tokens"][row][segments == 0].any()
    expected = []
    for start, end in itertools.pairwise(OFFSETS):
        document = [2, *CORPUS.tokens[start:end].tolist(), 3]
        cuts = [document[at : at + seq_len + 1] for at in range(0, len(document) - 1, seq_len)]
        expected += [(cut[:-1], cut[1:]) for cut in cuts]
    assert sorted(found) == sorted(expected)
    assert set(abstract_row(seq_len, "causal")) == set(batch)


def test_labels_follow_their_documents():
    labels = np.arange(len(LENGTHS), dtype=np.int32)
    batch = TextRows(CORPUS, documents_plan(OFFSETS, 32), WORDS, labels).fetch(np.array([7, 3, 7]))
    assert batch["label"].tolist() == [7, 3, 7]


def test_fetching_costs_under_30_microseconds_a_row():
    rows = TextRows(CORPUS, packed_plan(OFFSETS, 128), WORDS)
    ids = np.random.default_rng(0).integers(0, len(rows), 4096)
    rows.fetch(ids)
    start = time.process_time()
    rows.fetch(ids)
    assert (time.process_time() - start) / 4096 < 30e-6


def test_each_epoch_is_another_permutation():
    order = RowOrder(1000, seed=0)
    epochs = order.rows_at(np.arange(3000)).reshape(3, 1000)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(1000))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_a_row_is_a_pure_function_of_seed_and_position():
    positions = np.array([2**40 + 5, 3, 2**40, 999_999, 3])
    one, again = RowOrder(1000, seed=7), RowOrder(1000, seed=7)
    rows = one.rows_at(positions)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(again.rows_at(positions[::-1])[::-1], rows)
    assert rows[1] == rows[4]
    assert RowOrder(1000, seed=8).rows_at(np.arange(50)).tolist() != one.rows_at(np.arange(50)).tolist()


def test_seeds_do_not_share_shifted_epochs():
    second = RowOrder(500, seed=0).rows_at(np.arange(500, 1000))
    assert second.tolist() != RowOrder(500, seed=1).rows_at(np.arange(500)).tolist()


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(200)]
    with open(tmp_path / "docs.jsonl", "w") as file:
        for i in range(120):
            lines = [" ".join(rng.choice(words, 9)).capitalize() + "." for _ in range(rng.integers(2, 12))]
            file.write(json.dumps({"text": "\n".join(lines), "label": ["x", "y"][i % 2]}) + "\n")
    return {
        "source": f"jsonl:{tmp_path}/docs.jsonl",
        "cache_dir": str(tmp_path / "cache"),
        "vocab_size": 300,
        "seq_len": 64,
    }


@pytest.mark.parametrize("layout", ["packed", "nsp", "sop", "documents"])
def test_prepare_text_works_out_of_the_box_on_files(corpus, layout):
    prepared = prepare_text(TextConfig(**corpus), layout=layout)
    assert prepared.statistics["train_documents"] == 118
    assert prepared.statistics["eval_documents"] == 2
    assert prepared.statistics["train_split"] == "train[:98%]"
    assert 0 < prepared.statistics["unigram_entropy"] < np.log(300)
    assert prepared.test is None
    assert prepared.label_names == ("x", "y")
    batch = prepared.train.fetch(np.arange(len(prepared.train)))
    assert batch["tokens"].max() < prepared.vocabulary.size
    assert ("label" in batch) == (layout == "documents")


def test_prepare_text_is_the_same_again_and_from_the_cache(corpus):
    one = prepare_text(TextConfig(**corpus), layout="packed")
    two = prepare_text(TextConfig(**corpus), layout="packed")
    assert one.statistics == two.statistics
    assert one.vocabulary == two.vocabulary
    longer = prepare_text(TextConfig(**corpus | {"seq_len": 128}), layout="packed")
    assert longer.train.corpus.fingerprint == one.train.corpus.fingerprint
    assert longer.statistics["fingerprint"] != one.statistics["fingerprint"]


def test_the_last_tenth_of_a_single_document_is_held_out(corpus, tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "one.txt").write_text(text)
    config = TextConfig(**corpus | {"source": f"text:{tmp_path}/one.txt", "tokenizer": "char", "seq_len": 64})
    data = prepare_text(config, layout="causal")
    for role, expected in (("train", text[:900]), ("eval", text[900:])):
        assert data.tokenizer.decode(getattr(data, role).corpus.tokens) == expected
    # Whoever tokenises in another process opens the same halves.
    assert text_collection(config).slice("validation")[0]["text"] == text[900:]


def test_prepare_text_refuses_overlapping_splits_and_one_document(corpus, tmp_path):
    with pytest.raises(UserError, match=r"train split 'train' and test split 'train\[90%:\]'.* share 12 records"):
        prepare_text(TextConfig(**corpus, eval_split="train[:0%]", test_split="train[90%:]"), layout="packed")
    (tmp_path / "one.csv").write_text("text,label\nhello,a\n")
    with pytest.raises(UserError, match="has one record"):
        prepare_text(TextConfig(**corpus | {"source": f"csv:{tmp_path}/one.csv"}), layout="packed")
    with pytest.raises(UserError, match="seq_len=4"):
        prepare_text(TextConfig(**corpus | {"seq_len": 4}), layout="packed")
