"""An embedded set of questions: sentences of docstrings with a name blanked out, asked about the rest of the docstring.

Cloze questions made of unlabelled text, after Lewis et al. 2019 (arXiv 1906.04980), without their translation into
natural questions. It needs no download: the docstrings are those of Python's standard library and of the packages that
sslx depends on, whose source is installed wherever sslx runs. In: a cache folder. Out: a folder of files in SQuAD's
format (v2.0), named after the splits.

- A context is the beginning of a docstring, as many whole sentences or lines as fit in `MAX_WORDS`, with `MIN_NAMES`
  names at least.
- A name is a word that the docstring writes as one: in quotes or stars, at the head of a numpydoc parameter, with an
  underscore inside, or in CamelCase.
- A question is a sentence or line of the context, in which `BLANK` takes the place of a name. The answer is that name,
  where it stands in that sentence.
- In a share of `UNANSWERABLE` the question is one of another docstring of the same package and split, about a name that
  the context does not hold: there is no answer.

The sentence stays in the context, so this is a task of looking up, not of understanding: to find the sentence that the
question is, and what is missing in it. Without that sentence the task was tried and not learnt: after 300 steps from a
run of ``configs/bert_mlm.py`` the model said "no answer" to nearly everything.

Near-duplicate docstrings are reduced to one as in `python_docs`. Modules, which are files, are dealt to the splits by
the rank of the hash of their path. All of it is the same for the same versions of Python and the packages.

The texts are among those that `configs/bert_mlm.py` pretrains on by default, without questions and answers: a run of it
has read most contexts of the validation and test questions too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from sslx.data import near_duplicates, python_docs
from sslx.data.cache import prepare_once
from sslx.data.python_names import dealt
from sslx.data.tokens import split_sentences
from sslx.errors import UserError

NAME = "python_cloze"
# Raise this whenever the code below would make other questions from the same docstrings.
_RECIPE = 1
BLANK = "___"
MIN_SENTENCE, MAX_SENTENCE = 5, 20  # words of a question
MAX_WORDS = 40  # of a context
MIN_NAMES = 3  # of fewer a guess would be right too often
MIN_NAME = 3  # letters; SQuAD's scores leave out "a" and "an", whatever they stand for
MAX_QUESTIONS = 2  # of a docstring
UNANSWERABLE = 0.1

_WORD = re.compile(r"\w+")
_QUOTED = re.compile(r"(?<![\w*`'\"])(`{1,2}|\*{1,2}|['\"])([A-Za-z_]\w{2,})\1(?![\w*`'\"])")
_PARAMETER = re.compile(r"^\s*([A-Za-z_]\w*) ?: ", re.MULTILINE)
_WRITTEN = re.compile(r"[A-Za-z]\w*_\w+|[A-Z]+[a-z]\w*[A-Z]\w*|[a-z]+[A-Z]\w*")


class Cloze(NamedTuple):
    """A question and its answer, ``context[start:start + len(answer)]``."""

    context: str
    question: str
    answer: str
    start: int


def python_cloze(cache_dir: str | os.PathLike[str]) -> str:
    """Returns the source spec of the files; writes them under ``cache_dir`` the first time (some 30 s).

    Raises:
      UserError: the folder cannot be written, or nothing to read is installed.
    """
    version = f"{NAME} {_RECIPE} {python_docs.fingerprint()}"
    folder = prepare_once(Path(cache_dir) / NAME, hashlib.sha256(version.encode()).hexdigest()[:12], _build)
    return f"squad:{folder}"


def _build(folder: Path) -> None:
    for split, articles in questions(docstrings()).items():
        if not articles:
            raise UserError(f"no package with docstrings is installed: {NAME} would be empty")
        content = json.dumps({"version": "v2.0", "data": articles}, indent=1)
        (folder / f"{split}.json").write_text(content + "\n", encoding="utf8")


def docstrings() -> dict[str, tuple[str, str]]:
    """``{text: (package, module)}``: each cleaned docstring once, with the package and the file where it was first."""
    found: dict[str, tuple[str, str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in others' sources
        for label in (*python_docs.PACKAGES, python_docs.STANDARD_LIBRARY):
            for folder in python_docs.folders(label):
                for path in python_docs.source_files(folder):
                    module = f"{label}/{path.relative_to(folder).as_posix()}"
                    for raw in python_docs.docstrings(path.read_bytes()):
                        if len(raw) >= python_docs.MIN_CHARACTERS:
                            found.setdefault(python_docs.clean(raw), (label, module))
    return found


def questions(found: dict[str, tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """SQuAD's articles, one a module, by split, of docstrings as `docstrings` returns them."""
    texts = sorted(found)
    kept = set(near_duplicates.representatives(texts, containment=python_docs.CONTAINMENT).tolist()) if texts else set()
    made = {text: clozes(text) for i, text in enumerate(texts) if i in kept}
    split_of = dealt({found[text][1] for text in made if made[text]})
    asked: dict[tuple[str, str], list[tuple[str, Cloze]]] = {}  # by split and package: module and question
    for text in sorted(made, key=_digest):
        package, module = found[text]
        if made[text]:
            asked.setdefault((split_of[module], package), []).extend((module, cloze) for cloze in made[text])
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {split: {} for split in python_docs.SPLITS}
    for (split, _), those in asked.items():
        for i, (module, cloze) in enumerate(those):
            question, answers = cloze.question, [{"text": cloze.answer, "answer_start": cloze.start}]
            if _share(cloze) < UNANSWERABLE:
                # The next of the same split, so that no sentence of a test module is asked in training.
                others = (other for _, other in (*those[i + 1 :], *those[:i]))
                other = next((other for other in others if other.answer not in _WORD.findall(cloze.context)), None)
                if other is None:
                    continue
                question, answers = other.question, []
            number = _digest(f"{cloze.context} {question}")[:16]
            entry = {"id": number, "question": question, "answers": answers, "is_impossible": not answers}
            articles[split].setdefault(module, []).append({"context": cloze.context, "qas": [entry]})
    return {
        split: [{"title": module, "paragraphs": parts} for module, parts in sorted(modules.items())]
        for split, modules in articles.items()
    }


def clozes(text: str) -> list[Cloze]:
    """The questions that a docstring gives, at most `MAX_QUESTIONS`, about different names in different sentences."""
    known, sentences = names(text), _beginning(text)
    context, possible = "".join(sentences), []
    if len(sentences) < 2 or len(known.intersection(_WORD.findall(context))) < MIN_NAMES:
        return []
    for i, sentence in enumerate(sentences):
        if MIN_SENTENCE <= len(sentence.split()) <= MAX_SENTENCE:
            for word in _WORD.finditer(sentence):
                if word[0] in known:
                    question = f"{sentence[: word.start()]}{BLANK}{sentence[word.end() :]}".strip()
                    possible.append((i, Cloze(context, question, word[0], len("".join(sentences[:i])) + word.start())))
    chosen: dict[int, Cloze] = {}
    for i, cloze in sorted(possible, key=lambda pair: _digest(f"{pair[1].question} {pair[1].answer} {text}")):
        fresh = i not in chosen and cloze.answer not in {other.answer for other in chosen.values()}
        if fresh and len(chosen) < MAX_QUESTIONS:
            chosen[i] = cloze
    return list(chosen.values())


def names(text: str) -> set[str]:
    """The words that a docstring writes as names, of at least `MIN_NAME` letters."""
    found = {match[2] for match in _QUOTED.finditer(text)} | {match[1] for match in _PARAMETER.finditer(text)}
    found |= {word for word in _WORD.findall(text) if _WRITTEN.fullmatch(word)}
    return {name for name in found if len(name) >= MIN_NAME}


def _beginning(text: str) -> list[str]:
    sentences, words = [], 0
    for sentence in split_sentences(text):
        words += len(_WORD.findall(sentence))
        if words > MAX_WORDS:
            break
        sentences.append(sentence)
    return sentences


def _share(cloze: Cloze) -> float:
    """A number from 0 to 1 that is up to the question."""
    return int(_digest(f"{cloze.context} {cloze.question}")[-8:], 16) / 16**8


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
