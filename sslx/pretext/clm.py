"""Causal language modelling (GPT-2: Radford et al. 2019): predict each token from those before it.

In: rows of packed documents with the next token of each (`sslx.data.packing.causal_plan`); a token sees its own
document alone. Out: one term ``clm``, a mean over tokens, whose logits never exist whole. During training, held-out
documents are continued and shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.data.text import Layout
from sslx.errors import UserError
from sslx.models.generation import Sampling, generate, right_aligned
from sslx.models.gpt import GptConfig
from sslx.models.layers import padded_vocabulary, tied_logits
from sslx.models.losses import chunks_for, tied_cross_entropy
from sslx.models.text import pooled
from sslx.objective import Batch, Mean, Out, Term, Variables, row_keys
from sslx.pretext.text import TextPretext


@dataclasses.dataclass(frozen=True)
class CausalLanguageModelConfig:
    """``config.pretext`` of ``name="clm"``."""

    name: str = "clm"
    loss_chunks: int | None = None  # parts of a row whose logits are made one after the other; None: by their size
    prompt_tokens: int = 16  # of held-out rows, continued in the log
    sample_tokens: int = 48
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        for name in ("loss_chunks", "prompt_tokens", "sample_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"config.pretext.{name} is {value}; expected at least 1")
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """How samples are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class CausalLanguageModel(TextPretext):
    """The objective of ``config.pretext.name = "clm"``."""

    pretext_config = CausalLanguageModelConfig
    models = ("gpt",)

    pretext: CausalLanguageModelConfig
    model: GptConfig

    @classmethod
    def layout(cls, pretext: CausalLanguageModelConfig) -> Layout:
        return "causal"

    @classmethod
    def check(cls, pretext: CausalLanguageModelConfig, model: GptConfig, config: Mapping[str, Any]) -> None:
        if config["eval"]["examples"]:
            _check_samples(pretext, model, config["data"]["seq_len"])

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        variables = self.model.encoder(self.vocabulary.size).init(key, batch, deterministic=True)
        return {"params": {"encoder": variables["params"]}, "state": {}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        return batch | {"weights": {"clm": (batch["segment_ids"] > 0).astype(jnp.float32)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        x = self.model.encoder(self.vocabulary.size).apply(
            {"params": params["encoder"]}, batch, deterministic=not train, rngs={"dropout": key}
        )
        table, weights = params["encoder"]["embeddings"]["word"], batch["weights"]["clm"]
        total, right = tied_cross_entropy(
            x, table, batch["targets"], weights, self.vocabulary.size, self._chunks(x.shape[1])
        )
        return Out({"clm": Term(total)}, {"accuracy": Mean(right, jnp.sum(weights))})

    def _chunks(self, length: int) -> int:
        return min(length, self.pretext.loss_chunks or chunks_for(length, self.vocabulary.size))

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": params["encoder"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        return pooled(self.model.encoder(self.vocabulary.size).bind(variables), batch, "last", deterministic=True)

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch length vocab"]:
        encoder, size = self.model.encoder(self.vocabulary.size), self.vocabulary.size
        x = encoder.apply({"params": params["encoder"]}, batch, deterministic=True)
        return tied_logits(x, params["encoder"]["embeddings"]["word"], size)[..., :size]

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        head = 2 * length * self.model.width * padded_vocabulary(self.vocabulary.size)
        return 3.0 * rows * (self.model.flops_per_row(length) + head)

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        return statistics.get("unigram_entropy")

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        # exp overflows a float above 709; a loss that high has no meaningful perplexity.
        return {"perplexity": math.exp(min(metrics["loss"], 700.0))}

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        pretext = self.pretext
        counts = jnp.minimum(jnp.sum(batch["segment_ids"] == 1, axis=1), pretext.prompt_tokens)
        new = generate(
            self.model,
            self.vocabulary.size,
            params["encoder"],
            right_aligned(batch["tokens"], counts, pretext.prompt_tokens),
            row_keys(jax.random.key(0), batch["row"]),
            new_tokens=pretext.sample_tokens,
            sampling=pretext.sampling,
            end_id=self.vocabulary.sep_id,
            forbidden=self.never_drawn,
        )
        return {"tokens": batch["tokens"], "prompt_tokens": counts, "new": new}

    @property
    def never_drawn(self) -> tuple[int, ...]:
        """Special tokens that no text contains; the end of a document is none of them."""
        return tuple(token for token in self.vocabulary.special_ids if token != self.vocabulary.sep_id)

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for tokens, count, new in zip(*(predictions[n] for n in ("tokens", "prompt_tokens", "new")), strict=True):
            ends = np.flatnonzero(new == self.vocabulary.sep_id)
            rows.append(
                {
                    "prompt": self.tokenizer.decode(tokens[:count], skip_special_tokens=True),
                    "continued": self.tokenizer.decode(new[: ends[0]] if len(ends) else new)
                    + (" (end)" if len(ends) else ""),
                }
            )
        return rows

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for tokens, targets, segments in zip(*(batch[n] for n in ("tokens", "targets", "segment_ids")), strict=True):
            real = segments > 0
            rows.append(
                {
                    "tokens": " ".join(self.tokenizer.convert_ids_to_tokens(tokens[real])),
                    "targets": " ".join(self.tokenizer.convert_ids_to_tokens(targets[real])),
                    "documents": f"{segments.max()}, {int(real.sum())} of {len(real)} places",
                }
            )
        return rows


def _check_samples(pretext: CausalLanguageModelConfig, model: GptConfig, seq_len: int) -> None:
    if pretext.prompt_tokens > seq_len:
        raise UserError(
            f"config.pretext.prompt_tokens {pretext.prompt_tokens} is longer than config.data.seq_len {seq_len}; "
            "expected at most that (or config.eval.examples=0)"
        )
    longest = pretext.prompt_tokens + pretext.sample_tokens
    if model.positions == "learned" and longest > seq_len:  # no row teaches the positions beyond
        raise UserError(
            f"config.pretext.prompt_tokens and sample_tokens are {longest} together, longer than "
            f"config.data.seq_len {seq_len}; expected at most that (or config.eval.examples=0)"
        )
