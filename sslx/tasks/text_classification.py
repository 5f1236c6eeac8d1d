"""Text classification: a pretrained encoder, pooled, and a linear head.

In: one text or one pair of texts a row with an int label. Out: one cross-entropy term. Scored over all rows at once:
macro-F1; Matthews correlation; and of two classes the F1 of the second, which GLUE calls F1 (arXiv 1804.07461).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from sklearn.metrics import f1_score, matthews_corrcoef

from sslx.data.labels import check_classes
from sslx.data.text import PreparedText, TextConfig
from sslx.models.losses import softmax_cross_entropy
from sslx.objective import Batch, Mean, Out, Report, Term
from sslx.tasks.class_report import class_report, class_scores
from sslx.tasks.labelled_text import LabelledText, LabelledTextConfig


@dataclasses.dataclass(frozen=True)
class TextClassificationConfig(LabelledTextConfig):
    """``config.task`` of ``name="text_classification"``."""

    name: str = "text_classification"
    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True)
class TextClassification(LabelledText):
    """The objective of ``config.task.name = "text_classification"``."""

    task_config = TextClassificationConfig
    label_type, other = "class", "text_regression is for numbers"

    @classmethod
    def check_labels(cls, data: PreparedText, data_config: TextConfig) -> None:
        check_classes(data, data_config)

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        return batch | {"weights": {"classification": jnp.ones(batch["tokens"].shape[0], jnp.float32)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        logits = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        weights = batch["weights"]["classification"]
        smoothing = self.task.label_smoothing if train else 0.0
        term = Term(jnp.sum(weights * softmax_cross_entropy(logits, batch["label"], smoothing)))
        hits = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        return Out({"classification": term}, {"accuracy": Mean(jnp.sum(weights * hits), jnp.sum(weights))})

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        return {"tokens": batch["tokens"], "logits": self.logits(params, state, batch), "label": batch["label"]}

    def guesses(self, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.argmax(predictions["logits"], axis=-1)

    def in_words(self, label: Any) -> str:
        return self.label_names[int(label)]

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        labels, guesses = predictions["label"], self.guesses(predictions)
        scores = class_scores(labels, guesses)
        scores["matthews"] = float(matthews_corrcoef(labels, guesses)) if len(np.union1d(labels, guesses)) > 1 else 0.0
        if len(self.label_names) == 2:
            scores["f1"] = float(f1_score(labels, guesses, pos_label=1, zero_division=0))
        return scores

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        return class_report(predictions["label"], self.guesses(predictions), self.label_names)
