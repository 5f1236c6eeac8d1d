"""Text regression: a pretrained encoder, pooled, and a linear head with one output.

In: one text or one pair of texts a row with a float label (``config.data.label_type="number"``). Out: one term, the
squared error, as BERT's fine-tuning on STS-B has it. Pearson's and Spearman's correlation are scored over all rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr

from sslx.data.text import PreparedText, TextConfig
from sslx.errors import UserError
from sslx.objective import Batch, Out, Report, Term
from sslx.tasks.labelled_text import LabelledText, LabelledTextConfig


@dataclasses.dataclass(frozen=True)
class TextRegressionConfig(LabelledTextConfig):
    """``config.task`` of ``name="text_regression"``."""

    name: str = "text_regression"


@dataclasses.dataclass(frozen=True)
class TextRegression(LabelledText):
    """The objective of ``config.task.name = "text_regression"``."""

    task_config = TextRegressionConfig
    label_type, other = "number", "text_classification is for classes"

    @classmethod
    def check_labels(cls, data: PreparedText, data_config: TextConfig) -> None:
        label = data.train.fetch(np.zeros(1, np.int64)).get("label")
        if label is None or label.dtype != np.float32:
            raise UserError(
                f"config.data.source {data_config.source!r} has no labels that are numbers; "
                f"expected a column {data_config.label_field!r} (config.data.label_field)"
            )

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        return batch | {"weights": {"squared_error": jnp.ones(batch["tokens"].shape[0], jnp.float32)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        output = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        error = jnp.square(output[:, 0] - batch["label"])
        return Out({"squared_error": Term(jnp.sum(batch["weights"]["squared_error"] * error))})

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        output = self.logits(params, state, batch)[:, 0]
        return {"tokens": batch["tokens"], "output": output, "label": batch["label"]}

    def guesses(self, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        return predictions["output"]

    def in_words(self, label: Any) -> str:
        return f"{label:.3g}"

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        found, wanted = np.float64(predictions["output"]), np.float64(predictions["label"])
        if len(found) < 2 or np.ptp(found) == 0 or np.ptp(wanted) == 0:
            return {"pearson": 0.0, "spearman": 0.0}  # undefined: a constant goes with nothing
        return {
            "pearson": float(pearsonr(found, wanted).statistic),
            "spearman": float(spearmanr(found, wanted).statistic),
        }

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        found, wanted = np.float64(predictions["output"]), np.float64(predictions["label"])
        error = float(np.sqrt(np.mean((found - wanted) ** 2)))
        spread = float(np.std(wanted))
        text = f"{len(found):,} rows: root mean squared error {error:.3f} (always guessing the mean: {spread:.3f})"
        values = {"root_mean_squared_error": error, "label_standard_deviation": spread}
        return Report(text, values, {"predictions": _draw(found, wanted)})


def _draw(found: np.ndarray, wanted: np.ndarray) -> Figure:
    """Predictions over labels, with the line where both are the same."""
    figure = Figure(figsize=(4.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.scatter(wanted, found, s=8, alpha=0.4)
    ends = [float(wanted.min()), float(wanted.max())]
    axes.plot(ends, ends, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
    return figure
