"""Text classification: a pretrained encoder, pooled, and a linear head.

In: one text or one pair of texts a row with an int label. Out: one cross-entropy term. Scored over all rows at once:
macro-F1; Matthews correlation; and of two classes the F1 of the second, which GLUE calls F1 (arXiv 1804.07461).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, confusion_matrix, f1_score, matthews_corrcoef

from sslx.config import build
from sslx.data.rows import abstract_row
from sslx.data.text import PreparedText, TextConfig, prepare_text, saved_labels, saved_tokenizer
from sslx.errors import UserError, choose
from sslx.models.bert import Pooler
from sslx.models.layers import Dense, Dropout
from sslx.models.losses import softmax_cross_entropy
from sslx.models.text import TextModelConfig, build_text_model, check_pool, pooled
from sslx.objective import Batch, Mean, Objective, Out, Report, Term, Variables


@dataclasses.dataclass(frozen=True)
class TextClassificationConfig:
    """``config.task`` of ``name="text_classification"``."""

    name: str = "text_classification"
    pool: str = "mean"  # over tokens | first: tanh layer on the first token, as BERT does | last: for causal models
    dropout: float = 0.1  # in the encoder and before the head, whatever pretraining used
    label_smoothing: float = 0.0

    def __post_init__(self):
        choose(self.pool, ("mean", "first", "last"), "config.task.pool")


class TextClassifier(nn.Module):
    """Encoder, pooling, dropout, linear head."""

    config: TextModelConfig
    task: TextClassificationConfig
    vocab_size: int
    classes: int

    def setup(self):
        self.encoder = self.config.encoder(self.vocab_size)
        if self.task.pool == "first":
            self.pooler = Pooler(self.config)
        self.drop = Dropout(self.task.dropout)
        self.head = Dense(self.classes, ("embed", "types"))

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch classes"]:
        x = pooled(self.encoder, batch, self.task.pool, deterministic=deterministic)
        if self.task.pool == "first":
            x = self.pooler(x)
        return self.head(self.drop(x, deterministic=deterministic)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TextClassification(Objective):
    """The objective of ``config.task.name = "text_classification"``."""

    task: TextClassificationConfig
    model: TextModelConfig
    vocab_size: int
    label_names: tuple[str, ...]
    tokenizer: Any  # decodes tokens in ``show``

    scored = True

    @classmethod
    def prepare(
        cls, config: Mapping[str, Any], tokenizer: str | None = None
    ) -> tuple[TextClassification, PreparedText]:
        """Builds objective and data from the written config.

        Args:
          config: The whole config, with ``data``, ``model`` and ``task``.
          tokenizer: Folder of a tokenizer to use instead of ``config.data.tokenizer``.

        Raises:
          UserError: anything in the three parts that cannot be, or data without labels.
        """
        task, model, data_config = cls._built(config)
        data = prepare_text(data_config, layout="documents", tokenizer_override=tokenizer, seed=config["seed"])
        if not data.label_names:
            raise UserError(
                f"config.data.source {data_config.source!r} has no labels that are classes; "
                f"expected a column {data_config.label_field!r} (config.data.label_field)"
            )
        if len(data.label_names) < 2:
            raise UserError(
                f"config.data.source {data_config.source!r} has one label, {data.label_names[0]!r}; expected at least 2"
            )
        return cls(task, model, data.vocabulary.size, data.label_names, data.tokenizer), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[TextClassification, dict[str, jax.ShapeDtypeStruct]]:
        task, model, data_config = cls._built(config)
        row = abstract_row(data_config.seq_len, "documents", label=np.int32, paired=bool(data_config.pair_field))
        # How many classes there are, only the data knows; it matters to nothing but a small head.
        return cls(task, model, data_config.vocab_size, ("a", "b"), None), row

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> TextClassification:
        task, model, _ = cls._built(config)
        tokenizer, words = saved_tokenizer(run)
        return cls(task, model, words.size, saved_labels(run), tokenizer)

    @staticmethod
    def _built(config: Mapping[str, Any]) -> tuple[TextClassificationConfig, TextModelConfig, TextConfig]:
        task = build(TextClassificationConfig, config["task"], "config.task")
        data_config = build(TextConfig, config["data"], "config.data")
        if data_config.label_type != "class":
            raise UserError(
                f"config.data.label_type is {data_config.label_type!r}; text_classification expects 'class', and "
                "config.task.name=text_regression is for numbers"
            )
        model = build_text_model(config["model"], data_config.seq_len)
        check_pool(model, task.pool, "config.task.pool")
        model = dataclasses.replace(model, dropout=task.dropout, attention_dropout=task.dropout)
        return task, model, data_config

    @property
    def module(self) -> TextClassifier:
        """The Linen module."""
        return TextClassifier(self.model, self.task, self.vocab_size, len(self.label_names))

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        return {"params": self.module.init(key, batch, deterministic=True)["params"], "state": {}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        return batch | {"weights": {"classification": jnp.ones(batch["tokens"].shape[0], jnp.float32)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        logits = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        weights = batch["weights"]["classification"]
        smoothing = self.task.label_smoothing if train else 0.0
        term = Term(jnp.sum(weights * softmax_cross_entropy(logits, batch["label"], smoothing)))
        hits = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        return Out({"classification": term}, {"accuracy": Mean(jnp.sum(weights * hits), jnp.sum(weights))})

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": params["encoder"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        encoder = self.model.encoder(self.vocab_size).bind(variables)
        return pooled(encoder, batch, "last" if self.task.pool == "last" else "mean", deterministic=True)

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch classes"]:
        return self.module.apply({"params": params}, batch, deterministic=True)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        picked = None if self.task.pool == "mean" else 1
        head = 2 * self.model.width * len(self.label_names)
        return 3.0 * rows * (self.model.flops_per_row(length, picked) + head)

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        logits = self.module.apply({"params": params}, batch, deterministic=True)
        return {"tokens": batch["tokens"], "logits": logits, "label": batch["label"]}

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        labels, guesses = predictions["label"], np.argmax(predictions["logits"], axis=-1)
        present = np.unique(np.concatenate([labels, guesses]))
        scores = {
            "macro_f1": f1_score(labels, guesses, labels=present, average="macro", zero_division=0),
            "matthews": matthews_corrcoef(labels, guesses) if len(present) > 1 else 0.0,
        }
        if len(self.label_names) == 2:
            scores["f1"] = f1_score(labels, guesses, pos_label=1, zero_division=0)
        return {name: float(score) for name, score in scores.items()}

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return [
            {
                "text": self.tokenizer.decode(tokens[:40], skip_special_tokens=True),
                "label": self.label_names[label],
                "guess": self.label_names[int(np.argmax(logits))],
            }
            for tokens, logits, label in zip(
                predictions["tokens"], predictions["logits"], predictions["label"], strict=True
            )
        ]

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return [
            {
                "text": " ".join(self.tokenizer.convert_ids_to_tokens(tokens[segments > 0])),
                "label": self.label_names[label],
            }
            for tokens, segments, label in zip(
                *(batch[name] for name in ("tokens", "segment_ids", "label")), strict=True
            )
        ]

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        labels, guesses = predictions["label"], np.argmax(predictions["logits"], axis=-1)
        present = np.unique(np.concatenate([labels, guesses]))
        names = [self.label_names[label] for label in present]
        options = dict(labels=present, target_names=names, zero_division=0)
        values = classification_report(labels, guesses, output_dict=True, **options)
        matrix = confusion_matrix(labels, guesses, labels=present)
        values = {"classification_report": values, "labels": names, "confusion_matrix": matrix.tolist()}
        text = classification_report(labels, guesses, digits=3, **options)
        return Report(text, values, {"confusion_matrix": _draw_confusion(matrix, names)})


def _draw_confusion(matrix: np.ndarray, names: list[str]) -> Figure:
    """Shares of each true label's rows, with the counts written in."""
    size = min(3.5 + 0.45 * len(names), 24)
    figure = Figure(figsize=(size, size * 0.9), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= 30:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, label="share of the true label", shrink=0.8)
    return figure
