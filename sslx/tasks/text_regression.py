"""Text regression: a pretrained encoder, pooled, and a linear head with one output.

In: one text or one pair of texts a row with a float label (``config.data.label_type="number"``). Out: one term, the
squared error, as BERT's fine-tuning on STS-B has it. Pearson's and Spearman's correlation are scored over all rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr

from sslx.config import build
from sslx.data.rows import abstract_row
from sslx.data.text import PreparedText, TextConfig, prepare_text, saved_tokenizer
from sslx.errors import UserError, choose
from sslx.models.text import TextModelConfig, build_text_model, check_pool, pooled
from sslx.objective import Batch, Objective, Out, Report, Term, Variables
from sslx.tasks.text_classification import TextClassifier


@dataclasses.dataclass(frozen=True)
class TextRegressionConfig:
    """``config.task`` of ``name="text_regression"``."""

    name: str = "text_regression"
    pool: str = "mean"  # over tokens | first: tanh layer on the first token, as BERT does | last: for causal models
    dropout: float = 0.1  # in the encoder and before the head, whatever pretraining used

    def __post_init__(self):
        choose(self.pool, ("mean", "first", "last"), "config.task.pool")


@dataclasses.dataclass(frozen=True)
class TextRegression(Objective):
    """The objective of ``config.task.name = "text_regression"``."""

    task: TextRegressionConfig
    model: TextModelConfig
    vocab_size: int
    tokenizer: Any  # decodes tokens in ``show``

    scored = True

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[TextRegression, PreparedText]:
        """Builds objective and data from the written config.

        Args:
          config: The whole config, with ``data``, ``model`` and ``task``.
          tokenizer: Folder of a tokenizer to use instead of ``config.data.tokenizer``.

        Raises:
          UserError: anything in the three parts that cannot be, or data without numbers.
        """
        task, model, data_config = cls._built(config)
        data = prepare_text(data_config, layout="documents", tokenizer_override=tokenizer, seed=config["seed"])
        label = data.train.fetch(np.zeros(1, np.int64)).get("label")
        if label is None or label.dtype != np.float32:
            raise UserError(
                f"config.data.source {data_config.source!r} has no labels that are numbers; "
                f"expected a column {data_config.label_field!r} (config.data.label_field)"
            )
        return cls(task, model, data.vocabulary.size, data.tokenizer), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[TextRegression, dict[str, jax.ShapeDtypeStruct]]:
        task, model, data_config = cls._built(config)
        row = abstract_row(data_config.seq_len, "documents", label=np.float32, paired=bool(data_config.pair_field))
        return cls(task, model, data_config.vocab_size, None), row

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> TextRegression:
        task, model, _ = cls._built(config)
        tokenizer, words = saved_tokenizer(run)
        return cls(task, model, words.size, tokenizer)

    @staticmethod
    def _built(config: Mapping[str, Any]) -> tuple[TextRegressionConfig, TextModelConfig, TextConfig]:
        task = build(TextRegressionConfig, config["task"], "config.task")
        data_config = build(TextConfig, config["data"], "config.data")
        if data_config.label_type != "number":
            raise UserError(
                f"config.data.label_type is {data_config.label_type!r}; text_regression expects 'number', and "
                "config.task.name=text_classification is for classes"
            )
        model = build_text_model(config["model"], data_config.seq_len)
        check_pool(model, task.pool, "config.task.pool")
        model = dataclasses.replace(model, dropout=task.dropout, attention_dropout=task.dropout)
        return task, model, data_config

    @property
    def module(self) -> TextClassifier:
        """The Linen module: that of classification, with one output."""
        return TextClassifier(self.model, self.task, self.vocab_size, 1)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        return {"params": self.module.init(key, batch, deterministic=True)["params"], "state": {}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        return batch | {"weights": {"squared_error": jnp.ones(batch["tokens"].shape[0], jnp.float32)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        output = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        error = jnp.square(output[:, 0] - batch["label"])
        return Out({"squared_error": Term(jnp.sum(batch["weights"]["squared_error"] * error))})

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": params["encoder"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        encoder = self.model.encoder(self.vocab_size).bind(variables)
        return pooled(encoder, batch, "last" if self.task.pool == "last" else "mean", deterministic=True)

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch 1"]:
        return self.module.apply({"params": params}, batch, deterministic=True)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        picked = None if self.task.pool == "mean" else 1
        return 3.0 * rows * (self.model.flops_per_row(length, picked) + 2 * self.model.width)

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        output = self.module.apply({"params": params}, batch, deterministic=True)
        return {"tokens": batch["tokens"], "output": output[:, 0], "label": batch["label"]}

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        found, wanted = np.float64(predictions["output"]), np.float64(predictions["label"])
        if len(found) < 2 or np.ptp(found) == 0 or np.ptp(wanted) == 0:
            return {"pearson": 0.0, "spearman": 0.0}  # undefined: a constant goes with nothing
        return {
            "pearson": float(pearsonr(found, wanted).statistic),
            "spearman": float(spearmanr(found, wanted).statistic),
        }

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return [
            {
                "text": self.tokenizer.decode(tokens[:40], skip_special_tokens=True),
                "label": f"{label:.3g}",
                "guess": f"{output:.3g}",
            }
            for tokens, output, label in zip(
                predictions["tokens"], predictions["output"], predictions["label"], strict=True
            )
        ]

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
