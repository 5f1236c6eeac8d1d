"""Scores texts or pairs of them: the number that a run of text regression says of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from sslx.inference.loading import LoadedRun
from sslx.inference.verb import OneLabelledRow, Row
from sslx.objective import Objective
from sslx.tasks.text_regression import TextRegression


@dataclasses.dataclass(frozen=True)
class Scored:
    """The number, on the scale of the labels that the run has learned from."""

    score: float
    tokens_left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Score(OneLabelledRow):
    """Numbers of texts, or of pairs where the run has learned from pairs."""

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, TextRegression)

    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        return {"score": run.objective.logits(variables["params"], variables["state"], dict(batch))[:, 0]}

    def result(self, run: LoadedRun, row: Row, arrays: Mapping[str, np.ndarray]) -> Scored:
        return Scored(float(arrays["score"]), row.tokens_left_out)
