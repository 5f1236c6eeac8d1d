"""Question answering: windows, offsets, loss and spans against references, and a small SQuAD file learnt by heart."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_folders import write_tfds
from tokenizers import pre_tokenizers
from transformers import RobertaTokenizer

from sslx import finetune
from sslx.data.questions import Question, QuestionRows, QuestionsConfig, prepare_questions
from sslx.errors import UserError
from sslx.models.bert import BertConfig
from sslx.tasks.question_answering import QuestionAnswering, QuestionAnsweringConfig, top_spans
from sslx.train.checkpoint import read_variables
from sslx.train.sharding import unbox

MODEL = BertConfig(layers=1, width=32, heads=4, mlp_width=64, max_length=64, dropout=0.0, attention_dropout=0.0)
CONTEXTS = (
    "Ada Lovelace wrote the first program in 1843. It computed numbers on the engine of Charles Babbage in London.",
    "Grace Hopper found a moth in 1947. She glued it into the log book at Harvard and called it the first bug.",
)
ASKED = (
    (0, "Who wrote the first program?", "Ada Lovelace"),
    (0, "When was it written?", "1843"),
    (0, "Whose engine was it?", "Charles Babbage"),
    (0, "Where was the engine?", "London"),
    (1, "Who found a moth?", "Grace Hopper"),
    (1, "When was it found?", "1947"),
    (1, "Where is the log book?", "Harvard"),
    (1, "What was the first bug?", "a moth"),
    (1, "Which program ate the moth?", None),
    (0, "Who glued the engine?", None),
)


def squad(asked=ASKED, contexts=CONTEXTS):
    """SQuAD v2's JSON."""
    paragraphs = []
    for number, context in enumerate(contexts):
        items = []
        for i, (which, question, answer) in enumerate(asked):
            if which == number:
                found = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
                items.append({"id": str(i), "question": question, "answers": found, "is_impossible": answer is None})
        paragraphs.append({"context": context, "qas": items})
    return {"version": "v2.0", "data": [{"title": "made up", "paragraphs": paragraphs}]}


SETTINGS = dict(seq_len=24, doc_stride=6, max_question_length=10, vocab_size=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        (folder / name).write_text(json.dumps(squad()))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return prepare_questions(QuestionsConfig(f"squad:{folder}", **SETTINGS))


def test_windows_are_those_of_run_squad_and_cover_every_token(data):
    questions = data.train.questions
    assert len(questions) == len(ASKED)
    rows = iter(range(len(data.train)))
    several = 0
    for number, question in enumerate(questions):
        asked = data.tokenizer(question.question, add_special_tokens=False)["input_ids"]
        context = data.tokenizer(question.context, add_special_tokens=False)["input_ids"]
        room, start, covered = 24 - 3 - len(asked), 0, set()
        while True:  # run_squad's loop
            length = min(len(context) - start, room)
            row = next(rows)
            batch = {name: array[0].tolist() for name, array in data.train.fetch(np.array([row])).items()}
            ids = [data.vocabulary.cls_id, *asked, data.vocabulary.sep_id]
            expected = [*ids, *context[start : start + length], data.vocabulary.sep_id]
            assert batch["tokens"][: len(expected)] == expected
            assert set(batch["tokens"][len(expected) :]) <= {data.vocabulary.pad_id}
            assert batch["token_types"] == [0] * len(ids) + [1] * (length + 1) + [0] * (24 - len(expected))
            assert batch["segment_ids"] == [1] * len(expected) + [0] * (24 - len(expected))
            assert batch["positions"][: len(expected)] == list(range(len(expected)))
            assert (batch["context_start"], batch["context_length"]) == (len(ids), length)
            assert data.train.question_of(batch["window"]) == number
            covered |= set(range(start, start + length))
            if start + length == len(context):
                break
            start += 6
            several += 1
        assert covered == set(range(len(context)))
    assert next(rows, None) is None
    assert several > 5


def test_a_token_has_most_context_in_one_window_and_that_of_run_squad(data):
    spans = data.train.fetch(np.arange(len(data.train)))
    number = np.array([data.train.question_of(int(window)) for window in spans["window"]])
    for question in np.unique(number):
        windows, starts = np.flatnonzero(number == question), [6 * i for i in range((number == question).sum())]
        lengths = spans["context_length"][windows].tolist()
        begin, found = int(spans["context_start"][windows[0]]), {}
        for position in range(starts[-1] + lengths[-1]):
            best, best_score = None, None  # run_squad's loop
            for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                if not start <= position < start + length:
                    continue
                score = min(position - start, start + length - 1 - position) + 0.01 * length
                if best_score is None or score > best_score:
                    best, best_score = i, score
            found[position] = best
        for i, (window, start, length) in enumerate(zip(spans["window"][windows], starts, lengths, strict=True)):
            expected = [found[start + place] == i for place in range(length)]
            assert data.train.most_context(int(window), begin + np.arange(length)).tolist() == expected


def test_rows_of_roberta_have_its_two_separators():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"])}
    tokenizer = RobertaTokenizer(vocab=pieces, merges=[])
    config = QuestionsConfig("squad:x", seq_len=64, doc_stride=16, max_question_length=30)
    asked = [
        Question("Who wrote it?", "Ada wrote it.", (("Ada", 0),)),
        Question("When?", CONTEXTS[0], (("1843", CONTEXTS[0].index("1843")),)),
    ]
    rows = QuestionRows(asked, tokenizer, config)
    batch = rows.fetch(np.arange(len(rows)))
    whole = tokenizer(asked[0].question, asked[0].context).input_ids
    assert whole.count(pieces["</s>"]) == 3
    assert batch["tokens"][0].tolist() == whole + [pieces["<pad>"]] * (64 - len(whole))
    assert batch["positions"][0].max() == len(whole) - 1
    assert (batch["segment_ids"] > 0).sum() == rows.num_tokens
    full = (batch["segment_ids"] > 0).sum(axis=1)
    assert len(rows) > 3
    assert full.max() == 64
    for row, (window, first, last) in enumerate(
        zip(batch["window"], batch["answer_start"], batch["answer_end"], strict=True)
    ):
        begin, end = batch["context_start"][row], batch["context_start"][row] + batch["context_length"][row]
        assert (batch["tokens"][row, begin - 2 : begin] == pieces["</s>"]).all()
        assert batch["tokens"][row, end] == pieces["</s>"]
        question = asked[rows.question_of(int(window))]
        if first:
            start, stop = rows.characters(int(window), int(first), int(last))
            assert question.context[start:stop] == question.answers[0][0]
    tight = dataclasses.replace(config, max_question_length=45)
    with pytest.raises(UserError, match=r"config.data.doc_stride is 16; expected 1 to 15"):
        QuestionRows(asked, tokenizer, tight)


def test_an_answer_stands_in_every_window_that_holds_all_of_it(data):
    inside = np.zeros(len(data.train.questions), int)
    for row in range(len(data.train)):
        batch = {name: array[0] for name, array in data.train.fetch(np.array([row])).items()}
        question = data.train.questions[data.train.question_of(int(batch["window"]))]
        first, last = int(batch["answer_start"]), int(batch["answer_end"])
        if not first:
            assert last == 0
            continue
        start, stop = data.train.characters(int(batch["window"]), first, last)
        assert question.context[start:stop] == question.answers[0][0]
        inside[data.train.question_of(int(batch["window"]))] += 1
    assert [count > 0 for count in inside] == [bool(q.answers) for q in data.train.questions]
    assert (inside > 1).any()
    shown = objective_with(data).preview(dict(data.train.fetch(np.arange(2))) | {"row": np.arange(2)}, {})
    assert [fields["answer"] for fields in shown] == ["ada lovelace", "(not in this window)"]
    windows = [int(rows.fetch(np.array([0]))["window"][0]) for rows in (data.eval, data.train)]
    assert windows == [0, len(data.eval)]  # no two rows of a run share a number


UNICODE = "Im Café “Zürich”— naïve Élan, 東京は大きい, 𝔘𝔫𝔦 и ещё ЁЛКА; ǅ İstanbul ﬁn 🙂🙃 end"


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "byte", "char"])
def test_offsets_lead_back_to_the_very_characters(folder, tmp_path, kind):
    answers = ("Café", "Zürich", "naïve Élan", "東京は大きい", "𝔘𝔫𝔦", "ещё ЁЛКА", "İstanbul", "🙂🙃 end")
    asked = [(0, "Was?", answer) for answer in answers]
    (tmp_path / "u.json").write_text(json.dumps(squad(asked, [UNICODE])))
    splits = dict(train_split="train", eval_split="validation")
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text((tmp_path / "u.json").read_text())
    (tmp_path / "u.json").unlink()
    settings = dict(seq_len=256, max_question_length=8, doc_stride=32, vocab_size=600, tokenizer=kind, **splits)
    rows = prepare_questions(QuestionsConfig(f"squad:{tmp_path}", **settings)).train
    batch = rows.fetch(np.arange(len(rows)))
    said = []
    for window, first, last in zip(batch["window"], batch["answer_start"], batch["answer_end"], strict=True):
        start, stop = rows.characters(int(window), int(first), int(last))
        said.append(UNICODE[start:stop].strip())
    assert said == list(answers)


@pytest.fixture(scope="module")
def batch(data):
    rows = np.arange(16)
    return dict(data.train.fetch(rows)) | {"row": rows.astype(np.int32)}


def objective_with(data, dropout=0.0):
    model = dataclasses.replace(MODEL, dropout=dropout, attention_dropout=dropout)
    task, config = QuestionAnsweringConfig(), QuestionsConfig(**SETTINGS)
    return QuestionAnswering(task, model, data.vocabulary.size, data.tokenizer, config, True, (data.eval,))


def test_the_loss_is_over_the_context_and_cls(data, batch):
    objective = objective_with(data)
    params = unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())["params"]
    params = jax.tree.map(lambda array: array * 5.0, params)
    viewed = objective.views(batch, jax.random.key(0), 0, train=True)
    start, end = (np.float64(x) for x in objective.module.apply({"params": params}, viewed, deterministic=True))
    expected = 0.0
    for row in range(16):
        begin, length = batch["context_start"][row], batch["context_length"][row]
        places = [0, *range(begin, begin + length)]
        for logits, target in ((start, "answer_start"), (end, "answer_end")):
            among = logits[row, places]
            expected += (np.log(np.exp(among).sum()) - logits[row, batch[target][row]]) / 2
    out = objective.loss(params, {}, viewed, jax.random.key(0), jnp.int32(0), train=False)
    assert out.terms["answer"].sum == pytest.approx(expected, rel=1e-5)
    # An encoder that knows one token type, as RoBERTa, sees no other.
    one = dataclasses.replace(objective, model=dataclasses.replace(MODEL, token_types=1))
    assert viewed["token_types"].max() == 1
    params = one.init(jax.random.key(0), batch)["params"]
    untyped = viewed | {"token_types": np.zeros_like(viewed["token_types"])}
    for given in zip(*(one.predict(params, {}, seen).values() for seen in (viewed, untyped)), strict=True):
        np.testing.assert_array_equal(*given)


def test_spans_are_the_best_of_all_pairs():
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(2, 5, 20)).astype(np.float32)
    possible = (np.arange(20) >= 6) & (np.arange(20) < np.array([20, 14, 9, 7, 6])[:, None])
    scores, starts, ends = jax.device_get(top_spans(start, end, possible, 4, 8))
    for row in range(5):
        places = np.flatnonzero(possible[row])
        pairs = [(start[row, s] + end[row, e], s, e) for s in places for e in places if s <= e < s + 4]
        best = sorted(pairs, reverse=True)[:8]
        np.testing.assert_allclose(scores[row, : len(best)], [pair[0] for pair in best], rtol=1e-6)
        assert list(zip(starts[row], ends[row], strict=True))[: len(best)] == [pair[1:] for pair in best]
        assert (scores[row, len(best) :] < -1e8).all()


def test_the_best_window_answers_and_the_least_sure_null_counts(data):
    rows, objective = data.eval, objective_with(data)
    windows = [w for w in range(len(rows)) if rows.question_of(w) == 0]
    assert len(windows) >= 2
    begin = int(rows.fetch(np.array([0]))["context_start"][0])
    most = rows.most_context(windows[1], begin + np.arange(6))
    own = int(np.argmax(most))  # how far into the second window its own tokens begin
    assert own > 0
    # Two windows: a span of the second wins, since the one above it has more context in the first; and its [CLS] is
    # the less sure of the two.
    predictions = {
        "window": np.array(windows[:2]),
        "scores": np.array([[2.0, 1.0, -2e9], [5.0, 3.0, -2e9]]),
        "starts": np.array([[begin, begin, 0], [begin, begin + own, 0]]),
        "ends": np.array([[begin + 1, begin, 0], [begin, begin + own, 0]]),
        "null": np.array([9.0, 2.5]),
    }
    answered = objective.answers_of(predictions, rows, count=3)[0]
    context = rows.questions[0].context
    tokens = data.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    first = context[tokens[0][0] : tokens[1][1]]
    assert [answer.score for answer in answered.answers] == [3.0, 2.0, 1.0]
    assert answered.answers[1].text == first
    assert (
        answered.answers[0].text == context[slice(*tokens[6 + own])] == answered.text
    )  # the second window begins at 6
    assert answered.no_answer == pytest.approx(-0.5)
    strict = dataclasses.replace(objective, task=QuestionAnsweringConfig(null_threshold=-1.0))
    assert strict.answers_of(predictions, rows)[0].text == ""
    v1 = dataclasses.replace(strict, unanswerable=False)
    assert v1.answers_of(predictions, rows)[0].text == answered.text
    assert set(v1.score(predictions)) == {"exact_match", "f1"}
    scores = objective.score(predictions)  # of the one question of which there are predictions
    assert scores["has_answer_exact_match"] == scores["exact_match"] == 0.0


def test_eight_devices_give_the_gradients_of_one(data, batch, gradients_on, assert_close):
    objective = objective_with(data, dropout=0.1)
    (metrics, gradients), (others, also) = (gradients_on(objective, batch, devices) for devices in (1, 8))
    assert others["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert_close(gradients, also)


def test_a_file_is_learnt_by_heart_and_its_run_answers(folder, tiny_config, tmp_path):
    settings = {f"data.{name}": value for name, value in SETTINGS.items()} | {
        "init": "scratch",
        "data.source": f"squad:{folder}",
        "data.train_split": "train",
        "data.eval_split": "validation",  # the same questions: nothing but memory is asked for
        "task.dropout": 0.0,
        "eval.examples": 2,
        "steps": 100,
        "optimizer.learning_rate": 5e-3,
        "optimizer.layer_decay": 1.0,
        "optimizer.warmup_steps": 10,
        "eval.every_steps": 50,
        "log.every_steps": 50,
    }
    run = tmp_path / "run"
    session = finetune.main(tiny_config("finetune/question_answering", settings), run)
    report = json.loads((run / "report.json").read_text())
    assert report["questions"] == len(ASKED)
    names = ("exact_match", "f1", "has_answer_exact_match", "no_answer_exact_match", "best_f1")
    assert {name: report[f"eval/{name}"] for name in names} == dict.fromkeys(names, 100.0)

    objective = QuestionAnswering.restored(session.written, run)
    rows = objective.rows_of([Question(question, CONTEXTS[which]) for which, question, _ in ASKED])
    given = dict(rows.fetch(np.arange(len(rows)))) | {"row": np.arange(len(rows))}
    viewed = objective.views(given, None, 0, train=False)
    predictions = jax.device_get(objective.predict(read_variables(run)["params"], {}, viewed))
    answered = objective.answers_of(predictions, rows, count=3)
    assert [answer.text for answer in answered] == [answer or "" for _, _, answer in ASKED]
    assert all(len(answer.answers) == 3 for answer in answered)


@pytest.fixture(scope="module")
def misplaced(tmp_path_factory):
    """A folder of SQuAD's files in which four answers are not where they are said to be."""
    given, folder = squad(), tmp_path_factory.mktemp("misplaced")
    items = given["data"][0]["paragraphs"][0]["qas"]
    items[0]["answers"].append({"text": "Countess Ada", "answer_start": 1})  # beside a good one
    items[1]["answers"] = [{"text": "Ada 1999", "answer_start": 40}]
    items[2]["answers"] = [{"text": "Ada Lovelace.", "answer_start": 10_000}, {"text": "", "answer_start": 0}]
    for name in ("train.json", "dev.json", "test.json"):
        (folder / name).write_text(json.dumps(given))
    return folder


def test_answers_that_are_not_in_the_context_are_skipped_in_training_counted_and_told(misplaced, capsys):
    data = prepare_questions(QuestionsConfig(f"squad:{misplaced}", **SETTINGS))
    assert data.statistics["train_misplaced_answers"] == data.statistics["eval_misplaced_answers"] == 4
    assert data.statistics["train_misplaced_questions"] == data.statistics["eval_misplaced_questions"] == 2
    assert data.statistics["train_questions"] == len(ASKED) - 2
    assert data.train.questions[0].answers == (("Ada Lovelace", 0),)
    said = capsys.readouterr().out
    there = "4 answers are not in their context at answer_start, and 2 questions have no other; these are"
    assert f"train: {there} skipped (first: 'Who wrote the first program?')" in said
    assert f"eval: {there} scored by their text alone (first: " in said


def test_answers_that_are_not_at_their_place_are_scored_by_their_text_as_squad_does(misplaced):
    data = prepare_questions(QuestionsConfig(f"squad:{misplaced}", test_split="test", **SETTINGS))
    for rows in (data.eval, data.test):
        assert len(rows.questions) == len(ASKED)
        assert rows.unanswerable == 2
        assert [[text for text, _ in question.answers] for question in rows.questions[:3]] == [
            ["Ada Lovelace", "Countess Ada"],
            ["Ada 1999"],
            ["Ada Lovelace.", ""],
        ]
        batch = rows.fetch(np.arange(len(rows)))
        labels = {number: [] for number in range(len(ASKED))}
        for window, first, last in zip(batch["window"], batch["answer_start"], batch["answer_end"], strict=True):
            labels[rows.question_of(int(window))].append((int(first), int(last)))
        assert max(labels[0]) > (0, 0)
        assert set(labels[1]) == set(labels[2]) == {(0, 0)}
    # To each of the first three questions the model says "Ada Lovelace". By hand, after evaluate-v2.0.py: exact 1, 0
    # and 1 (punctuation does not count), F1 1, 2 * 1 / (2 + 2) and 1 (the empty text is no gold answer).
    batch = data.eval.fetch(np.arange(len(data.eval)))
    number = np.array([data.eval.question_of(int(window)) for window in batch["window"]])
    rows = [int(np.flatnonzero(number == question)[0]) for question in range(3)]
    words = batch["answer_end"][rows[0]] - batch["answer_start"][rows[0]]
    starts = batch["context_start"][rows][:, None]
    spans = {"scores": np.full((3, 1), 5.0), "starts": starts, "ends": starts + words, "null": np.zeros(3)}
    scores = objective_with(data).score(spans | {"window": batch["window"][rows]})
    expected = {"exact_match": 200 / 3, "f1": 250 / 3}
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert {name: scores[f"has_answer_{name}"] for name in expected} == pytest.approx(expected)


def test_a_dataset_with_features_of_squad_gives_the_same_rows(data, tmp_path):
    answers = tfds.features.Sequence({"text": tfds.features.Text(), "answer_start": np.int32})
    features = {name: tfds.features.Text() for name in ("id", "question", "context")} | {"answers": answers}
    examples = []
    for paragraph in squad()["data"][0]["paragraphs"]:
        for item in paragraph["qas"]:
            found = {name: [answer[name] for answer in item["answers"]] for name in ("text", "answer_start")}
            texts = {name: item[name] for name in ("id", "question")}
            examples.append(texts | {"context": paragraph["context"], "answers": found})
    write_tfds(tmp_path, "asked", features, {"train": examples, "validation": examples})
    made = prepare_questions(QuestionsConfig("tfds:asked", tfds_dir=str(tmp_path), **SETTINGS))
    assert made.kept == data.kept == {"question_answering.json": {"unanswerable": True}}
    rows = np.arange(len(data.train))
    for name, array in made.train.fetch(rows).items():
        np.testing.assert_array_equal(array, data.train.fetch(rows)[name])


def test_slices_of_one_file_share_no_context(tmp_path):
    contexts = [f"{context} Chapter {chapter}." for chapter in range(12) for context in CONTEXTS]
    asked = [(i, f"{question} {i}", answer) for i in range(24) for which, question, answer in ASKED if which == i % 2]
    (tmp_path / "all.json").write_text(json.dumps(squad(asked, contexts)))
    thirds = dict(train_split="train[:50%]", eval_split="train[50%:75%]", test_split="train[75%:]")
    for splits in ({}, thirds, dict(train_split="train[7:]", eval_split="train[:7]")):
        made = prepare_questions(QuestionsConfig(f"squad:{tmp_path}", **SETTINGS, **splits))
        parts = [rows.questions for rows in (made.train, made.eval, made.test) if rows is not None]
        assert sum(map(len, parts)) == len(asked)
        found = [{question.context for question in part} for part in parts]
        assert sum(map(len, found)) == len(contexts) == len(set.union(*found))
        assert len(made.eval.questions) == pytest.approx({0: 2.4, 3: 30, 2: 7}[len(splits)], abs=3)
    assert sorted(found[1]) != sorted(contexts)[: len(found[1])]
    (tmp_path / "all.json").write_text(json.dumps(squad(ASKED[:3], CONTEXTS[:1])))
    with pytest.raises(UserError, match="has one context, and training needs another one to evaluate on"):
        prepare_questions(QuestionsConfig(f"squad:{tmp_path}", **SETTINGS))
    cut = dict(train_split="train[:1]", eval_split="train[1:]")
    with pytest.raises(UserError, match=r"\(train has 3 records; those of one context stay together\)"):
        prepare_questions(QuestionsConfig(f"squad:{tmp_path}", **SETTINGS, **cut))


def test_long_questions_are_cut_and_counted(folder):
    data = prepare_questions(QuestionsConfig(f"squad:{folder}", **SETTINGS | {"max_question_length": 5}))
    cut = sum(len(data.tokenizer(q, add_special_tokens=False)["input_ids"]) > 5 for _, q, _ in ASKED)
    assert data.statistics["train_questions_cut"] == cut > 0
    assert (data.train.fetch(np.arange(len(data.train)))["context_start"] <= 7).all()


@pytest.mark.parametrize("answers", [{}, {"answers": None}])
def test_questions_without_an_answer_may_leave_out_their_answers(data, tmp_path, answers):
    given = squad()
    items = [item for paragraph in given["data"][0]["paragraphs"] for item in paragraph["qas"]]
    impossible = [item for item in items if item["is_impossible"]]
    assert len(impossible) == 2
    for item in impossible:
        del item["answers"]
        item.update(answers)
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        (tmp_path / name).write_text(json.dumps(given))
    found = prepare_questions(QuestionsConfig(f"squad:{tmp_path}", **SETTINGS))
    assert found.train.questions == data.train.questions
    assert found.statistics["train_unanswerable"] == 2
    impossible[0]["is_impossible"] = False
    (tmp_path / "train-v2.0.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match=r"train-v2.0.json is no SQuAD file.*qas\[\d\] has no 'answers' that is a list"):
        prepare_questions(QuestionsConfig(f"squad:{tmp_path}", **SETTINGS))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[1, 2", r"a\.json:1: not JSON"),
        ("[]", r"a\.json is no SQuAD file: the file has no 'data' that is a list; expected data > paragraphs"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\]\.paragraphs\[0\] has no 'context' that is a text"),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b", "answers": [{"text": "a"}]}]}]}]}',
            r"qas\[0\]\.answers\[0\] has no 'answer_start' that is a number",
        ),
        ('{"data": []}', "holds no records"),
    ],
)
def test_a_file_that_is_not_squad_is_refused(tmp_path, content, match):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=match):
        prepare_questions(QuestionsConfig(f"squad:{tmp_path}", **SETTINGS))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(doc_stride=0), r"config.data.doc_stride is 0; expected 1 to 11, the tokens of context beside a question"),
        (dict(doc_stride=12), r"config.data.doc_stride is 12; expected 1 to 11"),
        (
            dict(max_question_length=24),
            r"config.data.max_question_length is 24; expected 1 to 20, or a question leaves",
        ),
        (dict(seq_len=4), r"config.data.seq_len=4 is too short"),
    ],
)
def test_windows_that_cannot_be_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        QuestionsConfig("squad:x", **SETTINGS | settings)


def test_no_usable_question_is_refused(tmp_path):
    given = squad([(0, "Who?", "Ada"), (0, "Why?", "It")], CONTEXTS[:1])
    for item in given["data"][0]["paragraphs"][0]["qas"]:
        item["answers"][0]["answer_start"] += 1
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text(json.dumps(given))
    with pytest.raises(UserError, match="no question has an answer that is in its context at answer_start"):
        prepare_questions(QuestionsConfig(f"squad:{tmp_path}", **SETTINGS))


def test_rows_of_no_context_have_no_span(data):
    rows = QuestionRows([Question("Who?", "")], data.tokenizer, QuestionsConfig(**SETTINGS))
    batch = rows.fetch(np.array([0]))
    assert (len(rows), batch["context_length"].tolist()) == (1, [0])
