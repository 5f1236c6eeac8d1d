"""Questions about functions: answers by hand for a few heads, and every answer of a library where it is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sslx.data import python_names, python_questions
from sslx.data.questions import QuestionsConfig, prepare_questions
from sslx.errors import UserError

MODULE = """
import os.path
LIMIT = {i}
class Thing{i}(Exception): pass
def walk{i}(self{i}, top{i}=(LIMIT, 1), *others{i}):
    here{i} = os.path.join(top{i}, len(others{i}))
    raise Thing{i}(here{i}.name{i})
def none{i}():
    import os.path
    return os.sep{i} + os.sep{i} + os.sep{i}
"""
SOURCE = "def f ( a , b = ( x , 1 ) , * c ) : import os . path v = len ( c ) . real return Thing ( v )"
WORDS = SOURCE.split()
TAGS = {
    "f": "B-FUNCTION",
    "a": "B-PARAMETER",
    "b": "B-PARAMETER",
    "x": "B-GLOBAL",
    "c": "B-PARAMETER",
    "len": "B-FUNCTION",
    "v": "B-VARIABLE",
    "real": "B-ATTRIBUTE",
    "Thing": "B-CLASS",
}


def test_answers_are_the_first_names_of_their_kinds():
    tags = [TAGS.get(word, "O") for word in WORDS]
    begin = WORDS.index("os")
    tags[begin : begin + 3] = ["B-MODULE", "I-MODULE", "I-MODULE"]
    found = python_questions.answers(WORDS, tags)
    assert {kind: " ".join(WORDS[slice(*span)]) for kind, span in found.items()} == {
        "defined": "f",
        "first": "a",
        "last": "c",
        "FUNCTION": "len",
        "CLASS": "Thing",
        "MODULE": "os . path",
        "VARIABLE": "v",
        "GLOBAL": "x",
        "ATTRIBUTE": "real",
    }
    assert found["last"][0] == WORDS.index("c")  # in the signature, not where it is used


def test_what_is_not_there_has_no_answer_and_what_scores_ignore_is_not_asked(monkeypatch):
    monkeypatch.setattr(python_questions, "ASKED", 99)
    monkeypatch.setattr(python_questions, "UNANSWERABLE", 1.0)
    words = ["def", "f", "(", "a", ")", ":", "return", "a", ".", "the"]
    tags = ["O", "B-FUNCTION", "O", "B-PARAMETER", "O", "O", "O", "B-PARAMETER", "O", "B-ATTRIBUTE"]
    made = python_questions.paragraph(words, tags)
    assert made["context"] == "def f ( a ) : return a . the"
    answers = {entry["question"]: entry["answers"] for entry in made["qas"]}
    assert answers.pop("Which function is defined?") == [{"text": "f", "answer_start": 4}]
    absent = ("function", "class", "module", "variable", "global name")
    assert answers == {f"Which {kind} is used first?": [] for kind in absent}
    assert all(entry["is_impossible"] == (not entry["answers"]) for entry in made["qas"])
    monkeypatch.setattr(python_questions, "UNANSWERABLE", 0.0)
    assert len(python_questions.paragraph(words, tags)["qas"]) == 1


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 50 modules with two functions each."""
    root = tmp_path / "library"
    (root / "os").mkdir(parents=True)
    for i in range(50):
        (root / f"m{i}.py").write_text(MODULE.format(i=i))
    monkeypatch.setattr(python_names.sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setenv("SSLX_CACHE", str(tmp_path / "cache"))
    return root


def test_every_answer_is_where_it_is_said_to_be_and_splits_share_no_module(library, tmp_path):
    folders = [Path(python_questions.python_questions(tmp_path / n).removeprefix("squad:")) for n in ("a", "b")]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second  # the same on every build
    heads, modules = python_names.sentences(library), {}
    for split in ("train", "validation", "test"):
        paragraphs = json.loads(first[f"{split}.json"])["data"][0]["paragraphs"]
        assert [" ".join(words) for words, _ in heads[split]] == [made["context"] for made in paragraphs]
        modules[split] = {"".join(filter(str.isdigit, made["context"].split()[1])) for made in paragraphs}
        for made in paragraphs:
            assert 1 <= len(made["qas"]) <= python_questions.ASKED
            for entry in made["qas"]:
                for answer in entry["answers"]:
                    start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                    assert made["context"][start:end] == answer["text"]
                    assert f" {made['context']} "[start] == f" {made['context']} "[end + 1] == " "  # whole words
    assert {split: len(found) for split, found in modules.items()} == {"train": 44, "validation": 2, "test": 4}
    assert len(set.union(*modules.values())) == 50
    data = prepare_questions(QuestionsConfig("python_questions", test_split="test", seq_len=224, vocab_size=300))
    assert {role: data.statistics[f"{role}_misplaced_answers"] for role in ("train", "eval", "test")} == {
        "train": 0,
        "eval": 0,
        "test": 0,
    }
    assert data.statistics["train_questions"] == sum(
        len(made["qas"]) for made in json.loads(first["train.json"])["data"][0]["paragraphs"]
    )
    assert data.statistics["train_unanswerable"] > 0


def test_its_name_has_to_be_right_and_something_has_to_be_installed(library, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="unknown data source 'python_question'; did you mean 'python_questions'"):
        prepare_questions(QuestionsConfig("python_question"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(python_names.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    with pytest.raises(UserError, match="python_questions would be empty"):
        prepare_questions(QuestionsConfig("python_questions"))
