"""Classifies texts or pairs of them: a label with its probability, from a run of text classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from sslx.inference.loading import LoadedRun
from sslx.inference.verb import OneLabelledRow, Row
from sslx.objective import Objective
from sslx.tasks.text_classification import TextClassification


@dataclasses.dataclass(frozen=True)
class Classified:
    """The likeliest label, and the probabilities of all, likeliest first."""

    label: str
    probabilities: dict[str, float]
    tokens_left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Classify(OneLabelledRow):
    """Labels of texts, or of pairs where the run has learned from pairs."""

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, TextClassification)

    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        logits = run.objective.logits(variables["params"], variables["state"], dict(batch))
        return {"probabilities": jax.nn.softmax(logits, axis=-1)}

    def result(self, run: LoadedRun, row: Row, arrays: Mapping[str, np.ndarray]) -> Classified:
        ordered = by_probability(run.objective.label_names, arrays["probabilities"])
        return Classified(next(iter(ordered)), ordered, row.tokens_left_out)


def by_probability(names: Sequence[str], values: Float[np.ndarray, " classes"]) -> dict[str, float]:
    """Probabilities by label, likeliest first."""
    return {names[label]: float(values[label]) for label in np.argsort(-values, kind="stable")}
