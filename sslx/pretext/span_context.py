"""Context prediction (data2vec, arXiv 2202.03555 and 2212.07525): predict a teacher's view of masked spans.

In: rows of tokens, segment ids and positions. Views: spans of each row become [MASK], an exact count of places. Out:
one term, the distance between what the student, who sees the masked row, predicts at the masked places and what the
teacher, who sees the whole row, makes of them: the mean over its top layers of their MLP outputs before the residual
sum, each normalised without scale and bias. No token is guessed, so it is a discriminative alternative to masked
language modelling.

The teacher is an exponential moving average of the student's transformer, kept in ``state``; the embeddings are the
student's own, which the paper found slightly better (fairseq's ``ema_transformer_layers_only``). It runs without
dropout and takes no gradient. The product is the student, which is what fairseq fine-tunes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.errors import UserError, choose
from sslx.models.bert import BertConfig, BertEncoder
from sslx.models.layers import Dense, gelu
from sslx.models.pooling import mean_pool
from sslx.models.teacher import between, followed
from sslx.objective import Batch, Out, Term, Variables
from sslx.pretext.latent_targets import distance, explained, normalised, watched
from sslx.pretext.masking import mask_tokens, masking_table, picked_count
from sslx.pretext.text import TextPretext


@dataclasses.dataclass(frozen=True)
class SpanContextConfig:
    """``config.pretext`` of ``name="span_context"``."""

    name: str = "span_context"
    mask_ratio: float = 0.35
    span: int = 4  # places in a masked run
    top_layers: int = 10  # of the teacher, whose mean is the target
    target_norm: str = "layer"  # of each layer: over its width (data2vec's text) | instance: over the row (data2vec 2)
    smooth_beta: float = 0.0  # distance where smooth L1 turns from square to line; 0: square everywhere
    ema_start: float = 0.999
    ema_end: float = 0.9999
    ema_steps: int = 300_000  # from one to the other

    def __post_init__(self):
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"config.pretext.mask_ratio is {self.mask_ratio}; expected a share between 0 and 1")
        for name in ("span", "top_layers", "ema_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"config.pretext.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("ema_start", "ema_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.pretext.{name} is {getattr(self, name)}; expected 0 to 1")
        if self.smooth_beta < 0:
            raise UserError(f"config.pretext.smooth_beta is {self.smooth_beta}; expected at least 0")
        choose(self.target_norm, ("layer", "instance"), "config.pretext.target_norm")


class RegressionHead(nn.Module):
    """Dense to twice the width, GELU, dense back."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch picked width"]) -> Float[Array, "batch picked width"]:
        width, dtype = self.config.width, self.config.compute_dtype
        x = gelu(Dense(2 * width, ("embed", "mlp"), dtype=dtype, name="up")(x))
        return Dense(width, ("mlp", "embed"), dtype=dtype, name="down")(x).astype(jnp.float32)


class Student(nn.Module):
    """Encoder and regression head."""

    config: BertConfig
    vocab_size: int

    def setup(self):
        self.encoder = BertEncoder(self.config, self.vocab_size)
        self.regression_head = RegressionHead(self.config)

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch picked width"]:
        batch = batch | {"tokens": batch["masked"]}
        return self.regression_head(self.encoder(batch, batch["picked"], deterministic=deterministic))


@dataclasses.dataclass(frozen=True)
class SpanContext(TextPretext):
    """The objective of ``config.pretext.name = "span_context"``."""

    pretext_config = SpanContextConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("collapse", "low_rank"),
        "a teacher that follows more slowly (config.pretext.ema_start and ema_end nearer to 1), a lower learning rate, "
        "config.pretext.target_norm=instance",
    )
    spreads = ("target_std",)
    unit = ""

    pretext: SpanContextConfig
    model: BertConfig

    @classmethod
    def check(cls, pretext: SpanContextConfig, model: BertConfig, config: Mapping[str, Any]) -> None:
        if pretext.top_layers > model.layers:
            raise UserError(
                f"config.pretext.top_layers {pretext.top_layers} is more than config.model.layers {model.layers}; "
                "expected at most that"
            )

    @property
    def module(self) -> Student:
        """The Linen module of what is trained."""
        return Student(self.model, self.vocabulary.size)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        seen = {"masked": batch["tokens"], "picked": jnp.zeros((batch["tokens"].shape[0], 1), jnp.int32)}
        params = self.module.init(key, batch | seen, deterministic=True)["params"]
        # A copy: the step donates both, and one buffer cannot be given twice.
        teacher = jax.tree.map(jnp.copy, params["encoder"]["transformer"])
        return {"params": params, "state": {"teacher": teacher}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        pretext = self.pretext
        masked = mask_tokens(batch, key, self.vocabulary, pretext.mask_ratio, span=pretext.span, hidden=1.0, noise=0.0)
        added = {"masked": masked["tokens"], "picked": masked["positions"]}
        return batch | added | {"weights": {"regression": masked["weights"]}}

    def targets(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch picked width"]:
        """What the teacher makes of the picked places of whole rows; no gradient."""

        def keep(y: Float[Array, "batch length width"]) -> Float[Array, "batch picked width"]:
            y = normalised(y, batch["segment_ids"], self.pretext.target_norm)
            return jnp.take_along_axis(y, batch["picked"][..., None], axis=1)

        teacher = {"embeddings": params["encoder"]["embeddings"], "transformer": state["teacher"]}
        teacher = jax.lax.stop_gradient(teacher)
        encoder = BertEncoder(self.model, self.vocabulary.size)
        layers = encoder.apply({"params": teacher}, batch, keep, method="each_layer")
        return jnp.mean(layers[-self.pretext.top_layers :], axis=0)

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        weights = batch["weights"]["regression"]
        targets = self.targets(params, state, batch)
        predicted = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        # fairseq adds up over the width, where this is the mean, which a reader can compare between widths. Gradients
        # are smaller by the width, too: its clipping norm and Adam's eps have to be divided by it.
        each = jnp.mean(distance(predicted - targets, self.pretext.smooth_beta), axis=-1)
        return Out({"regression": Term(jnp.sum(weights * each))}, watched(predicted, targets, weights))

    def after_update(self, params: Any, state: Any, stats: dict, key: PRNGKeyArray, step: Array) -> Any:
        """Moves the teacher towards the student; the first update copies it.

        A run that starts from another (``config.init``) replaces the student's encoder after the teacher was made.
        """
        momentum = self.momentum(step)
        return {"teacher": followed(state["teacher"], params["encoder"]["transformer"], momentum, step)}

    def momentum(self, step: Array) -> Float[Array, ""]:
        """The teacher's momentum: a line from ``ema_start`` to ``ema_end`` over ``ema_steps`` updates."""
        pretext = self.pretext
        return between(pretext.ema_start, pretext.ema_end, step, pretext.ema_steps, "linear")

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": params["encoder"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        x = BertEncoder(self.model, self.vocabulary.size).apply(variables, batch, deterministic=True)
        return mean_pool(x, batch["segment_ids"])

    def variant(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        return batch | {"tokens": self.views(batch, key, jnp.zeros((), jnp.int32), train=True)["masked"]}

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        picked = picked_count(length, self.pretext.mask_ratio)
        student = self.model.flops_per_row(length, picked) + 8 * picked * self.model.width**2
        return rows * (3.0 * student + self.model.flops_per_row(length))

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """None: the best constant prediction errs by the targets' variance, which moves with the teacher.

        Normalised over the row (``target_norm="instance"``) each layer has variance 1, and the mean of K layers between
        1/K and 1, by how alike they are; normalised over the width nothing is known, and a constant teacher has 0. So
        the loss says nothing by itself: ``explained`` sets it against the variance of the same targets.
        """
        return None

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return explained(metrics)

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        """What the student will see; the teacher sees the originals."""
        return masking_table(self.tokenizer, batch, viewed["masked"], viewed["picked"], viewed["weights"]["regression"])
