"""Answers questions: the part of a context that answers one, from a run of question answering; "" is no answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sslx.data.questions import Question
from sslx.errors import UserError
from sslx.inference.loading import LoadedRun
from sslx.inference.verb import TaskRows
from sslx.objective import Objective
from sslx.tasks.question_answering import CANDIDATES, Answer, QuestionAnswering


@dataclasses.dataclass(frozen=True)
class Answers:
    """``answer``, the likeliest parts of the context, best first, and how much above their best "no answer" scores.

    ``tokens_left_out`` are the question's; a context is read to its end, whatever its length.
    """

    answer: str
    candidates: tuple[Answer, ...]
    no_answer: float
    tokens_left_out: int = 0


@dataclasses.dataclass(frozen=True)
class AnswerQuestion(TaskRows):
    """Answers to questions about contexts."""

    fields = ("question", "context")

    top: int = 1  # candidates

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.top <= CANDIDATES:
            raise UserError(f"top is {self.top}; expected 1 to {CANDIDATES}")

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, QuestionAnswering)

    def inputs(self, run: LoadedRun, record: Mapping[str, Any]) -> Question:
        for name in self.fields:
            if not run.tokens_of(record[name]):
                raise UserError(f"there is no token in the {name} {record[name]!r}")
        return Question(record["question"], record["context"])

    def note(self, run: LoadedRun) -> str:
        longest = run.objective.data.max_question_length
        return f"questions are longer than the {longest} tokens that the model sees; the rest of each was left out"

    def rows(self, run: LoadedRun, inputs: Sequence[Question]) -> Any:
        return run.objective.rows_of(inputs)

    def results(
        self, run: LoadedRun, predictions: Mapping[str, np.ndarray], rows: Any, inputs: Sequence[Question]
    ) -> list[Answers]:
        found = run.objective.answers_of(predictions, rows, self.top)
        longest = run.objective.data.max_question_length
        left_out = [max(0, len(run.tokens_of(asked.question)) - longest) for asked in inputs]
        return [Answers(one.text, one.answers, one.no_answer, left) for one, left in zip(found, left_out, strict=True)]

    @property
    def compiled_as(self) -> AnswerQuestion:
        return AnswerQuestion()
