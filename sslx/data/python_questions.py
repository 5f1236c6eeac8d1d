"""An embedded set of questions: what is what in functions of Python's standard library.

It needs no download: it is made of `python_names`, whose tags follow from the source and Python's scoping, and so do
the answers. In: a cache folder. Out: a folder of files in SQuAD's format (v2.0), named after the splits: with CPython
3.11.7, 11,014 questions to train on, 570 for validation and 1,172 for testing, a sixteenth of them without an answer.

A context is the head of a function as `python_names` writes it, words joined by spaces. A question is one of
`QUESTIONS`; its answer is the first (of parameters also the last) name of that kind, where it stands. Where there is
none, there is no answer; of such questions a share of `UNANSWERABLE` is asked. Each head is asked `ASKED` questions at
most, chosen by its hash. Modules are in the splits that they are in there, so no module is in two.

They are a handful of forms, so a model learns what each means from its examples and nothing of English: it is a small
job that shows the task at work, no measure of reading. Cloze questions on docstrings (Lewis et al. 2019,
arXiv 1906.04980) were tried first: in as many steps they were not learnt, neither with the blanked sentence in the
context nor without.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from sslx.data import python_names

NAME = "python_questions"
# Raise this whenever the code below would make other questions from the same sentences.
_RECIPE = 1
QUESTIONS = {
    "defined": "Which function is defined?",
    "first": "Which parameter is the first?",
    "last": "Which parameter is the last?",
    "FUNCTION": "Which function is used first?",
    "CLASS": "Which class is used first?",
    "MODULE": "Which module is used first?",
    "VARIABLE": "Which variable is used first?",
    "GLOBAL": "Which global name is used first?",
    "ATTRIBUTE": "Which attribute is used first?",
}
ASKED = 2  # of a head
UNANSWERABLE = 0.1  # of the questions that a head has no answer to
# SQuAD's scores take articles and punctuation for nothing, whatever they stand for.
_NOTHING = ("", "a", "an", "the")


def python_questions(cache_dir: str | os.PathLike[str]) -> str:
    """Returns the source spec of the files; writes them under ``cache_dir`` the first time (some 20 s, 3 MB).

    Raises:
      UserError: the folder cannot be written, or Python has no sources.
    """
    return f"squad:{python_names.written_once(cache_dir, NAME, [_RECIPE], '.json', _file)}"


def _file(heads: list[python_names.Tagged]) -> str:
    paragraphs = [made for words, tags in heads if (made := paragraph(words, tags))["qas"]]
    content = {"version": "v2.0", "data": [{"title": NAME, "paragraphs": paragraphs}]}
    return json.dumps(content) + "\n" if paragraphs else ""


def paragraph(words: list[str], tags: list[str]) -> dict[str, Any]:
    """One of SQuAD's paragraphs: the head of a function as text, and the questions that it is asked."""
    context, qas = " ".join(words), []
    spans = answers(words, tags)
    for kind in sorted(QUESTIONS, key=lambda kind: _digest(f"{kind} {context}")):
        span = spans.get(kind)
        number = _digest(f"{context} {kind}")
        if span is None:
            if int(number[-8:], 16) >= UNANSWERABLE * 16**8:
                continue
            found = []
        else:
            text, start = " ".join(words[slice(*span)]), len(" ".join([*words[: span[0]], ""]))
            if text.strip("_").lower() in _NOTHING:
                continue
            found = [{"text": text, "answer_start": start}]
        qas.append({"id": number[:16], "question": QUESTIONS[kind], "answers": found, "is_impossible": not found})
        if len(qas) == ASKED:
            break
    return {"context": context, "qas": qas}


def answers(words: list[str], tags: list[str]) -> dict[str, tuple[int, int]]:
    """By the kinds of `QUESTIONS`: the first and beyond the last word of the answer, where there is one."""
    spans: dict[str, tuple[int, int]] = {}
    end = _end_of_signature(words)
    defined = tags.index("B-FUNCTION")
    spans["defined"] = (defined, defined + 1)
    for i, tag in enumerate(tags):
        kind = tag[2:]
        if tag == "B-PARAMETER" and i < end:
            spans.setdefault("first", (i, i + 1))
            spans["last"] = (i, i + 1)
        elif tag.startswith("B-") and i > defined and kind in QUESTIONS and kind not in spans:
            stop = next((j for j in range(i + 1, len(tags)) if not tags[j].startswith("I-")), len(tags))
            spans[kind] = (i, stop)
    return spans


def _end_of_signature(words: list[str]) -> int:
    """Beyond the bracket that closes the first one."""
    depth = 0
    for i, word in enumerate(words):
        depth += (word in ("(", "[", "{")) - (word in (")", "]", "}"))
        if word == ")" and not depth:
            return i + 1
    return len(words)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
