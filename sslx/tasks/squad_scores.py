"""Exact match and F1 of answers by SQuAD's rules (arXiv 1606.05250, 1806.03822), and the best null threshold.

In: texts. Out: numbers between 0 and 1 for a question; which threshold on the score of "no answer" does best.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Lower case, without punctuation and English articles, words apart by one space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """1 if the answer is any of ``gold`` once both are normalised; no gold at all means that "" is right."""
    return float(normalised(answer) in {normalised(text) for text in _usable(gold)})


def f1(answer: str, gold: Sequence[str]) -> float:
    """The best F1 over ``gold`` of the words in common; where one side has no word, whether both have none."""
    return max(_word_f1(normalised(answer).split(), normalised(text).split()) for text in _usable(gold))


def best_threshold(
    scores: Sequence[float], no_answer: Sequence[float], answerable: Sequence[bool]
) -> tuple[float, float]:
    """The threshold on ``no_answer`` above which "" should be said, and the mean score that it reaches.

    Args:
      scores: What the best answer that is not "" scores.
      no_answer: How much likelier "" is than that answer.
      answerable: Whether the question has an answer; where it has none, "" scores 1.
    """
    order = np.argsort(no_answer, kind="stable")
    # Thresholds in rising order: each adds the answer of one more question and takes its "" away.
    gain = np.where(answerable, scores, -1.0)[order]
    totals = np.concatenate([[0.0], np.cumsum(gain)]) + np.sum(~np.asarray(answerable, bool))
    # Of questions with equal scores, a threshold takes all or none.
    levels = np.asarray(no_answer, float)[order]
    possible = np.concatenate([[True], np.append(levels[1:] != levels[:-1], True)])
    best = int(np.argmax(np.where(possible, totals, -np.inf)))
    threshold = levels[best - 1] if best else levels[0] - 1.0  # below all: "" everywhere
    return float(threshold), float(totals[best] / len(order))


def _usable(gold: Sequence[str]) -> list[str]:
    return [text for text in gold if normalised(text)] or [""]


def _word_f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = (Counter(answer) & Counter(gold)).total()
    return 2 * common / (len(answer) + len(gold))
