"""Texts or pairs of texts with a label each, a class or a number: a pretrained encoder, pooled, and a linear head.

In: one text or one pair of texts a row, and ``label``. Out: for a task that derives from `LabelledText`, everything
but the loss and the scores.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sslx.data.labels import saved_labels
from sslx.data.rows import abstract_row
from sslx.data.text import PreparedText, TextConfig, prepare_text, saved_tokenizer
from sslx.errors import UserError, choose
from sslx.models.bert import Pooler
from sslx.models.layers import Dense, Dropout
from sslx.models.text import TextModelConfig, check_pool, pooled
from sslx.objective import Batch
from sslx.tasks.text import TextTask


@dataclasses.dataclass(frozen=True)
class LabelledTextConfig:
    """What ``config.task`` of these tasks has in common."""

    name: str = ""
    pool: str = "mean"  # over tokens | first: tanh layer on the first token, as BERT does | last: for causal models
    dropout: float = 0.1  # in the encoder and before the head, whatever pretraining used

    def __post_init__(self):
        choose(self.pool, ("mean", "first", "last"), "config.task.pool")


class PooledHead(nn.Module):
    """Encoder, pooling, dropout, linear head."""

    config: TextModelConfig
    task: LabelledTextConfig
    vocab_size: int
    outputs: int

    def setup(self):
        self.encoder = self.config.encoder(self.vocab_size)
        if self.task.pool == "first":
            self.pooler = Pooler(self.config)
        self.drop = Dropout(self.task.dropout)
        self.head = Dense(self.outputs, ("embed", "types"))

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch outputs"]:
        x = pooled(self.encoder, batch, self.task.pool, deterministic=deterministic)
        if self.task.pool == "first":
            x = self.pooler(x)
        return self.head(self.drop(x, deterministic=deterministic)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class LabelledText(TextTask):
    """A task on labelled texts; ``label_names`` are those of its classes, () where labels are numbers."""

    label_type: ClassVar[str]  # of the data: class | number
    other: ClassVar[str]  # the task for the other type

    label_names: tuple[str, ...] = ()

    @classmethod
    @abc.abstractmethod
    def check_labels(cls, data: PreparedText, data_config: TextConfig) -> None:
        """Refuses data without labels of its type.

        Raises:
          UserError: these are such data.
        """

    @classmethod
    def check(cls, task: LabelledTextConfig, model: TextModelConfig, data_config: TextConfig) -> None:
        if data_config.label_type != cls.label_type:
            raise UserError(
                f"config.data.label_type is {data_config.label_type!r}; {task.name} expects {cls.label_type!r}, and "
                f"config.task.name={cls.other}"
            )
        check_pool(model, task.pool, "config.task.pool")

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Self, PreparedText]:
        task, model, data_config = cls._built(config)
        data = prepare_text(data_config, layout="documents", tokenizer_override=tokenizer, seed=config["seed"])
        cls.check_labels(data, data_config)
        return cls(task, model, data.vocabulary.size, data.tokenizer, data.label_names or ()), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[Self, dict[str, jax.ShapeDtypeStruct]]:
        task, model, data_config = cls._built(config)
        classes = cls.label_type == "class"
        label = np.int32 if classes else np.float32
        row = abstract_row(data_config.seq_len, "documents", label=label, paired=bool(data_config.pair_field))
        # How many classes there are, only the data knows; it matters to nothing but a small head.
        return cls(task, model, data_config.vocab_size, None, ("a", "b") if classes else ()), row

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> Self:
        task, model, _ = cls._built(config)
        tokenizer, words = saved_tokenizer(run)
        names = saved_labels(run) if cls.label_type == "class" else ()
        return cls(task, model, words.size, tokenizer, names)

    @property
    def module(self) -> PooledHead:
        """The Linen module, with an output for each class, or one for the number."""
        return PooledHead(self.model, self.task, self.vocab_size, len(self.label_names) or 1)

    @property
    def features(self) -> str:
        return "last" if self.task.pool == "last" else "mean"

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch outputs"]:
        return self.module.apply({"params": params}, batch, deterministic=True)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        picked = None if self.task.pool == "mean" else 1
        head = 2 * self.model.width * self.module.outputs
        return 3.0 * rows * (self.model.flops_per_row(length, picked) + head)

    @abc.abstractmethod
    def guesses(self, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """The label that is said of each row, from ``predict``."""

    @abc.abstractmethod
    def in_words(self, label: Any) -> str:
        """A label as a person reads it."""

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return [
            {
                "text": self.tokenizer.decode(tokens[:40], skip_special_tokens=True),
                "label": self.in_words(label),
                "guess": self.in_words(guess),
            }
            for tokens, label, guess in zip(
                predictions["tokens"], predictions["label"], self.guesses(predictions), strict=True
            )
        ]

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return [
            {
                "text": " ".join(self.tokenizer.convert_ids_to_tokens(tokens[segments > 0])),
                "label": self.in_words(label),
            }
            for tokens, segments, label in zip(
                *(batch[name] for name in ("tokens", "segment_ids", "label")), strict=True
            )
        ]
