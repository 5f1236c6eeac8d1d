"""Cloze questions: those of written docstrings by hand, and splits that share no module."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sslx.data import python_cloze as pc
from sslx.data.questions import QuestionsConfig, prepare_questions
from sslx.errors import UserError

DOCSTRING = """Write *content* into the file at ``path`` and say how much.

The folder has to be there, unless make_folders says otherwise.
Short one.

Parameters
----------
content : bytes
    What is to be written into the file.
"""


def test_names_are_words_written_as_names():
    text = (
        "Take *one* of ``two`` or `three`, 'four' or \"five\"; snake_case, CamelCase and camelBack too.\n"
        "six : int\n"
        "    not seven: that is English, Titles and CAPITALS are, don't and `a b`; **ab** and `x` are short.\n"
        "    eight : float, optional\n"
        "lonely_ and _private have no underscore inside."
    )
    expected = "one two three four five snake_case CamelCase camelBack six eight"
    assert pc.names(text) == set(expected.split())


def test_a_question_is_a_sentence_without_the_name_that_answers_it(monkeypatch):
    asked = [
        ("Write *___* into the file at ``path`` and say how much.", "content", 7),
        ("Write *content* into the file at ``___`` and say how much.", "path", 35),
        ("The folder has to be there, unless ___ says otherwise.", "make_folders", 96),
    ]
    text = DOCSTRING.strip()
    monkeypatch.setattr(pc, "MAX_QUESTIONS", 9)
    made = {(cloze.question, cloze.answer, cloze.start) for cloze in pc.clozes(text)}
    assert (asked[0] in made) != (asked[1] in made)  # one a sentence
    assert made - set(asked) == set()
    assert asked[2] in made
    monkeypatch.setattr(pc, "MAX_QUESTIONS", 1)
    assert len(pc.clozes(text)) == 1


def test_contexts_end_with_a_whole_sentence_and_hold_several_names(monkeypatch):
    text = DOCSTRING.strip()
    (context,) = {cloze.context for cloze in pc.clozes(text)}
    assert context == text  # 39 words
    monkeypatch.setattr(pc, "MAX_WORDS", 25)
    (context,) = {cloze.context for cloze in pc.clozes(text)}
    assert context.rstrip().endswith("Short one.\n\nParameters\n----------")
    monkeypatch.setattr(pc, "MAX_WORDS", 15)  # the third name is beyond
    assert pc.clozes(text) == []


# --- Packages made for the purpose -----------------------------------------------------------------------------------


def docstring(number):
    words = [hashlib.sha256(f"{number} {i}".encode()).hexdigest()[:7] for i in range(20)]
    first = f"Hand {words[0]} to {words[1]} and let the *x{words[2]}* of {words[3]} be {words[4]}."
    second = f"Of {words[5]} the y_{words[6]} of {words[7]} says {words[8]}, {words[9]} and ``z{words[10]}`` more."
    return f"{first}\n{second}\n{' '.join(words[11:])}"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of 50 modules with two docstrings each; a copy of one module is in the other package."""
    places = {}
    for label, first in (("ant", 0), ("bee", 200)):
        folder = places[label] = tmp_path / "site" / label
        folder.mkdir(parents=True)
        for i in range(50):
            one, two = docstring(first + 2 * i), docstring(first + 2 * i + 1)
            (folder / f"m{i}.py").write_text(f'"""{one}"""\ndef f():\n    """{two}"""\n')
    (places["bee"] / "copy.py").write_text((places["ant"] / "m3.py").read_text())
    monkeypatch.setattr(pc.python_docs, "PACKAGES", {name: pc.python_docs.Package(name, (name,)) for name in places})
    monkeypatch.setattr(pc.python_docs, "folders", lambda label: [places[label]] if label in places else [])
    monkeypatch.setattr(pc.python_docs, "MIN_CHARACTERS", 50)
    monkeypatch.setenv("SSLX_CACHE", str(tmp_path / "cache"))
    return places


def test_every_answer_is_where_it_is_said_to_be_and_splits_share_no_module(packages):
    made = pc.questions(pc.docstrings())
    modules = {split: {article["title"] for article in articles} for split, articles in made.items()}
    assert {split: len(found) for split, found in modules.items()} == {"train": 88, "validation": 4, "test": 8}
    assert len(set.union(*modules.values())) == 100
    assert "bee/copy.py" not in set.union(*modules.values())
    contexts_of, unanswerable, count = {}, 0, 0
    for split, articles in made.items():
        for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
            context, (entry,) = paragraph["context"], paragraph["qas"]
            contexts_of.setdefault(split, set()).add(context)
            before, after = entry["question"].split("___")
            count += 1
            if entry["is_impossible"]:
                unanswerable += 1
                assert entry["answers"] == []
                assert before not in context  # another docstring's
            else:
                ((answer, start),) = [(answer["text"], answer["answer_start"]) for answer in entry["answers"]]
                assert context[start:].startswith(answer + after)
                assert context[:start].endswith(before)
    assert not contexts_of["train"] & contexts_of["test"]
    assert 300 < count <= 400
    assert 0.05 < unanswerable / count < 0.16


def test_two_builds_are_the_same_and_rows_come_from_them(packages, tmp_path):
    folders = [Path(pc.python_cloze(tmp_path / name).removeprefix("squad:")) for name in ("a", "b")]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert sorted(first) == ["test.json", "train.json", "validation.json"]
    config = QuestionsConfig("python_cloze", test_split="test", seq_len=224, vocab_size=300)
    data = prepare_questions(config)
    asked = [p["qas"][0]["question"] for a in json.loads(first["test.json"])["data"] for p in a["paragraphs"]]
    assert sorted(question.question for question in data.test.questions) == sorted(asked)
    assert data.statistics["train_skipped_answers"] == 0
    assert data.statistics["train_unanswerable"] > 0


def test_its_name_has_to_be_right_and_something_has_to_be_installed(packages, monkeypatch):
    with pytest.raises(UserError, match="unknown data source 'python_clozes'; did you mean 'python_cloze'"):
        prepare_questions(QuestionsConfig("python_clozes"))
    monkeypatch.setattr(pc.python_docs, "folders", lambda label: [])
    with pytest.raises(UserError, match="python_cloze would be empty"):
        prepare_questions(QuestionsConfig("python_cloze"))
