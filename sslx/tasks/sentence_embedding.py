"""Sentence embeddings by contrast (SimCSE, arXiv 2104.08821).

In: a sentence a row; with ``pair_field`` a second one that means the same (supervised), and with ``negative_field`` a
third that does not. Without, a sentence is its own pair under another dropout mask (unsupervised), in evaluation too.
Out: one term, the cross-entropy (InfoNCE) of telling a sentence's pair from those of all rows of the global batch, and
from all hard negatives, by cosine similarity over ``temperature``.

What training leaves is the pooled encoder: the layer that ``pool="first"`` has in training is left out afterwards. The
published code (princeton-nlp/SimCSE, ``mlp_only_train``) does so without pairs; with pairs it keeps the layer, and here
it is left out all the same, so that what a run leaves is always an encoder. Evaluation tells alignment and uniformity
(arXiv 2005.10242) and, given scored pairs, Spearman's correlation between cosine similarity and score; with pairs it is
without dropout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.stats import rankdata

from sslx.data.sentences import NEGATIVE, PAIR, abstract_sentence_row, prepare_sentences
from sslx.data.text import PreparedText, TextConfig, saved_tokenizer
from sslx.data.tokenizer import spelled
from sslx.errors import UserError, choose
from sslx.models.bert import Pooler
from sslx.models.contrast import info_nce
from sslx.models.pooling import unit_vectors
from sslx.models.text import TextModelConfig, check_pool, pooled
from sslx.objective import Batch, Mean, Out, Report, Term, Variables, rows_compared
from sslx.probing.diagnostics import uniformity
from sslx.tasks.text import TextTask

COMPARED = 4096  # rows that uniformity compares with each other


@dataclasses.dataclass(frozen=True)
class SentenceEmbeddingConfig:
    """``config.task`` of ``name="sentence_embedding"``."""

    name: str = "sentence_embedding"
    pool: str = "mean"  # over tokens | first: tanh layer on the first token, in training | last: for causal models
    temperature: float = 0.05
    dropout: float = 0.1  # in the encoder, whatever pretraining used: without pairs it is all that tells views apart
    pair_field: str = ""  # field of a text that means the same as the record's text; "" = unsupervised
    negative_field: str = ""  # field of a text that does not, with pair_field
    sts: str = ""  # csv:GLOB or jsonl:GLOB with text, text2 and score: evaluation correlates with the scores

    def __post_init__(self):
        choose(self.pool, ("mean", "first", "last"), "config.task.pool")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"config.task.temperature is {self.temperature}; expected more than 0, and finite")
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.task.dropout is {self.dropout}; expected 0 or a share below 1")
        if not self.pair_field and self.dropout == 0:
            raise UserError("config.task.dropout is 0 without config.task.pair_field: both views would be the same")
        if self.negative_field and not self.pair_field:
            raise UserError("config.task.negative_field is given without config.task.pair_field")

    @property
    def fields(self) -> dict[str, str]:
        """The fields of a record's other texts, by prefix."""
        given = {PAIR: self.pair_field, NEGATIVE: self.negative_field}
        return {prefix: name for prefix, name in given.items() if name}


class SentenceEncoder(nn.Module):
    """Encoder, pooling and, for training, the layer on the first token."""

    config: TextModelConfig
    task: SentenceEmbeddingConfig
    vocab_size: int

    def setup(self):
        self.encoder = self.config.encoder(self.vocab_size)
        if self.task.pool == "first":
            self.pooler = Pooler(self.config)

    def __call__(self, batch: Batch, *, projected: bool, deterministic: bool) -> Float[Array, "batch width"]:
        """Unit vectors; ``projected`` by the layer of training, if the pooling has one."""
        x = pooled(self.encoder, batch, self.task.pool, deterministic=deterministic)
        if self.task.pool == "first" and projected:
            x = self.pooler(x).astype(jnp.float32)
        return unit_vectors(x)


@dataclasses.dataclass(frozen=True)
class SentenceEmbedding(TextTask):
    """The objective of ``config.task.name = "sentence_embedding"``."""

    task_config = SentenceEmbeddingConfig

    batch_size: int
    scores: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)  # of the scored pairs

    scope = "batch"

    @classmethod
    def check(cls, task: SentenceEmbeddingConfig, model: TextModelConfig, data_config: TextConfig) -> None:
        check_pool(model, task.pool, "config.task.pool")

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[SentenceEmbedding, PreparedText]:
        task, model, data_config = cls._built(config)
        if task.sts and config["eval"]["batches"] is not None:
            raise UserError(
                f"config.eval.batches is {config['eval']['batches']} with config.task.sts, whose pairs stand before "
                "the held-out records: such an evaluation may reach none of these; leave one of the two out"
            )
        data, pairs = prepare_sentences(data_config, task.fields, task.sts, tokenizer)
        scores = None if pairs is None else pairs.scores
        return cls(task, model, data.vocabulary.size, data.tokenizer, config["batch_size"], scores), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[SentenceEmbedding, dict[str, jax.ShapeDtypeStruct]]:
        task, model, data_config = cls._built(config)
        row = abstract_sentence_row(data_config.seq_len, ("", *task.fields))
        return cls(task, model, data_config.vocab_size, None, config["batch_size"]), row

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> SentenceEmbedding:
        task, model, _ = cls._built(config)
        tokenizer, words = saved_tokenizer(run)
        return cls(task, model, words.size, tokenizer, config["batch_size"])

    @property
    def module(self) -> SentenceEncoder:
        """The Linen module."""
        return SentenceEncoder(self.model, self.task, self.vocab_size)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        return {"params": self.module.init(key, batch, projected=True, deterministic=True)["params"], "state": {}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        return batch | {"weights": {"contrast": (batch["scored"] == 0).astype(jnp.float32)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        keys = jax.random.split(key, 3)
        first = self._embed(params, batch, "", keys[0], projected=True, train=train)
        second = self._embed(params, batch, PAIR, keys[1], projected=True, train=train)
        negatives = None
        if self.task.negative_field:
            negatives = self._embed(params, batch, NEGATIVE, keys[2], projected=True, train=train)
        weights = batch["weights"]["contrast"]
        losses, hits = info_nce(first, second, negatives, weights, self.task.temperature)
        retrieved = Mean(jnp.sum(weights * hits), jnp.sum(weights))
        return Out({"contrast": Term(jnp.sum(weights * losses))}, {"accuracy": retrieved})

    @property
    def features(self) -> str:
        return self.task.pool

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        width, others = self.model.width, 1 + bool(self.task.negative_field)
        sentence = self.model.flops_per_row(length, None if self.task.pool == "mean" else 1)
        sentence += 2 * width**2 if self.task.pool == "first" else 0
        return 3.0 * rows * ((1 + others) * sentence + 2 * others * rows * width)

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        return math.log(rows_compared(self.batch_size, statistics) * (1 + bool(self.task.negative_field)))

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        embedding = self.module.apply({"params": params}, batch, projected=False, deterministic=True)
        keys = jax.random.split(jax.random.key(0))  # always the same masks, so that evaluations can be compared
        one, other = (
            self._embed(params, batch, prefix, key, projected=False, train=False)
            for prefix, key in zip(("", PAIR), keys, strict=True)
        )
        distance = jnp.sum(jnp.square(one - other), axis=-1)
        kept = {name: batch[name] for name in ("tokens", "scored")}
        return kept | {"embedding": embedding, "distance": distance}

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        own = predictions["scored"] == 0
        embeddings, distances = predictions["embedding"][own], predictions["distance"][own]
        # Evenly chosen, as all pairs of many rows are too many.
        some = np.unique(np.linspace(0, len(embeddings) - 1, min(len(embeddings), COMPARED)).astype(int))
        values = {
            "alignment": float(np.mean(distances, dtype=np.float64)) if len(distances) else 0.0,
            "uniformity": uniformity(embeddings[some]) if len(some) > 1 else 0.0,
        }
        if self.scores is not None:
            values["sts_spearman"] = self._correlation(predictions)
        return values

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        similar = predictions["embedding"] @ predictions["embedding"].T
        if len(similar) < 2:
            return []
        np.fill_diagonal(similar, -np.inf)
        texts = [self.tokenizer.decode(tokens[:40], skip_special_tokens=True) for tokens in predictions["tokens"]]
        return [
            {"text": text, "nearest of these": texts[int(np.argmax(row))], "cosine": f"{row.max():.2f}"}
            for text, row in zip(texts, similar, strict=True)
        ]

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        names = {"": "text"} | {prefix: prefix.removesuffix("_") for prefix in self.task.fields}
        rows = []
        for row in range(len(batch["row"])):
            real = {prefix: int((batch[f"{prefix}segment_ids"][row] > 0).sum()) for prefix in names}
            rows.append(
                {
                    name: spelled(self.tokenizer, *(batch[f"{prefix}{of}"][row] for of in ("tokens", "segment_ids")))
                    for prefix, name in names.items()
                }
            )
            rows[-1]["tokens"] = ", ".join(f"{count} of {batch['tokens'].shape[1]}" for count in real.values())
        return rows

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        rows = int(np.sum(predictions["scored"] == 0))
        lines = [f"{name:<16}{value:>9.4f}" for name, value in self.score(predictions).items()]
        return Report("\n".join([f"{rows:,} sentences", *lines]), {"sentences": rows}, {})

    def _embed(
        self, params: Any, batch: Batch, prefix: str, key: PRNGKeyArray, *, projected: bool, train: bool
    ) -> Array:
        """One view; without a field of its own it is the sentence, which dropout alone tells from itself."""
        view = _view(batch, prefix if prefix in self.task.fields else "")
        deterministic = not train and bool(self.task.pair_field)
        return self.module.apply(
            {"params": params}, view, projected=projected, deterministic=deterministic, rngs={"dropout": key}
        )

    def _correlation(self, predictions: Mapping[str, np.ndarray]) -> float:
        """Spearman's, over the pairs of which both sentences are there."""
        sentence = predictions["scored"] - 1
        place = {int(number): i for i, number in enumerate(sentence) if number >= 0}
        whole = [k for k in range(len(self.scores)) if 2 * k in place and 2 * k + 1 in place]
        sides = (predictions["embedding"][[place[2 * k + side] for k in whole]] for side in (0, 1))
        cosine = np.sum(np.multiply(*sides), axis=-1)
        return spearman(cosine, self.scores[whole])


def _view(batch: Batch, prefix: str) -> Batch:
    return {name: batch[prefix + name] for name in ("tokens", "segment_ids", "positions")}


def spearman(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """The correlation of ranks, ties sharing theirs; 0 where one side does not vary."""
    if len(one) < 2:
        return 0.0
    a, b = (rankdata(x) - (len(x) + 1) / 2 for x in (one, other))
    scale = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale else 0.0
