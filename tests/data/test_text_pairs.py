"""Pairs of texts and labels that are numbers, from every labelled source to rows; rows against real tokenizers."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from entries import REPOSITORY
from tfds_folders import write_tfds
from tokenizers import pre_tokenizers
from transformers import BertTokenizer, RobertaTokenizer

from sslx.data import tokens as tokens_module
from sslx.data.packing import text_pairs_plan
from sslx.data.row_writer import write_rows
from sslx.data.rows import TextRows
from sslx.data.sources import open_source
from sslx.data.text import TextConfig, prepare_text
from sslx.data.token_shards import Workers
from sslx.data.tokenizer import vocabulary
from sslx.entry import load_config
from sslx.errors import UserError
from sslx.prepare import prepare

WORDS = ["a", "man", "is", "play", "##ing", "fun", "##ny", ".", "the", "guitar", "no", "one"]


def bert():
    return BertTokenizer(vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])})


def roberta():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return RobertaTokenizer(
        vocab={t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"])}, merges=[]
    )


@pytest.fixture(scope="module")
def pairs():
    """Pairs of up to two sentences each, of very unequal and of equal lengths."""
    draw = random.Random(0)

    def text(size):
        words = draw.choices([word for word in WORDS if word.isalpha()], k=size)
        return " ".join([*words[: size // 2], "playing. The", *words[size // 2 :]]) + "."

    sizes = [(1, 1), (0, 12), (12, 0), (9, 10), (10, 9), (8, 8), (3, 30), (30, 3)]
    sizes += [(draw.randint(0, 20), draw.randint(0, 20)) for _ in range(40)]
    made = [(text(a), text(b)) for a, b in sizes] + [("funny", ""), ("", "funny guitar")]
    return [{"text": a, "pair": b, "label": ["no", "yes"][i % 2]} for i, (a, b) in enumerate(made)]


@pytest.fixture
def rows_of(pairs, tmp_path):
    """Makes rows of all pairs with a tokenizer."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair | {"kind": "a"}) + "\n" for pair in pairs))

    def make(tokenizer, seq_len):
        source = open_source(f"jsonl:{tmp_path}/pairs.jsonl", "train", pair_field="pair", cache_dir=tmp_path)
        corpus, words = tokens_module.tokenize_corpus(source, tokenizer, cache_dir=tmp_path), vocabulary(tokenizer)
        plan = text_pairs_plan(corpus.document_offsets, corpus.pair_lengths, seq_len, words.pair_separators)
        return TextRows(corpus, plan, words, corpus.labels)

    return make


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("seq_len", [8, 9, 24, 33, 128])
def test_rows_are_what_the_tokenizer_itself_makes_of_a_pair(rows_of, pairs, make, seq_len):
    rows = rows_of(make(), seq_len)
    batch = rows.fetch(np.arange(len(rows)))
    found = make()(
        [pair["text"] for pair in pairs],
        [pair["pair"] for pair in pairs],
        truncation="longest_first",
        max_length=seq_len,
        padding="max_length",
        return_token_type_ids=True,
    )
    mask = np.array(found.attention_mask)
    np.testing.assert_array_equal(batch["tokens"], found.input_ids)
    np.testing.assert_array_equal(batch["segment_ids"], mask)
    np.testing.assert_array_equal(batch["positions"], np.arange(seq_len) * mask)
    if make is bert:  # RoBERTa has one type, which its model and not its rows must see to
        np.testing.assert_array_equal(batch["token_types"], found.token_type_ids)
    assert batch["label"].tolist() == [i % 2 for i in range(len(pairs))]
    assert rows.plan.fill_share == pytest.approx(mask.mean())


def test_another_length_tokenises_nothing_again_and_another_pair_does(rows_of, monkeypatch, tmp_path):
    short = rows_of(bert(), 16)
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "_write", lambda *args: pytest.fail("tokenised again"))
        assert rows_of(bert(), 32).corpus.fingerprint == short.corpus.fingerprint
    fields = [dict(pair_field=""), dict(pair_field="pair"), dict(pair_field="label"), dict(label_field="kind")]
    spec = f"jsonl:{tmp_path}/pairs.jsonl"
    assert len({open_source(spec, "train", cache_dir=tmp_path, **f).fingerprint for f in fields}) == 4


@pytest.fixture
def sources(tmp_path):
    """The same scored pairs as CSV, JSON lines, Parquet and TFDS: spec by kind."""
    rows = [{"one": f"first {i}", "two": f"second {i}", "score": i / 4} for i in range(12)]
    (tmp_path / "a.csv").write_text("one,two,score\n" + "".join(f"{r['one']},{r['two']},{r['score']}\n" for r in rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=5)
    features = {"one": tfds.features.Text(), "two": tfds.features.Text(), "score": np.float32}
    write_tfds(tmp_path, "scored", features, {"train": rows})
    return {kind: f"{kind}:{tmp_path}/a.{kind}" for kind in ("csv", "jsonl", "parquet")} | {"tfds": "tfds:scored"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "tfds"])
def test_every_labelled_source_has_pairs_and_numbers(sources, tmp_path, kind):
    fields = dict(text_field="one", pair_field="two", label_field="score", cache_dir=tmp_path, tfds_dir=tmp_path)
    source = open_source(sources[kind], "train", label_type="number", **fields)
    assert source.label_names is None
    assert source.__getitems__([7, 0]) == [
        {"text": "first 7", "pair": "second 7", "label": 1.75},
        {"text": "first 0", "pair": "second 0", "label": 0.0},
    ]
    for role, wrong, near in (("text", "onee", "one"), ("pair", "twoo", "two"), ("label", "scores", "score")):
        said = (
            rf"^\S+ (has )?no field '{wrong}'( for labels)?; did you mean '{near}'\? \(valid: one, score, two\); "
            rf"--config\.data\.{role}_field=NAME reads another$"
        )
        with pytest.raises(UserError, match=said) as missing:
            open_source(sources[kind], "train", **fields | {f"{role}_field": wrong}).__getitems__([0])
        assert str(pickle.loads(pickle.dumps(missing.value))) == str(missing.value)  # from a process that tokenises
    if kind != "tfds":
        classes = open_source(sources[kind], "train", **fields)
        assert len(classes.label_names) == 12
        with pytest.raises(UserError, match="label 'first 0' is no number"):
            open_source(sources[kind], "train", **fields | {"label_field": "one", "label_type": "number"})


def test_prepared_rows_hold_pairs_and_numbers_whoever_tokenised(sources, tmp_path):
    config = load_config(REPOSITORY / "configs/finetune/text_pairs.py", f"data={sources['jsonl']}")
    changes = {"text_field": "one", "pair_field": "two", "label_field": "score", "label_type": "number", "seq_len": 16}
    changes |= {"tokenizer": "byte", "eval_split": "train[10:]", "train_split": "train[:10]"}
    with config.unlocked():
        config.data.update(changes)
        config.task = {"name": "text_regression", "pool": "mean"}
    workers = Workers(shards=3)
    data = prepare(config.to_dict(), str(tmp_path / "sharded"), workers=workers, rows=str(tmp_path / "rows"))
    here = TextConfig(**config.data.to_dict() | {"cache_dir": str(tmp_path / "here")})
    expected = prepare_text(here, layout="documents").train.fetch(np.arange(10))
    assert expected["label"].dtype == np.float32
    assert set(expected["label"].tolist()) < {i / 4 for i in range(12)}
    stored = prepare_text(TextConfig(f"rows:{tmp_path}/rows", seq_len=16), layout="documents")
    for rows in (data.train, stored.train):
        found = rows.fetch(np.arange(10))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values, err_msg=name)
    with pytest.raises(UserError, match="already holds prepared rows"):
        write_rows(data, tmp_path / "rows")


def test_what_cannot_be_is_refused(sources, tmp_path):
    here = {"cache_dir": str(tmp_path / "cache"), "tfds_dir": str(tmp_path), "tokenizer": "byte"}
    fields = {"text_field": "one", "pair_field": "two", "label_field": "score"}
    with pytest.raises(UserError, match=r"pair_field is 'two'; pretraining reads single texts"):
        prepare_text(TextConfig(sources["jsonl"], **fields, **here), layout="packed")
    with pytest.raises(UserError, match=r"is read without labels, so pairs \('two'\).*expected tfds.*csv:GLOB"):
        open_source(f"text:{tmp_path}", "train", pair_field="two", text_field="one", cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"unknown config.data.label_type 'numbre'; did you mean 'number'"):
        prepare_text(TextConfig(sources["jsonl"], label_type="numbre", **here), layout="documents")
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"])}
    splits = {name: [{"text": f"t {i}", "label": label} for i in range(4)] for name, label in (("a", 1), ("test", -1))}
    write_tfds(tmp_path, "secret", features, splits)
    config = TextConfig("tfds:secret", train_split="a[:2]", eval_split="a[2:]", test_split="test", **here)
    with pytest.raises(UserError, match=r"split 'test' of tfds:secret has 4 records without a label \(-1\)"):
        prepare_text(config, layout="documents")
    assert (
        prepare_text(dataclasses.replace(config, test_split=""), layout="documents").statistics["unread_splits"] == []
    )
