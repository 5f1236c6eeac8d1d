"""What a guess reaches on the embedded sets of token tagging and question answering, by the metrics of the tasks.

    python tests/benchmarks/embedded_chance.py

Prints, of the test splits: for ``python_names`` accuracy and entity F1 of the tag that is most frequent in training,
and of each word's own most frequent tag there; for ``python_cloze`` exact match and F1 of saying "" always, of a random
name of the context (its expectation), and of the name that stands in the context most often.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from sslx.data.cache import cache_folder
from sslx.data.python_cloze import names, python_cloze
from sslx.data.python_names import python_names
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
    articles = json.loads((folder / "test.json").read_text())["data"]
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
        context, gold = paragraph["context"], [answer["text"] for answer in paragraph["qas"][0]["answers"]]
        known = names(context)
        words = [word for word in re.findall(r"\w+", context) if word in known]
        guesses = sorted(set(words)) or [""]
        each = [(exact_match(guess, gold), f1(guess, gold)) for guess in guesses]
        scores["no answer"].append((exact_match("", gold), f1("", gold)))
        scores["a random name of the context"].append(tuple(np.mean(each, axis=0)))
        scores["its most frequent name"].append(each[guesses.index(max(words, key=words.count) if words else "")])
    for what, found in scores.items():
        exact, overlap = 100 * np.mean(found, axis=0)
        print(f"answering  {what:<42}  exact_match {exact:.2f}  f1 {overlap:.2f}  ({len(found)} questions)")


if __name__ == "__main__":
    cache = cache_folder()
    tagging(Path(python_names(cache).partition(":")[2]))
    answering(Path(python_cloze(cache).partition(":")[2]))
