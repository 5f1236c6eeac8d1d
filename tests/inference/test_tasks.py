"""Pairs, tags and answers through the API: against the tasks' own predictions on single rows."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

import sslx
from sslx.data.questions import Question
from sslx.errors import UserError
from sslx.session import train
from sslx.train.checkpoint import read_variables

SENTENCES = ["anna met bob .", "bob lives in rome", "the river runs past rome and anna saw it ."]
TAG = {"anna": "B-PER", "bob": "B-PER", "rome": "B-LOC"}


@pytest.fixture(scope="module")
def make(tiny_config, tmp_path_factory):
    def make(name, lines, suffix, **changes):
        folder = tmp_path_factory.mktemp("tasks")
        file = folder / f"{name}{suffix}"
        file.write_text(lines)
        changes = {
            "data.source": f"{changes.pop('scheme')}:{file}",
            "init": "scratch",
            "steps": 2,
            **changes,
            "optimizer.warmup_steps": 1,
        }
        changes |= {"eval.batches": 1, "checkpoint.best_metric": "eval/loss", "checkpoint.best_mode": "min"}
        config = tiny_config(f"finetune/{name}", changes)
        train(config.to_dict(), folder / name, part="task", tokenizer=None, title="test")
        return folder / name

    return make


@pytest.fixture(scope="module")
def tagger(make):
    records = [{"tokens": s.split(), "tags": [TAG.get(w, "O") for w in s.split()]} for s in SENTENCES * 20]
    return make("token_tagging", "".join(json.dumps(r) + "\n" for r in records), ".jsonl", scheme="jsonl")


def test_tags_are_those_of_the_task_and_do_not_depend_on_the_batch(tagger):
    run = tagger
    model = sslx.load(run)
    assert model.verbs == ("tag", "embed")
    texts = ["Anna met Bob.", "rome", "the river, past rome " * 20]
    with pytest.warns(UserWarning, match="^1 of 3 texts are longer than the 32 tokens that the model sees"):
        together = model.tag(texts)
    assert together[0].words == ("Anna", "met", "Bob", ".")
    objective, params = model.run.objective, read_variables(run, model.run.step)["params"]
    for found in together:
        rows = objective.rows_of([found.words])
        predictions = objective.predict(params, {}, rows.fetch(np.array([0])))
        (expected,) = objective.tags_of({k: np.asarray(v) for k, v in predictions.items()}, rows, [found.words])
        assert list(found.tags) == expected
    assert together[2].tags[-1] is None  # beyond the row
    pieces = [
        len(model.run.tokenizer(" ".join(found.words), add_special_tokens=False)["input_ids"]) for found in together
    ]
    assert pieces[2] > 30
    assert [found.tokens_left_out for found in together] == [0, 0, pieces[2] - 30]
    with pytest.warns(UserWarning, match="1 of 3"):
        assert model.tag(texts[::-1], batch_size=2)[::-1] == together
    assert model.tag("rome") == together[1]
    with pytest.raises(UserError, match="input 1: there is no word in the text ' '"):
        model.tag(["a", " "])
    with pytest.raises(UserError, match="cannot answer; it can tag, embed"):
        model.answer(question="who", context="anna")


def test_words_that_are_given_are_tagged_as_they_are(tagger):
    model = sslx.load(tagger)
    # Joined and split anew, these would be other words.
    words = [["anna's", "u.s.", "met", "..."], ["bob"], ["the", "river-side", "\u200b", "rome", 7]]
    found = model.tag(words)
    assert [one.words for one in found] == [("anna's", "u.s.", "met", "..."), ("bob",), (*words[2][:4], "7")]
    assert model.tag(" ".join(words[0])).words != found[0].words
    objective, params = model.run.objective, read_variables(tagger, model.run.step)["params"]
    for one in found:
        rows = objective.rows_of([one.words])
        predictions = objective.predict(params, {}, rows.fetch(np.array([0])))
        (expected,) = objective.tags_of({k: np.asarray(v) for k, v in predictions.items()}, rows, [one.words])
        assert list(one.tags) == expected
        assert len(one.tags) == len(one.words)
    assert [tag is None for tag in found[2].tags] == [False, False, True, False, False]  # of \u200b there is no piece
    # As rows of a file are: texts and words in one list, tuples like lists.
    assert model.tag(["bob", tuple(words[0])]) == [model.tag("bob"), found[0]]
    for given, said in {
        ("a", ("b", None)): r"input 1: tokens\[1\] is null; expected a string or a number",
        ((("a",), "b"),): r"input 0: tokens\[0\] is tuple; expected a string or a number",
        ((),): r"input 0: there is no word in the tokens \[\]",
        ("a", (" ",)): r"input 1: there is no word in the tokens \[' '\]",
        ("a", None): r"input 1: expected a text, got None",
    }.items():
        with pytest.raises(UserError, match=f"^{said}$"):
            model.tag(list(given))


def test_words_that_are_given_are_tagged_from_a_file(tagger, entries, tmp_path):
    rows = [{"id": 1, "tokens": ["anna's", "u.s."]}, {"text": "anna met bob."}]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = entries.run("predict", f"--run={tagger}", "--input=words.jsonl", folder=tmp_path)
    assert ended.code == 0, ended.stderr
    model, found = sslx.load(tagger), [json.loads(line) for line in ended.stdout.splitlines()]
    for row, line, given in zip(rows, found, (rows[0]["tokens"], rows[1]["text"]), strict=True):
        (expected,) = model.tag([given])
        assert line == row | {"words": list(expected.words), "tags": list(expected.tags)}
    for content, said in {
        '{"tokens": ["a"], "text": "a"}': "line 1: both 'text' and 'tokens'; expected one of them",
        '{"tokens": "a"}': "line 1: the tokens are no list but str; expected a list of words",
        '{"tokens": ["a", null]}': "line 1: tokens[1] is null; expected a string or a number",
        '{"token": ["a"]}': "line 1: unknown field 'token'; did you mean 'tokens'?",
        '{"id": 1}': 'line 1: no field \'text\'; expected a JSON object a line, with "text" or a list "tokens"',
    }.items():
        (tmp_path / "bad.jsonl").write_text(content + "\n")
        ended = entries.run("predict", f"--run={tagger}", "--input=bad.jsonl", folder=tmp_path)
        assert (ended.code, ended.stderr.count("\n"), ended.stdout) == (2, 1, ""), ended.stderr
        assert said in ended.stderr


def test_answers_are_those_of_the_task_and_do_not_depend_on_the_batch(make):
    paragraphs = []
    for number in range(40):
        context = f"anna met bob in rome on day {number} . the river runs past rome ."
        qas = [{"id": str(number), "question": "who met bob ?", "answers": [{"text": "anna", "answer_start": 0}]}]
        paragraphs.append({"context": context, "qas": qas})
    squad = json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})
    sizes = {"data.max_question_length": 8, "data.doc_stride": 8}
    run = make("question_answering", squad, ".json", scheme="squad", **sizes)
    model = sslx.load(run)
    assert model.verbs == ("answer", "embed")
    questions = ["who met bob ?", "where", "what runs past rome ?"]
    contexts = [paragraphs[3]["context"], "anna lives in rome .", "the river runs past rome . " * 8]
    together = model.answer(question=questions, context=contexts, top=3)
    objective, params = model.run.objective, read_variables(run, model.run.step)["params"]
    for question, context, found in zip(questions, contexts, together, strict=True):
        rows = objective.rows_of([Question(question, context)])
        predictions = objective.predict(params, {}, rows.fetch(np.arange(len(rows))))
        (expected,) = objective.answers_of({k: np.asarray(v) for k, v in predictions.items()}, rows, 3)
        assert found.answer == expected.text
        assert [one.text for one in found.candidates] == [one.text for one in expected.answers]
        assert found.no_answer == pytest.approx(expected.no_answer, abs=1e-4)
        for one in found.candidates:
            assert context[one.start : one.stop].strip() == one.text
    assert model.answer(question=questions[1], context=contexts[1], top=3).answer == together[1].answer
    again = model.answer(question=questions[::-1], context=contexts[::-1], batch_size=2)[::-1]
    assert [one.answer for one in again] == [one.answer for one in together]
    assert [one.tokens_left_out for one in together] == [0, 0, 0]
    asked = "who met bob in rome on a day by the river ?"
    with pytest.warns(UserWarning, match="^1 of 2 questions are longer than the 8 tokens that the model sees"):
        cut = model.answer(question=[asked, "where"], context=contexts[0])
    assert [one.tokens_left_out for one in cut] == [len(model.run.tokens_of(asked)) - 8, 0]
    kept = model.run.tokenizer.decode(model.run.tokens_of(asked)[:8])
    assert cut[0].answer == model.answer(question=kept, context=contexts[0]).answer
    with pytest.warns(UserWarning, match="1 of 1"):
        assert model.answer(question=asked, context=contexts[0]) == cut[0]
    with pytest.raises(UserError, match="input 0: there is no token in the context ''"):
        model.answer(question="who", context="")
    with pytest.raises(UserError, match="3 questions and 2 contexts"):
        model.answer(question=questions, context=contexts[:2])
    with pytest.raises(UserError, match="top is 0"):
        model.answer(question="who", context="anna", top=0)
    assert model.answer(questions[1], contexts[1], top=3) == model.answer(
        question=questions[1], context=contexts[1], top=3
    )
    for said, given in {
        "expected a question or a list of them, got None": (None, "anna"),
        "expected a context or a list of them, got int": ("who", 3),
        "one question and several contexts; expected one context": ("who", ["anna", "bob"]),
        "input 1: expected a question, got tuple": (["who", ("a", "b")], "anna"),
        "input 0: expected a context, got None": (["who", "where"], [None, "anna"]),
    }.items():
        with pytest.raises(UserError, match=f"^{said}$"):
            model.answer(*given)


def test_pairs_are_seen_as_in_fine_tuning(make):
    from sslx.tasks.text_classification import TextClassification

    texts = [f"{a} {b}" for a in ("anna", "bob", "the river") for b in ("met rome", "lives", "runs past it . " * 9)]
    records = [{"text": a, "pair": b, "label": "yes" if a == b else "no"} for a in texts for b in texts]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    run = make("text_classification", lines, ".jsonl", scheme="jsonl", **{"data.pair_field": "pair"})
    model = sslx.load(run)
    written = json.loads((run / "config.json").read_text())
    written["data"] |= {"train_split": "train[:10%]", "eval_split": "train[10%:]"}
    objective, data = TextClassification.prepare(written, str(run / "tokenizer"))
    params = read_variables(run, model.run.step)["params"]
    batch = data.eval.fetch(np.arange(len(data.eval)))
    logits = np.float64(objective.module.apply({"params": params}, dict(batch), deterministic=True))
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = data.eval.corpus  # the pairs of the slice, in its order
    source = objective_source(written)
    pairs = [(row["text"], row["pair"]) for row in source]
    assert len(pairs) == rows.num_documents
    with pytest.warns(UserWarning, match="texts are longer than the 32 tokens"):
        found = model.classify(pairs)
    for one, probabilities in zip(found, expected, strict=True):
        np.testing.assert_allclose([one.probabilities[name] for name in ("no", "yes")], probabilities, rtol=1e-4)
    with warnings.catch_warnings(action="ignore"):
        assert model.classify([list(pair) for pair in pairs]) == found
        assert model.classify(list(pairs[0])) == model.classify(pairs[0])
        assert [model.classify(pairs[0])] == model.classify(pairs[:1])
    with pytest.raises(UserError, match="input 1: no second text; the run has learned from pairs"):
        model.classify([("a", "b"), "a"])


def objective_source(written):
    from sslx.config import build
    from sslx.data.text import TextConfig, text_collection

    config = build(TextConfig, written["data"], "config.data")
    source = text_collection(config).slice(config.eval_split)
    return source.__getitems__(range(len(source)))


def test_scores_are_the_numbers_of_the_task(make):
    lines = "".join(f"{s},{len(s.split())}.5\n" for s in SENTENCES * 20)
    run = make(
        "text_classification",
        "text,label\n" + lines,
        ".csv",
        scheme="csv",
        **{"data.label_type": "number", "task": {"name": "text_regression", "pool": "mean"}},
    )
    model = sslx.load(run)
    assert model.verbs == ("score", "embed")
    params = read_variables(run, model.run.step)["params"]
    expected = []
    for sentence in SENTENCES:
        tokens = np.array([model.run.tokenizer(sentence)["input_ids"]], np.int32)
        places = np.arange(tokens.shape[1], dtype=np.int32)[None]
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": places}
        expected.append(float(model.run.objective.module.apply({"params": params}, batch, deterministic=True)[0, 0]))
    found = model.score(SENTENCES)
    np.testing.assert_allclose([one.score for one in found], expected, rtol=1e-4, atol=1e-5)
    assert len({one.score for one in found}) == len(SENTENCES)
    with pytest.raises(UserError, match="a run of text_regression and cannot classify; it can score, embed"):
        model.classify(SENTENCES)


def test_a_pair_for_a_run_on_single_texts_is_refused(trained):
    with pytest.raises(UserError, match="input 0: a second text, and the run has learned from single ones"):
        sslx.load(trained("finetune/text_classification")).classify([("a", "b")])
    with pytest.raises(UserError, match="input 0: expected a text, got tuple"):
        sslx.load(trained("bert_mlm")).embed([("a", "b")])
