"""The tasks of GLUE (arXiv 1804.07461) as TFDS has them: fields, sizes, scores, and how they are fine-tuned.

Scores are those of GLUE's Table 1. The recipe is BERT's (arXiv 1810.04805, section 4.1): 3 epochs, batches of 32, a
learning rate of 2e-5, 3e-5, 4e-5 or 5e-5 chosen on the validation set. So is the average (its Table 1): the mean of
nine columns, MNLI being two of them, F1 for MRPC and QQP, Spearman's correlation for STS-B, and without WNLI.

The labels of the test sets are kept by the benchmark's server (TFDS has -1 for each), so all scores here are on
validation sets; those of BERT's Table 1 are on the test sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Score:
    """One published score: ``metric`` of the objective on the rows ``eval`` or ``test`` of the run."""

    name: str
    metric: str
    averaged: bool = True  # a column of BERT's average
    rows: str = "eval"


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One task; ``train_rows`` are those of the published training set."""

    title: str
    text: str
    pair: str  # "" = single texts
    train_rows: int
    scores: tuple[Score, ...]
    numbers: bool = False  # labels are numbers and no classes
    eval_split: str = "validation"
    test_split: str = ""
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-5

    @property
    def steps(self) -> int:
        return -(-self.epochs * self.train_rows // self.batch_size)


_ACCURACY = (Score("accuracy", "accuracy"),)
_F1_AND_ACCURACY = (Score("f1", "f1"), Score("accuracy", "accuracy", averaged=False))

GLUE = {
    "cola": GlueTask("CoLA", "sentence", "", 8551, (Score("matthews", "matthews"),)),
    "sst2": GlueTask("SST-2", "sentence", "", 67349, _ACCURACY),
    "mrpc": GlueTask("MRPC", "sentence1", "sentence2", 3668, _F1_AND_ACCURACY),
    "stsb": GlueTask(
        "STS-B",
        "sentence1",
        "sentence2",
        5749,
        (Score("pearson", "pearson", averaged=False), Score("spearman", "spearman")),
        numbers=True,
    ),
    "qqp": GlueTask("QQP", "question1", "question2", 363849, _F1_AND_ACCURACY),
    "mnli": GlueTask(
        "MNLI",
        "premise",
        "hypothesis",
        392702,
        (Score("matched", "accuracy"), Score("mismatched", "accuracy", rows="test")),
        eval_split="validation_matched",
        test_split="validation_mismatched",
    ),
    "qnli": GlueTask("QNLI", "question", "sentence", 104743, _ACCURACY),
    "rte": GlueTask("RTE", "sentence1", "sentence2", 2490, _ACCURACY),
    "wnli": GlueTask("WNLI", "sentence1", "sentence2", 635, (Score("accuracy", "accuracy", averaged=False),)),
}


def average(scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """BERT's average of scores by task and name; None where a column is missing."""
    columns = [(task, score.name) for task, row in GLUE.items() for score in row.scores if score.averaged]
    if any(name not in scores.get(task, {}) for task, name in columns):
        return None
    return sum(scores[task][name] for task, name in columns) / len(columns)
