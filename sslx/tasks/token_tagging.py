"""Token tagging (named entities, parts of speech): a pretrained encoder and a linear head on each word's first piece.

In: rows of tokens with a tag id on the first piece of each word and ``NO_TAG`` elsewhere. Out: one cross-entropy term,
a mean over words, as BERT does it (arXiv 1810.04805, section 5.3). Where the tags mark entities, their F1 over all
sentences at once is scored by CoNLL's definition (`entities`): as conlleval has it, words that a row had no room for
count too, as guessed O. The loss and the accuracy are of the words that the model sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from sklearn.metrics import classification_report

from sslx.data.labels import saved_labels
from sslx.data.records import PreparedRecords
from sslx.data.tagged_words import NO_TAG, TaggedRows, TaggedWordsConfig, abstract_tagged_row, prepare_tagged_words
from sslx.data.text import saved_tokenizer
from sslx.errors import UserError
from sslx.models.layers import Dense, Dropout
from sslx.models.losses import softmax_cross_entropy
from sslx.models.text import TextModelConfig
from sslx.objective import Batch, Mean, Out, Report, Term
from sslx.tasks.entities import are_entities, entity_scores
from sslx.tasks.text import TextTask


@dataclasses.dataclass(frozen=True)
class TokenTaggingConfig:
    """``config.task`` of ``name="token_tagging"``."""

    name: str = "token_tagging"
    dropout: float = 0.1  # in the encoder and before the head, whatever pretraining used


class TokenTagger(nn.Module):
    """Encoder, dropout, linear head on every token."""

    config: TextModelConfig
    task: TokenTaggingConfig
    vocab_size: int
    classes: int

    def setup(self):
        self.encoder = self.config.encoder(self.vocab_size)
        self.drop = Dropout(self.task.dropout)
        self.head = Dense(self.classes, ("embed", "types"))

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch length classes"]:
        x = self.encoder(batch, deterministic=deterministic)
        return self.head(self.drop(x, deterministic=deterministic)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TokenTagging(TextTask):
    """The objective of ``config.task.name = "token_tagging"``."""

    task_config = TokenTaggingConfig
    data_config = TaggedWordsConfig

    seq_len: int
    label_names: tuple[str, ...]
    held_out: tuple[TaggedRows, ...] = dataclasses.field(default=(), repr=False)  # whole sentences to score against

    head_reads = "tokens"

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[TokenTagging, PreparedRecords]:
        task, model, data_config = cls._built(config)
        data, names = prepare_tagged_words(data_config, tokenizer)
        if "entity" in config["checkpoint"]["best_metric"] and not are_entities(names):
            raise UserError(
                f"the tags of config.data.source {data_config.source!r} ({', '.join(names[:5])}) begin no entities "
                "(B-X, I-X); for other tags see configs/finetune/token_tagging.py:tags=pos"
            )
        held_out = tuple(rows for rows in (data.eval, data.test) if rows is not None)
        return cls(task, model, data.vocabulary.size, data.tokenizer, data_config.seq_len, names, held_out), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[TokenTagging, dict[str, jax.ShapeDtypeStruct]]:
        task, model, data_config = cls._built(config)
        row = abstract_tagged_row(data_config.seq_len)
        # How many tags there are, only the data knows; it matters to nothing but a small head.
        return cls(task, model, data_config.vocab_size, None, data_config.seq_len, ("B-X", "I-X", "O")), row

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> TokenTagging:
        task, model, data_config = cls._built(config)
        tokenizer, words = saved_tokenizer(run)
        return cls(task, model, words.size, tokenizer, data_config.seq_len, saved_labels(run))

    @property
    def module(self) -> TokenTagger:
        """The Linen module."""
        return TokenTagger(self.model, self.task, self.vocab_size, len(self.label_names))

    def rows_of(self, sentences: Sequence[Sequence[str]]) -> TaggedRows:
        """Rows of sentences, given as words, that have no tags; ``predict`` of these goes into `tags_of`."""
        return TaggedRows(sentences, None, self.tokenizer, self.seq_len)

    def tags_of(
        self, predictions: Mapping[str, np.ndarray], rows: TaggedRows, sentences: Sequence[Sequence[str]]
    ) -> list[list[str | None]]:
        """The tag of each word; None where a word did not fit in its row or has no piece.

        Args:
          predictions: From ``predict`` of all rows, in order.
          rows: From `rows_of`.
          sentences: What the rows were made from.
        """
        tagged: list[list[str | None]] = [[None] * len(words) for words in sentences]
        for row, tags in enumerate(tagged):
            words = rows.words_at(row)
            for place in np.flatnonzero(words != NO_TAG):
                tags[words[place]] = self.label_names[predictions["guesses"][row, place]]
        return tagged

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        return batch | {"weights": {"tagging": (batch["tags"] != NO_TAG).astype(jnp.float32)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        logits = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        weights, tags = batch["weights"]["tagging"], jnp.maximum(batch["tags"], 0)
        term = Term(jnp.sum(weights * softmax_cross_entropy(logits, tags)))
        hits = (jnp.argmax(logits, axis=-1) == tags).astype(jnp.float32)
        return Out({"tagging": term}, {"accuracy": Mean(jnp.sum(weights * hits), jnp.sum(weights))})

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch length classes"]:
        return self.module.apply({"params": params}, batch, deterministic=True)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        head = 2 * length * self.model.width * len(self.label_names)
        return 3.0 * rows * (self.model.flops_per_row(length) + head)

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        return statistics.get("tag_entropy")

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        logits = self.module.apply({"params": params}, batch, deterministic=True)
        guesses = jnp.argmax(logits, axis=-1)
        confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
        kept = {name: batch[name] for name in ("sentence", "tokens", "tags")}
        return kept | {"guesses": guesses, "confidence": confidence}

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        if not are_entities(self.label_names):
            return {}
        found = entity_scores(*self._by_sentence(predictions))["all"]
        return {f"entity_{name}": found[name] for name in ("precision", "recall", "f1")}

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for tokens, tags, guesses in zip(*(predictions[name] for name in ("tokens", "tags", "guesses")), strict=True):
            asked = np.flatnonzero(tags != NO_TAG)[:20]
            ends = [*asked[1:], asked[-1] + 1] if len(asked) else []
            words = [self.tokenizer.decode(tokens[a:b]).strip() for a, b in zip(asked, ends, strict=True)]
            label, guess = ([self.label_names[tag] for tag in which[asked]] for which in (tags, guesses))
            rows.append(
                {
                    "words": " ".join(words),
                    "tags": " ".join(f"{w}/{t}" for w, t in zip(words, label, strict=True) if t != "O"),
                    "guesses": " ".join(f"{w}/{t}" for w, t in zip(words, guess, strict=True) if t != "O"),
                }
            )
        return rows

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for tokens, tags, real in zip(batch["tokens"], batch["tags"], batch["segment_ids"] > 0, strict=True):
            pieces = self.tokenizer.convert_ids_to_tokens(tokens[real])
            seen = [p if t == NO_TAG else f"{p}/{self.label_names[t]}" for p, t in zip(pieces, tags[real], strict=True)]
            rows.append({"text": " ".join(seen), "tokens": f"{int(real.sum())} of {len(real)}"})
        return rows

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        asked = predictions["tags"] != NO_TAG
        tags, guesses = predictions["tags"][asked], predictions["guesses"][asked]
        present = np.unique(np.concatenate([tags, guesses]))
        options = dict(labels=present, target_names=[self.label_names[tag] for tag in present], zero_division=0)
        values = {"tag_report": classification_report(tags, guesses, output_dict=True, **options)}
        if not are_entities(self.label_names):
            return Report(classification_report(tags, guesses, digits=3, **options), values, {})
        scores = entity_scores(*self._by_sentence(predictions))
        lines = [f"{'':<20}{'precision':>10}{'recall':>10}{'f1':>10}{'support':>10}"]
        for kind, found in scores.items():
            numbers = "".join(f"{found[name]:>10.3f}" for name in ("precision", "recall", "f1"))
            lines.append(f"{kind:<20}{numbers}{found['support']:>10,}")
        return Report("\n".join(lines), values | {"entities": scores}, {})

    def _by_sentence(self, predictions: Mapping[str, np.ndarray]) -> tuple[list[list[str]], list[list[str]]]:
        """Tags and guesses of all words of each held-out sentence; what the model does not see is guessed O."""
        first = predictions["sentence"][0]
        rows = next(r for r in self.held_out if r.first_sentence <= first < r.first_sentence + len(r))
        gold, guessed = [], []
        for sentence, guesses in zip(predictions["sentence"], predictions["guesses"], strict=True):
            row = int(sentence) - rows.first_sentence
            words = rows.words_at(row)
            gold.append([self.label_names[tag] for tag in rows.tags[row]])
            guessed.append(["O"] * len(gold[-1]))
            for place in np.flatnonzero(words != NO_TAG):
                guessed[-1][words[place]] = self.label_names[guesses[place]]
        return gold, guessed
