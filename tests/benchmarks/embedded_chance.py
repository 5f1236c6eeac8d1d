"""What a guess reaches on the embedded sets of token tagging and question answering, by the metrics of the tasks.

    python tests/benchmarks/embedded_chance.py

Prints, of the test splits: for ``python_names`` accuracy and entity F1 of the tag that is most frequent in training,
and of each word's own most frequent tag there; for ``python_questions`` exact match and F1 of saying always that there
is no answer, of a random name of the context (its expectation), and of the word at the place where the answer to a
question of this form is most often in training.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from keyword import iskeyword
from pathlib import Path

import numpy as np

from sslx.data.cache import cache_folder
from sslx.data.python_names import python_names
from sslx.data.python_questions import python_questions
from sslx.tasks.entities import entity_scores
from sslx.tasks.squad_scores import exact_match, f1


def tagging(folder: Path) -> None:
    train, test = (
        [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    tags_of: dict[str, Counter] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            tags_of[word.lower()][tag] += 1
    commonest = sum(tags_of.values(), Counter()).most_common(1)[0][0]
    gold = [row["tags"] for row in test]
    words = [[word.lower() for word in row["tokens"]] for row in test]
    report("tagging", f"always {commonest}", gold, [[commonest] * len(tags) for tags in gold])
    lookup = [[tags_of[w].most_common(1)[0][0] if w in tags_of else commonest for w in row] for row in words]
    report("tagging", "each word's most frequent tag in training", gold, lookup)


def report(task: str, what: str, gold: list[list[str]], guessed: list[list[str]]) -> None:
    pairs = zip(itertools.chain(*gold), itertools.chain(*guessed), strict=True)
    accuracy = np.mean([one == other for one, other in pairs])
    print(f"{task}  {what:<42}  accuracy {accuracy:.4f}  entity_f1 {entity_scores(gold, guessed)['all']['f1']:.4f}")


def answering(folder: Path) -> None:
    train, test = (
        [
            made
            for article in json.loads((folder / f"{split}.json").read_text())["data"]
            for made in article["paragraphs"]
        ]
        for split in ("train", "test")
    )
    places: dict[str, Counter] = defaultdict(Counter)  # where in a context the answer to each question mostly is
    for context, question, gold, start in asked(train):
        places[question][context[:start].count(" ") if gold else -1] += 1
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for context, question, gold, _ in asked(test):
        names = sorted({word for word in context.split() if word.isidentifier() and not iskeyword(word)})
        each = [(exact_match(name, gold), f1(name, gold)) for name in names]
        place = places[question].most_common(1)[0][0]
        usual = [*context.split(), ""][min(place, len(context.split()))]
        scores["always no answer"].append((exact_match("", gold), f1("", gold)))
        scores["a random name of the context"].append(tuple(np.mean(each, axis=0)))
        scores["the word where the answer mostly is"].append((exact_match(usual, gold), f1(usual, gold)))
    for what, found in scores.items():
        exact, overlap = 100 * np.mean(found, axis=0)
        print(f"answering  {what:<42}  exact_match {exact:.2f}  f1 {overlap:.2f}  ({len(found)} questions)")


def asked(paragraphs: list[dict]) -> Iterator[tuple[str, str, list[str], int]]:
    """Context, question, texts of the answers, and where the first begins."""
    for made in paragraphs:
        for entry in made["qas"]:
            start = entry["answers"][0]["answer_start"] if entry["answers"] else -1
            yield made["context"], entry["question"], [answer["text"] for answer in entry["answers"]], start


if __name__ == "__main__":
    cache = cache_folder()
    tagging(Path(python_names(cache).partition(":")[2]))
    answering(Path(python_questions(cache).partition(":")[2]))
