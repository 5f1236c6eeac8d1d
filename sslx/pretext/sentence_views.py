"""Two views of each text as SimCSE has them (arXiv 2104.08821): the text twice, under different dropout masks.

In: rows of one text each. Out: two batches for the encoder, with the same rows. What tells them apart is drawn in the
encoder, so that evaluation has dropout, too: without it, there would be nothing to tell. With ``delete`` each view
lacks other tokens besides (EDA's random deletion, arXiv 1901.11196).

A teacher sees with all it has, without dropout (`undropped`): so does ESimCSE's momentum encoder (arXiv 2109.04380;
``disable_dropout`` in caskcsg/sentemb), and what it knows is then what is used after training. Of a text without
deletions it has one vector for both views, and what its student must see through is its own mask.
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

from sslx.config import build
from sslx.data.rows import abstract_row
from sslx.data.sentences import NAMES
from sslx.data.text import PreparedText, TextConfig, prepare_text, saved_tokenizer
from sslx.data.tokenizer import Vocabulary, abstract_vocabulary, spelled
from sslx.errors import UserError, choose
from sslx.models.pooling import last_token
from sslx.models.teacher import undropped
from sslx.models.text import TextModelConfig, build_text_model, check_pool, pooled
from sslx.objective import Batch, Variables, row_keys


@dataclasses.dataclass(frozen=True)
class DropoutViews:
    """``config.pretext.views`` of texts."""

    pool: str = "mean"  # what a text's features are: mean (over tokens) | first | last (for causal models)
    delete: float = 0.0  # probability with which a view lacks a token

    def __post_init__(self):
        choose(self.pool, ("mean", "first", "last"), "config.pretext.views.pool")
        if not 0 <= self.delete < 1:
            raise UserError(f"config.pretext.views.delete is {self.delete}; expected 0 or a probability below 1")


@dataclasses.dataclass(frozen=True)
class SentenceViews:
    """Texts as a source of views (`ViewSource`)."""

    modality = "text"
    models = ("bert", "gpt")
    fields = NAMES

    model: TextModelConfig
    config: DropoutViews
    vocabulary: Vocabulary = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False)  # spells tokens in `preview`

    @classmethod
    def built(
        cls, config: Mapping[str, Any], views: Any, usual: Any, models: tuple[str, ...]
    ) -> tuple[SentenceViews, TextConfig]:
        data = build(TextConfig, config["data"], "config.data")
        if data.pair_field:
            raise UserError(
                f"config.data.pair_field is {data.pair_field!r}; views are of single texts, expected none (pairs that "
                "mean the same are for configs/finetune/sentence_embedding.py)"
            )
        model = build_text_model(config["model"], data.seq_len, models)
        views = build(DropoutViews, views or {}, "config.pretext.views")
        check_pool(model, views.pool, "config.pretext.views.pool")
        source = cls(model, views, abstract_vocabulary(data.vocab_size))
        if not source.dropped and not source.varied:
            raise UserError(
                "config.model has neither dropout nor attention_dropout and config.pretext.views.delete is 0: both "
                "views of a text would be the same; expected one of these above 0, such as config.model.dropout=0.1"
            )
        return source, data

    def prepare(self, data: TextConfig, seed: int, tokenizer: str | None) -> tuple[SentenceViews, PreparedText]:
        made = prepare_text(data, layout="documents", tokenizer_override=tokenizer, seed=seed)
        return dataclasses.replace(self, vocabulary=made.vocabulary, tokenizer=made.tokenizer), made

    def restored(self, run: Path) -> SentenceViews:
        tokenizer, words = saved_tokenizer(run)
        return dataclasses.replace(self, vocabulary=words, tokenizer=tokenizer)

    @staticmethod
    def abstract_row(data: TextConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_row(data.seq_len, "documents")

    def undropped(self) -> SentenceViews:
        return dataclasses.replace(self, model=undropped(self.model))

    @property
    def dropped(self) -> bool:
        """Whether the encoder has any dropout."""
        return undropped(self.model) != self.model

    @property
    def varied(self) -> bool:
        return self.config.delete > 0

    def views(self, batch: Batch, key: PRNGKeyArray) -> list[Batch]:
        text = {name: batch[name] for name in NAMES}
        if not self.varied:
            return [text, text]
        keys = (row_keys(view_key, batch["row"]) for view_key in jax.random.split(key))
        return [with_deletions(text, of_rows, self.config.delete, self.vocabulary.pad_id) for of_rows in keys]

    def encoder(self) -> nn.Module:
        return self.model.encoder(self.vocabulary.size)

    def features(self, encoder: nn.Module, view: Batch, *, deterministic: bool) -> Float[Array, "batch width"]:
        """With dropout, ``deterministic`` or not, which is about what a text encoder has none of."""
        return pooled(encoder, view, self.config.pool, deterministic=not self.dropped)

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch width"]:
        return pooled(self.encoder().bind(variables), batch, self.config.pool, deterministic=True)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> list[float]:
        return [self.features_flops(batch_shapes)] * 2

    def features_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        length = batch_shapes["tokens"][1]
        return self.model.flops_per_row(length, None if self.config.pool == "mean" else 1)

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, Any]) -> list[dict[str, str]]:
        rows = []
        for row in range(len(batch["row"])):
            text, *views = (
                spelled(self.tokenizer, of["tokens"][row], of["segment_ids"][row]) for of in (batch, *viewed["views"])
            )
            told = {f"view {number}": view for number, view in enumerate(views, start=1)}
            if not self.varied:
                told = {"views": "the same twice, under different dropout masks"}
            real, length = int((batch["segment_ids"][row] > 0).sum()), batch["tokens"].shape[1]
            rows.append({"text": text, **told, "tokens": f"{real} of {length}"})
        return rows

    def preview_pictures(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {}


def with_deletions(batch: Batch, keys: PRNGKeyArray, share: float, pad_id: int) -> Batch:
    """Texts without some of their tokens, those behind moved up.

    Each token goes with the probability ``share``; what stands at both ends, [CLS] and [SEP], stays, and so does the
    last token that is left.

    Args:
      batch: int32[batch, length] ``tokens``, ``segment_ids`` and ``positions`` of one text a row.
      keys: One a row.
      share: From 0 to below 1.
      pad_id: Takes the room at the end.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    place = jnp.arange(tokens.shape[1])
    inner = (place > 0) & (place < last_token(segment_ids))
    drawn = jnp.where(inner, jax.vmap(lambda key: jax.random.uniform(key, place.shape))(keys), -1.0)
    goes = inner & (drawn < share) & (drawn < jnp.max(drawn, axis=1, keepdims=True))
    kept = (segment_ids > 0) & ~goes
    order = jnp.argsort(~kept, axis=1, stable=True)
    tokens, segment_ids, kept = (jnp.take_along_axis(of, order, axis=1) for of in (tokens, segment_ids, kept))
    return {
        "tokens": jnp.where(kept, tokens, pad_id),
        "segment_ids": jnp.where(kept, segment_ids, 0),
        "positions": jnp.where(kept, place, 0),
    }
