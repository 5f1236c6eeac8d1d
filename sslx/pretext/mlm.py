"""Masked language modelling (BERT, arXiv 1810.04805), optionally with next-sentence or sentence-order prediction.

In: rows of tokens, segment ids and positions. Views: masks drawn inside jit, ``mask_ratio`` in training and always
``eval_mask_ratio`` (15 %) in evaluation, so that runs at different rates can be compared. Out: two named terms,
``mlm`` (a mean over picked tokens) and ``sentence`` (a mean over rows; NSP as in BERT, SOP as in ALBERT, arXiv
1909.11942).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.data.text import Layout
from sslx.errors import UserError, choose
from sslx.models.bert import BertConfig, BertEncoder, MaskedTokenHead, Pooler
from sslx.models.layers import Dense, padded_vocabulary
from sslx.models.losses import softmax_cross_entropy
from sslx.models.pooling import mean_pool
from sslx.objective import Batch, Mean, Out, Term, Variables
from sslx.pretext.masking import mask_tokens, masking_table, picked_count, runs
from sslx.pretext.text import TextPretext


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModelConfig:
    """``config.pretext`` of ``name="mlm"``."""

    name: str = "mlm"
    mask_ratio: float = 0.15
    eval_mask_ratio: float = 0.15
    whole_word: bool = False
    sentence: str | None = None  # None | nsp | sop: a second loss on pairs of segments

    def __post_init__(self):
        for name in ("mask_ratio", "eval_mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"config.pretext.{name} is {getattr(self, name)}; expected a share between 0 and 1")
        if self.sentence is not None:
            choose(self.sentence, ("nsp", "sop"), "config.pretext.sentence")


class BertForPretraining(nn.Module):
    """Encoder, masked-token head and, with a sentence loss, pooler and sentence head."""

    config: BertConfig
    vocab_size: int
    sentence: bool

    def setup(self):
        self.encoder = BertEncoder(self.config, self.vocab_size)
        self.mlm_head = MaskedTokenHead(self.config, self.vocab_size)
        if self.sentence:
            self.pooler = Pooler(self.config)
            self.sentence_head = Dense(2, ("embed", "types"))

    def __call__(
        self, batch: Batch, *, deterministic: bool
    ) -> tuple[Float[Array, "batch picked padded_vocab"], Float[Array, "batch 2"] | None]:
        picked = batch["picked"]
        if not self.sentence:
            x = self.encoder(batch, picked, deterministic=deterministic)
            return self.mlm_head(x, self.encoder.embeddings.word), None
        # The first token, which the sentence head reads, is never masked: it goes in front of the picked ones.
        x = self.encoder(batch, jnp.pad(picked, ((0, 0), (1, 0))), deterministic=deterministic)
        logits = self.mlm_head(x[:, 1:], self.encoder.embeddings.word)
        sentence = self.sentence_head(self.pooler(x[:, 0])).astype(jnp.float32)
        return logits, sentence


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModel(TextPretext):
    """The objective of ``config.pretext.name = "mlm"``."""

    pretext_config = MaskedLanguageModelConfig
    remedies: ClassVar[Mapping[str, str]] = {
        "no_learning": "a lower learning rate or a longer warm-up; config.model.norm_position=pre, since layers that "
        "are normalised after their sum stay there longest; a mask_ratio nearer to 0.15"
    }

    pretext: MaskedLanguageModelConfig
    model: BertConfig

    @classmethod
    def layout(cls, pretext: MaskedLanguageModelConfig) -> Layout:
        return pretext.sentence or "packed"

    @property
    def module(self) -> BertForPretraining:
        """The Linen module."""
        return BertForPretraining(self.model, self.vocabulary.size, self.pretext.sentence is not None)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        picked = jnp.zeros((batch["tokens"].shape[0], 1), jnp.int32)
        variables = self.module.init(key, batch | {"picked": picked}, deterministic=True)
        return {"params": variables["params"], "state": {}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        ratio = self.pretext.mask_ratio if train else self.pretext.eval_mask_ratio
        masked = mask_tokens(batch, key, self.vocabulary, ratio, whole_word=self.pretext.whole_word)
        weights = {"mlm": masked["weights"]}
        if self.pretext.sentence:
            weights["sentence"] = jnp.ones(batch["tokens"].shape[0], jnp.float32)
        added = {"tokens": masked["tokens"], "picked": masked["positions"], "targets": masked["targets"]}
        return batch | added | {"weights": weights}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        logits, sentence = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        weights = batch["weights"]["mlm"]
        terms = {"mlm": Term(jnp.sum(weights * softmax_cross_entropy(logits, batch["targets"])))}
        correct = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
        metrics = {"accuracy": Mean(jnp.sum(weights * correct), jnp.sum(weights))}
        if sentence is not None:
            weights, labels = batch["weights"]["sentence"], batch["sentence_label"]
            terms["sentence"] = Term(jnp.sum(weights * softmax_cross_entropy(sentence, labels)))
            hits = (jnp.argmax(sentence, axis=-1) == labels).astype(jnp.float32)
            metrics["sentence_accuracy"] = Mean(jnp.sum(weights * hits), jnp.sum(weights))
        return Out(terms, metrics)

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": params["encoder"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        x = BertEncoder(self.model, self.vocabulary.size).apply(variables, batch, deterministic=True)
        return mean_pool(x, batch["segment_ids"])

    def variant(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        return self.views(batch, key, jnp.zeros((), jnp.int32), train=True)

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch length vocab"]:
        everywhere = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
        logits, _ = self.module.apply({"params": params}, batch | {"picked": everywhere}, deterministic=True)
        return logits[..., : self.vocabulary.size]

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        width, picked = self.model.width, picked_count(length, self.pretext.mask_ratio)
        forward = self.model.flops_per_row(length, picked + (self.pretext.sentence is not None))
        forward += picked * 2 * width * (width + padded_vocabulary(self.vocabulary.size))
        return 3.0 * rows * forward

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        entropy = statistics.get("unigram_entropy")
        return None if entropy is None else entropy + (math.log(2) if self.pretext.sentence else 0.0)

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        # exp overflows a float above 709; a loss that high has no meaningful perplexity.
        return {"perplexity": math.exp(min(metrics.get("mlm", metrics["loss"]), 700.0))}

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        logits, _ = self.module.apply({"params": params}, batch, deterministic=True)
        values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 5)
        picked = {"picked": batch["picked"], "targets": batch["targets"], "weights": batch["weights"]["mlm"]}
        return {"tokens": batch["tokens"], "ids": ids, "probabilities": jnp.exp(values)} | picked

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for tokens, picked, targets, weights, ids, probabilities in zip(
            *(predictions[name] for name in ("tokens", "picked", "targets", "weights", "ids", "probabilities")),
            strict=True,
        ):
            shown = [i for i in range(len(picked)) if weights[i] and tokens[picked[i]] == self.vocabulary.mask_id]
            if not shown:
                continue
            best = shown[0]
            around = tokens[max(0, picked[best] - 12) : picked[best] + 13]
            text = self.tokenizer.decode([t for t in around if t != self.vocabulary.pad_id])
            guesses = ", ".join(
                f"{self.tokenizer.decode([token])} {p:.2f}"
                for token, p in zip(ids[best], probabilities[best], strict=True)
            )
            rows.append({"text": text, "hidden": self.tokenizer.decode([targets[best]]), "top 5 guesses": guesses})
        return rows

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = masking_table(self.tokenizer, batch, viewed["tokens"], viewed["picked"], viewed["weights"]["mlm"])
        if self.pretext.sentence:
            for row, fields in enumerate(rows):
                fields["token types"] = runs(batch["token_types"][row][batch["segment_ids"][row] > 0])
                fields["sentence label"] = str(batch["sentence_label"][row])
        return rows
