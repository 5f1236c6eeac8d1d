"""Token tagging: entities against cases done by hand, rows against the tokenizer's words, a task learnt by heart."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_folders import write_tfds

from sslx import finetune
from sslx.data.tagged_words import NO_TAG, TaggedRows, TaggedWordsConfig, prepare_tagged_words
from sslx.data.text import saved_tokenizer
from sslx.errors import UserError
from sslx.models.bert import BertConfig
from sslx.tasks.entities import Span, are_entities, entity_scores, spans
from sslx.tasks.token_tagging import TokenTagging, TokenTaggingConfig
from sslx.train.checkpoint import read_variables
from sslx.train.sharding import unbox

MODEL = BertConfig(layers=1, width=32, heads=4, mlp_width=64, max_length=32, dropout=0.1, attention_dropout=0.1)
NAMES = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("O I-PER I-PER O", [("PER", 1, 3)]),  # I without B
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),  # another type begins
        ("I-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-LOC I-LOC", [("LOC", 0, 2)]),  # to the end
        ("S-PER B-LOC I-LOC E-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 4), ("LOC", 4, 5)]),
        ("B-A-B I-A-B O", [("A-B", 0, 2)]),
        ("O O", []),
        ("", []),
    ],
)
def test_spans_are_those_of_conll(tags, expected):
    assert spans(tags.split()) == [Span(*span) for span in expected]


def test_entity_scores_count_whole_entities_of_the_right_type():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "I-LOC", "O"]]
    guessed = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "I-LOC", "B-PER"]]  # one cut short, two right, one made up
    scores = entity_scores(gold, guessed)
    assert scores["LOC"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}
    assert scores["PER"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert scores["all"] == {"precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7), "support": 3}


def test_parts_of_speech_are_no_entities():
    assert are_entities(NAMES)
    assert not are_entities(("NN", "VB", "O"))
    assert not are_entities(("O",))


CITIES, PEOPLE = ("Paris", "Lima", "New Delhi", "Oslo"), ("Ada Lovelace", "Alan Turing", "Grace")


def sentences(count=48, seed=0):
    """Words and tags of made-up sentences."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        words, tags = [], []
        city, person = CITIES[rng.integers(4)], PEOPLE[rng.integers(3)]
        for kind, phrase in (("PER", person), (None, "went by train to"), ("LOC", city), (None, ".")):
            for i, word in enumerate(phrase.split()):
                words.append(word)
                tags.append(f"{'I' if i else 'B'}-{kind}" if kind else "O")
        made.append((words, tags))
    return made


def conll(made):
    blocks = ["\n".join(f"{word} X {tag}" for word, tag in zip(words, tags, strict=True)) for words, tags in made]
    return "-DOCSTART- -X- O O\n\n" + "\n\n".join(blocks) + "\n"


@pytest.fixture(scope="module")
def conll_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conll")
    (folder / "train.txt").write_text(conll(sentences()))
    (folder / "valid.txt").write_text(conll(sentences(8, seed=1)))
    (folder / "test.txt").write_text(conll(sentences(8, seed=2)))
    return folder


def prepared(source, **settings):
    return prepare_tagged_words(TaggedWordsConfig(str(source), **{"seq_len": 32, "vocab_size": 200, **settings}))


def test_a_words_tag_stands_on_its_first_piece(conll_folder):
    data, names = prepared(f"conll:{conll_folder}", test_split="test")
    assert names == NAMES
    assert (len(data.train), len(data.eval), len(data.test)) == (48, 8, 8)  # splits by the names of the files
    given = [*sentences(8, seed=1), (["Paristrain", "Limatheo", "."], ["B-LOC", "I-LOC", "O"])]  # several pieces each
    numbers = [[names.index(tag) for tag in tags] for _, tags in given]
    batch = TaggedRows([words for words, _ in given], numbers, data.tokenizer, 32).fetch(np.arange(9))
    for name, array in data.eval.fetch(np.arange(8)).items():
        np.testing.assert_array_equal(array, batch[name][:8])
    for row, (words, _) in enumerate(given):
        # The tokenizer's own account of which word a piece belongs to.
        reference = data.tokenizer(words, is_split_into_words=True)
        ids, owners = reference["input_ids"], reference.word_ids()
        assert batch["tokens"][row, : len(ids)].tolist() == ids
        assert (batch["tokens"][row, len(ids) :] == data.vocabulary.pad_id).all()
        assert batch["segment_ids"][row].tolist() == [1] * len(ids) + [0] * (32 - len(ids))
        assert batch["positions"][row, : len(ids)].tolist() == list(range(len(ids)))
        expected = [NO_TAG] * 32
        for word, number in enumerate(numbers[row]):
            expected[owners.index(word)] = number
        assert batch["tags"][row].tolist() == expected
    assert owners.count(0) > 1
    objective = TokenTagging(TokenTaggingConfig(), MODEL, data.vocabulary.size, data.tokenizer, 32, names)
    shown = objective.preview(batch | {"row": np.arange(9)}, batch)
    for (_, tags), fields in zip(given, shown, strict=True):
        seen = [piece.rpartition("/")[2] for piece in fields["text"].split() if "/" in piece]
        assert seen == tags


@pytest.mark.parametrize("tokenizer", ["wordpiece", "bpe", "byte", "char"])
def test_every_tokenizer_finds_each_word_once(conll_folder, tokenizer):
    data, _ = prepared(f"conll:{conll_folder}", tokenizer=tokenizer, vocab_size=400, seq_len=64)
    rows = TaggedRows([["Ünï", "x", "日本", "e-mail"]], None, data.tokenizer, 64)
    words = rows.words_at(0)
    assert words[words != NO_TAG].tolist() == [0, 1, 2, 3]
    spaces = data.tokenizer.decode(rows.fetch(np.array([0]))["tokens"][0][words != NO_TAG])
    assert "  " not in spaces


def test_words_beyond_the_row_are_counted(conll_folder, capsys):
    data, _ = prepared(f"conll:{conll_folder}", seq_len=8)
    words = sum(len(words) for words, _ in sentences())
    asked = (data.train.fetch(np.arange(48))["tags"] != NO_TAG).sum()
    assert data.statistics["train_words"] == words
    assert data.statistics["train_words_cut"] == words - asked > 0
    assert f"train: {words - asked} of {words} words are beyond config.data.seq_len" in capsys.readouterr().out
    control = TaggedRows([["a", "\x01", "b"]], None, data.tokenizer, 16)
    assert (control.words_without_pieces, control.words_cut) == (1, 0)
    assert [word for word in control.words_at(0) if word != NO_TAG] == [0, 2]


def test_entities_beyond_the_row_are_missed_as_conlleval_has_it(conll_folder):
    data, names = prepared(f"conll:{conll_folder}")
    given = (
        ("a b c d e f g h", "B-PER O O O O O B-LOC I-LOC"),  # the second is beyond the six words of a row of eight
        ("a b c d e f g h", "O O O O O B-LOC I-LOC O"),  # cut in two
        ("a \x01 c", "B-PER I-PER O"),  # has a word without a piece
    )
    numbers = [[names.index(tag) for tag in tags.split(" ")] for _, tags in given]
    others = TaggedRows([["a"]] * 5, [[0]] * 5, data.tokenizer, 8)
    rows = TaggedRows([words.split(" ") for words, _ in given], numbers, data.tokenizer, 8, len(others))
    assert (rows.words_cut, rows.words_without_pieces) == (4, 1)
    batch = rows.fetch(np.arange(3))
    assert batch["sentence"].tolist() == [5, 6, 7]
    model = TokenTagging(TokenTaggingConfig(), MODEL, data.vocabulary.size, data.tokenizer, 8, names, (others, rows))
    # It guesses right wherever it is asked: one of four entities is whole, and two guessed ones are not.
    predictions = batch | {"guesses": np.maximum(batch["tags"], 0)}
    expected = {"entity_precision": 1 / 3, "entity_recall": 1 / 4, "entity_f1": 2 / 7}
    assert model.score(predictions) == pytest.approx(expected)
    report = model.report(predictions)
    assert report.values["entities"]["all"]["support"] == 4
    some = {name: array[[2, 0]] for name, array in predictions.items()}  # of any rows, in any order
    expected = {"entity_precision": 1 / 2, "entity_recall": 1 / 3, "entity_f1": 2 / 5}
    assert model.score(some) == pytest.approx(expected)


def test_files_of_json_lines_give_the_same_rows(conll_folder, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"tokens": w, "tags": t}) + "\n" for w, t in sentences()))
    splits = dict(train_split="train[:40]", eval_split="train[40:]")
    (one, _), (other, _) = prepared(f"jsonl:{file}", **splits), prepared(f"conll:{conll_folder}/train.txt", **splits)
    for name, array in one.eval.fetch(np.arange(8)).items():
        np.testing.assert_array_equal(array, other.eval.fetch(np.arange(8))[name])
    held_out, _ = prepared(f"jsonl:{file}")  # a share by default
    assert (held_out.statistics["train_rows"], held_out.statistics["eval_split"]) == (47, "train[-1:]")


def test_a_dataset_with_features_of_conll2003_gives_the_same_rows(conll_folder, tmp_path):
    classes = tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    features = {"tokens": tfds.features.Sequence(tfds.features.Text()), "ner": classes, "id": tfds.features.Text()}
    made = {"train": sentences(), "validation": sentences(8, seed=1)}
    examples = {split: [{"tokens": w, "ner": t, "id": "x"} for w, t in found] for split, found in made.items()}
    write_tfds(tmp_path, "named", features, examples)
    (one, names), (other, _) = (
        prepared("tfds:named", tfds_dir=str(tmp_path), tags_field="ner"),
        prepared(f"conll:{conll_folder}"),
    )
    assert names == NAMES
    for name, array in one.eval.fetch(np.arange(8)).items():
        np.testing.assert_array_equal(array, other.eval.fetch(np.arange(8))[name])
    said = r"^tfds:named has no field 'tags'; valid: id, ner, tokens; --config.data.tags_field=NAME reads another$"
    with pytest.raises(UserError, match=said):
        prepared("tfds:named", tfds_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"field 'id' is no sequence of class labels"):
        prepared("tfds:named", tfds_dir=str(tmp_path), tags_field="id")


def test_numbers_are_words_and_tags(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["in", 1999, 2.5], "tags": [0, 1, 1]}\n' * 60)
    data, names = prepared(f"jsonl:{tmp_path / 'a.jsonl'}", tokenizer="byte")
    assert names == ("0", "1")
    assert (
        data.tokenizer.decode(data.train.fetch(np.array([0]))["tokens"][0], skip_special_tokens=True) == "in 1999 2.5"
    )


def test_half_a_surrogate_pair_in_a_word_is_an_unknown_character(tmp_path):
    records = [{"tokens": ["EU", "caf\ud800"], "tags": ["B-ORG", "O"]}, {"tokens": ["caf\ufffd"], "tags": ["O"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data, names = prepared(f"jsonl:{tmp_path / 'a.jsonl'}", tokenizer="char")
    assert names == ("B-ORG", "O")
    pieces = set(data.tokenizer.get_vocab())
    assert "\ufffd" in pieces
    assert "\ud800" not in pieces


def test_fingerprint_follows_the_fields_and_which_file_is_which_split(conll_folder, tmp_path):
    for name in ("train", "dev"):
        record = {"tokens": ["a"], "words": [name], "tags": ["O"], "pos": ["X"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")

    def tokenizer_of(source=f"jsonl:{tmp_path}", eval_split="validation", **fields):
        # It is named by the fingerprint of the records that it is trained on.
        data, _ = prepared(source, tokenizer="byte", train_split="train", eval_split=eval_split, **fields)
        return data.tokenizer.name_or_path

    found = [tokenizer_of(), tokenizer_of(tokens_field="words"), tokenizer_of(tags_field="pos")]
    (tmp_path / "dev.jsonl").rename(tmp_path / "test.jsonl")
    found.append(tokenizer_of(eval_split="test"))
    (tmp_path / "train.jsonl").rename(tmp_path / "dev.jsonl")
    (tmp_path / "test.jsonl").rename(tmp_path / "train.jsonl")
    found.append(tokenizer_of())
    found += [tokenizer_of(f"conll:{conll_folder}", tag_column=column) for column in (-1, 0)]
    tagged = tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "X"]))
    features = {"tokens": tfds.features.Sequence(tfds.features.Text()), "ner": tagged, "pos": tagged}
    examples = [{"tokens": ["a"], "ner": ["O"], "pos": ["X"]}]
    write_tfds(tmp_path, "named", features, {"train": examples, "validation": examples})
    found += [tokenizer_of("tfds:named", tfds_dir=str(tmp_path), tags_field=name) for name in ("ner", "pos")]
    assert len(set(found)) == len(found)


def test_tags_that_mark_no_entities_are_told_before_their_metric_is_missed(tmp_path, tiny_config):
    (tmp_path / "a.txt").write_text("".join(f"word{i} NOUN\ngoes VERB\n\n" for i in range(60)))
    config = tiny_config("finetune/token_tagging", {"data.source": f"conll:{tmp_path}/a.txt"}).to_dict()
    with pytest.raises(UserError, match=r"begin no entities \(B-X, I-X\); for other tags see .*tags=pos"):
        TokenTagging.prepare(config)


def test_bad_files_are_told_by_line(tmp_path):
    def refused(name, content, source, match, **settings):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=match):
            prepared(f"{source}:{tmp_path / name}", **settings)

    refused("a.txt", "EU B-ORG\nrejects\n", "conll", r"a\.txt:2: expected a word and a tag, got 'rejects'")
    refused("b.txt", "EU B-ORG\n", "conll", r"b\.txt:1: expected a column 3", tag_column=3)
    good, unequal = '{"tokens": ["a"], "tags": ["O"]}\n', '{"tokens": ["a", "b"], "tags": ["O"]}\n'
    refused("c.jsonl", good + unequal, "jsonl", r"c\.jsonl:2: 2 tokens and 1 tags; expected a tag for each token")
    said = r"d\.jsonl:1: no field 'tags'; did you mean 'tag'\? .*; --config\.data\.tags_field=NAME reads another$"
    refused("d.jsonl", '{"tokens": ["a"], "tag": ["O"]}\n', "jsonl", said)
    refused("e.jsonl", '{"tokens": "a", "tags": ["O"]}\n', "jsonl", r"field 'tokens' is no list but str")
    refused("f.jsonl", good + "{\n", "jsonl", r"f\.jsonl:2: not JSON")
    for item, kind in {"null": "null", '["a"]': "a list", '{"a": "b"}': "an object", "true": "true or false"}.items():
        bad = good + f'{{"tokens": ["a", {item}], "tags": ["O", "O"]}}\n'
        refused("h.jsonl", bad, "jsonl", rf"h\.jsonl:2: tokens\[1\] is {kind}; expected a string or a number$")
        bad = good.replace("tags", "ner") + f'{{"tokens": ["a"], "ner": [{item}]}}\n'
        said = rf"i\.jsonl:2: ner\[0\] is {kind}; expected a string or a number$"
        refused("i.jsonl", bad, "jsonl", said, tags_field="ner")
    refused("g.txt", "\n\n", "conll", "holds no records")
    with pytest.raises(
        UserError, match=r"config.data.source is empty; expected one of python_names, conll:GLOB, jsonl:GLOB, tfds"
    ):
        prepared("")
    with pytest.raises(UserError, match=r"unknown data source 'conl:x'; did you mean 'conll:GLOB'"):
        prepared("conl:x")


def objective_with(vocabulary, dropout=0.0):
    model = dataclasses.replace(MODEL, dropout=dropout, attention_dropout=dropout)
    return TokenTagging(TokenTaggingConfig(), model, vocabulary.size, None, 24, NAMES)


@pytest.fixture
def batch(packed_rows):
    rows = {name: packed_rows(16, 24)[name] for name in ("tokens", "segment_ids", "positions", "row")}
    rng = np.random.default_rng(0)
    asked = (rng.random((16, 24)) < 0.5) & (rows["segment_ids"] > 0)
    return rows | {"tags": np.where(asked, rng.integers(0, 5, (16, 24)), NO_TAG).astype(np.int32)}


def test_the_loss_is_the_mean_over_words(vocabulary, batch):
    objective = objective_with(vocabulary)
    params = unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())["params"]
    params = jax.tree.map(lambda array: array * 5.0, params)
    viewed = objective.views(batch, jax.random.key(0), 0, train=False)
    logits = np.float64(objective.module.apply({"params": params}, viewed, deterministic=True))
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    where = np.argwhere(batch["tags"] != NO_TAG)
    expected = -sum(log_probabilities[r, p, batch["tags"][r, p]] for r, p in where)
    out = objective.loss(params, {}, viewed, jax.random.key(0), jnp.int32(0), train=False)
    assert out.terms["tagging"].sum == pytest.approx(expected, rel=1e-5)
    assert viewed["weights"]["tagging"].sum() == len(where)
    hits = sum(logits[r, p].argmax() == batch["tags"][r, p] for r, p in where)
    assert out.metrics["accuracy"].sum == hits


def test_eight_devices_give_the_gradients_of_one(vocabulary, batch, gradients_on, assert_close):
    objective = objective_with(vocabulary, dropout=0.1)
    (metrics, gradients), (others, also) = (gradients_on(objective, batch, devices) for devices in (1, 8))
    assert others["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert_close(gradients, also)


def test_a_task_is_learnt_by_heart_and_its_run_tags_words(conll_folder, tiny_config, tmp_path):
    settings = {
        "init": "scratch",
        "data.source": f"conll:{conll_folder}",
        "data.train_split": "train",
        "data.eval_split": "validation",
        "data.test_split": "test",
        "data.vocab_size": 200,
        "model.layers": 1,
        "steps": 40,
        "optimizer.learning_rate": 5e-3,
        "optimizer.layer_decay": 1.0,
        "optimizer.schedule": "constant",
        "eval.every_steps": 20,
        "eval.examples": 2,
        "log.every_steps": 20,
    }
    run = tmp_path / "run"
    session = finetune.main(tiny_config("finetune/token_tagging", settings), run)
    report = json.loads((run / "report.json").read_text())
    assert report["test/entity_f1"] == 1.0
    assert report["entities"]["LOC"]["support"] == 8
    assert report["entities"]["PER"]["f1"] == 1.0
    assert session.trained.metrics["eval/accuracy"] == 1.0

    # What the run keeps is enough to tag words with.
    objective = TokenTagging.restored(session.written, run)
    assert objective.tokenizer.get_vocab() == saved_tokenizer(run)[0].get_vocab()
    given = [["Grace", "went", "by", "train", "to", "New", "Delhi", "."], ["Lima"] * 40]
    rows = objective.rows_of(given)
    viewed = objective.views(rows.fetch(np.arange(2)) | {"row": np.arange(2)}, None, 0, train=False)
    predictions = jax.device_get(objective.predict(read_variables(run)["params"], {}, viewed))
    tags = objective.tags_of(predictions, rows, given)
    assert tags[0] == ["B-PER", "O", "O", "O", "O", "B-LOC", "I-LOC", "O"]
    assert None not in tags[1][:10]
    assert tags[1][-1] is None
