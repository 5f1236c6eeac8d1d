"""What all methods of joint embedding have in common: views, a network and perhaps a teacher that see them, one loss.

In: rows of any modality that gives several views (`ViewSource`). Each view goes through encoder, projector and, where
the method has them, predictor and prototypes; a teacher, which is a moving average of these, sees the whole ones. What
the method makes of that is `JointEmbedding.compared`; everything else is here, once.

Batch normalisation, negatives, centres and Sinkhorn's balance are of the global batch on any mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sslx.config import build
from sslx.errors import UserError
from sslx.models import chosen_model
from sslx.models.heads import HeadConfig
from sslx.models.pooling import unit_vectors
from sslx.models.statistics import NAME as STATISTICS
from sslx.models.statistics import apply_with_statistics, encoder_variables, with_statistics
from sslx.models.teacher import MomentumConfig, followed
from sslx.objective import Batch, Mean, Objective, Out, Term, Variables, rows_compared
from sslx.pretext.joint_network import Network, Seen
from sslx.pretext.picture_views import PictureViews
from sslx.pretext.sentence_views import SentenceViews
from sslx.pretext.view_source import ViewSource

SOURCES: tuple[type[ViewSource], ...] = (PictureViews, SentenceViews)
TEACHER = "teacher"  # of its part of the state
TEACHER_STATISTICS = "teacher_statistics"
# Rows whose directions are counted, at most and at least: their products with each other are as many squared, and few
# rows have few directions whatever they are.
MEASURED, FEWEST = 256, 8


@dataclasses.dataclass(frozen=True)
class Given:
    """What a loss may look at beside what was seen."""

    params: Any
    state: Any
    all_weights: dict[str, Array]  # by term
    weights: Float[Array, " batch"]  # of the first term's, one a row
    step: Array


def spread(x: Float[Array, "batch width"], weights: Float[Array, " batch"]) -> Float[Array, ""]:
    """The deviation of the features of unit vectors, times the root of the width.

    1 for vectors that point everywhere alike, 0 for such that are all the same (SimSiam's measure, arXiv 2011.10566).
    """
    x, share = unit_vectors(x), (weights / jnp.maximum(jnp.sum(weights), 1e-6))[:, None]
    variance = jnp.sum(share * (x - jnp.sum(share * x, axis=0)) ** 2, axis=0)
    return jnp.mean(jnp.sqrt(variance)) * x.shape[-1] ** 0.5


def directions(x: Float[Array, "batch width"], weights: Float[Array, " batch"]) -> Float[Array, ""]:
    """How many directions the first `MEASURED` rows fill: the participation ratio of their covariance.

    That is its trace squared over the trace of its square, from 1, where rows are multiples of one vector, to the
    smaller of their number and the width. It needs no singular values, which a step on accelerators would wait for.
    """
    x, weights = x[:MEASURED], weights[:MEASURED]
    share = (weights / jnp.maximum(jnp.sum(weights), 1e-6))[:, None]
    x = jnp.sqrt(share) * (x - jnp.sum(share * x, axis=0))
    total = jnp.sum(x**2)
    # Scaled first: the fourth power of what a collapse has left would be lost in float32.
    x = x * jax.lax.rsqrt(jnp.maximum(total, 1e-30))
    products = jnp.einsum("nd,md->nm", x, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(total > 1e-30, 1.0 / jnp.maximum(jnp.sum(products**2), 1e-30), 1.0)


def source_class(config: Mapping[str, Any], encoders: tuple[str, ...]) -> type[ViewSource]:
    """The modality that the model of a written config is of.

    Raises:
      UserError: it is none of those that a method can train.
    """
    name = chosen_model(config["model"], encoders)
    return next(source for source in SOURCES if name in source.models)


@dataclasses.dataclass(frozen=True)
class JointEmbedding(Objective):
    """A method of joint embedding; ``pretext`` is its part of the config, of the class ``pretext_config``.

    That has ``views`` and ``projector``, and may have ``predictor``, ``prototypes``, ``momentum`` (of a teacher) and
    ``frozen_steps`` (of prototypes).
    """

    pretext_config: ClassVar[type]
    terms: ClassVar[tuple[str, ...]]  # of its loss
    encoders: ClassVar[tuple[str, ...]] = (*PictureViews.models, *SentenceViews.models)  # that it can train
    across: ClassVar[bool] = True  # a term's value depends on all rows of the batch
    together: ClassVar[bool] = False  # see `Network`
    # Where a head may ignore features that are still spread.
    spreads = ("projection_std",)
    ranks = ("projection_rank",)
    product: ClassVar[Literal["student", "teacher"]] = "student"  # what is evaluated and taken away
    least_rows: ClassVar[int] = 2  # in a batch

    pretext: Any
    source: ViewSource
    rows: int  # of a batch
    steps: int  # of the schedule

    @classmethod
    def check(cls, pretext: Any, model: Any, config: Mapping[str, Any]) -> None:
        """Refuses parts of a config that are right by themselves and not together.

        Raises:
          UserError: they are not.
        """

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Self, Any]:
        objective, data_config = cls._built(config)
        source, data = objective.source.prepare(data_config, config["seed"], tokenizer)
        return dataclasses.replace(objective, source=source), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[Self, dict[str, jax.ShapeDtypeStruct]]:
        objective, data_config = cls._built(config)
        return objective, objective.source.abstract_row(data_config)

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> Self:
        objective, _ = cls._built(config)
        return dataclasses.replace(objective, source=objective.source.restored(run))

    @classmethod
    def modality_of(cls, config: Mapping[str, Any]) -> str:
        return source_class(config, cls.encoders).modality

    @classmethod
    def _built(cls, config: Mapping[str, Any]) -> tuple[Self, Any]:
        kind = source_class(config, cls.encoders)
        written = dict(config["pretext"])
        views = written.pop("views", None)  # are of a class that the modality has
        pretext = build(cls.pretext_config, written, "config.pretext")
        source, data_config = kind.built(config, views, pretext.views, cls.encoders)
        pretext = dataclasses.replace(pretext, views=source.config)
        if cls.least_rows > config["batch_size"]:
            raise UserError(
                f"config.batch_size is {config['batch_size']}; {cls.__name__} compares the rows of a batch, expected "
                f"at least {cls.least_rows}"
            )
        predictor, wanted = getattr(pretext, "predictor", None), pretext.projector.width(source.model.features_width)
        if predictor is not None and predictor.layers and predictor.out != wanted:
            raise UserError(
                f"config.pretext.predictor.out is {predictor.out} and what it predicts, the projection, has {wanted} "
                "numbers; expected the same"
            )
        cls.check(pretext, source.model, config)
        # A run that goes on longer keeps the schedule that it was started with.
        steps = config["optimizer"]["schedule_steps"] or config["steps"]
        objective = cls(pretext, source, config["batch_size"], steps)
        if config["micro_batches"] > 1 and objective.scope == "batch":
            raise UserError(
                f"config.micro_batches is {config['micro_batches']}; {cls.__name__} normalises by all rows of a batch, "
                f"so that parts of it would give another loss; expected 1, or an encoder and heads without batch "
                f"normalisation"
            )
        return objective, data_config

    @property
    def model(self) -> Any:
        """The encoder's config."""
        return self.source.model

    @property
    def modality(self) -> str:
        return self.source.modality

    @property
    def momentum(self) -> MomentumConfig | None:
        """Of the teacher, if there is one."""
        return getattr(self.pretext, "momentum", None)

    @property
    def heads(self) -> list[HeadConfig]:
        """Projector, and predictor if there is one."""
        predictor = getattr(self.pretext, "predictor", None)
        return [self.pretext.projector] + [predictor] * (predictor is not None)

    @property
    def network(self) -> Network:
        """The Linen module of what is trained."""
        predictor, prototypes = getattr(self.pretext, "predictor", None), getattr(self.pretext, "prototypes", 0)
        return Network(self.source, self.pretext.projector, predictor, prototypes, self.together)

    @property
    def teacher_network(self) -> Network:
        """The teacher's Linen module: it predicts no one."""
        return self.network.clone(source=self.source.undropped(), predicting=None)

    @property
    def scope(self) -> str:
        batch_norm = self.model.batch_norm or any(head.batch_norm for head in self.heads)
        if batch_norm:
            return "batch"
        return "representations" if self.across else "row"

    def rows_compared(self, statistics: Mapping[str, float]) -> int:
        """`sslx.objective.rows_compared` of this run's batches."""
        return rows_compared(self.rows, statistics)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        viewed = self.views(batch, key, jnp.zeros((), jnp.int32), train=False)
        keys = {"params": key, "dropout": key}
        variables = dict(self.network.init(keys, viewed["views"], deterministic=True))
        params, state = variables.pop("params"), variables
        if self.momentum is not None:
            parts = jax.eval_shape(lambda: self.teacher_network.init(keys, viewed["views"][:1], deterministic=True))
            # A copy: the step donates both, and one buffer cannot be given twice.
            state = state | {TEACHER: jax.tree.map(jnp.copy, _part({"params": params, **state}, parts))}
        return {"params": params, "state": state | self.memory(key)}

    def memory(self, key: PRNGKeyArray) -> dict[str, Any]:
        """What the method keeps in its state beside the teacher: a centre, a queue."""
        return {}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        """In evaluation too, views are random, always the same: of two that are alike there is nothing to learn."""
        ones = jnp.ones(batch["row"].shape, jnp.float32)
        rest = {name: value for name, value in batch.items() if name not in self.source.fields}
        return rest | {"views": self.source.views(batch, key), "weights": dict.fromkeys(self.terms, ones)}

    def taught(self, views: list[Batch]) -> list[Batch]:
        """The views that the teacher sees: the two whole ones."""
        return views[:2]

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        represented, stats = self._seen(params, state, batch, key, step, train)
        out = self.compare_rows(represented, params, state, batch, step)
        return out.replace(stats=stats | out.stats)

    def represent(
        self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool
    ) -> tuple[list[Seen], list[Seen] | None]:
        return self._seen(params, state, batch, key, step, train)[0]

    def _seen(
        self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, train: bool
    ) -> tuple[tuple[list[Seen], list[Seen] | None], dict[str, Any]]:
        """What student and teacher make of the views, and how that moves running averages."""
        student_key, teacher_key = jax.random.split(key)
        options = {} if self.frozen(step) is None else {"frozen": self.frozen(step)}
        student, stats = apply_with_statistics(
            self.network, params, state, batch["views"], student_key, train=train, **options
        )
        if self.momentum is None:
            return (student, None), stats
        own = jax.lax.stop_gradient(state[TEACHER])
        teacher, moved = apply_with_statistics(
            self.teacher_network, own["params"], own, self.taught(batch["views"]), teacher_key, train=train
        )
        stats |= {TEACHER_STATISTICS: moved[STATISTICS]} if moved else {}
        return (student, jax.lax.stop_gradient(teacher)), stats

    def compare_rows(
        self, represented: tuple[list[Seen], list[Seen] | None], params: Any, state: Any, batch: Batch, step: Array
    ) -> Out:
        student, teacher = represented
        weights = batch["weights"][self.terms[0]]
        out = self.compared(student, teacher, Given(params, state, batch["weights"], weights, step))
        count = jnp.sum(weights)
        watched = {"feature_std": student[0].features, "projection_std": student[0].projection}
        several = jnp.where(count >= 2, count, 0.0)  # one row has no spread
        found = {name: spread(x, weights) for name, x in watched.items()}
        metrics = {name: Mean(several * value, several) for name, value in found.items()}
        if len(weights) >= FEWEST:
            enough = jnp.where(count >= FEWEST, count, 0.0)
            metrics["projection_rank"] = Mean(enough * directions(student[0].projection, weights), enough)
        return out.replace(metrics=out.metrics | metrics)

    def compared(self, student: list[Seen], teacher: list[Seen] | None, given: Given) -> Out:
        """The loss of what student and teacher have made of the views, in the order of `ViewSource`."""
        raise NotImplementedError

    def frozen(self, step: Array) -> Bool[Array, ""] | None:
        """Whether prototypes stay as they are in this update; None: there are none that ever do."""
        steps = getattr(self.pretext, "frozen_steps", 0)
        return step < steps if steps else None

    def after_update(self, params: Any, state: Any, stats: dict, key: PRNGKeyArray, step: Array) -> Any:
        state = with_statistics(state, stats)
        if self.momentum is not None:
            momentum = self.momentum.at(step, self.steps)
            own = dict(state[TEACHER])
            own["params"] = followed(own["params"], params, momentum, step)
            if STATISTICS in own:
                # The averages of its own passes; the first update takes the student's with its parameters.
                passes = stats[TEACHER_STATISTICS].value
                own[STATISTICS] = followed(passes, state[STATISTICS], jnp.float32(1.0), step)
            state = {**state, TEACHER: own}
        return self.remembered(state, stats, step)

    def remembered(self, state: Any, stats: dict[str, Any], step: Array) -> Any:
        """The state with what `memory` made of it after an update."""
        return state

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        if cls.product == "teacher":
            return encoder_variables(state[TEACHER]["params"], state[TEACHER])
        return encoder_variables(params, state)

    def parts(self, params: Any, state: Any) -> dict[str, Any]:
        """The encoder; projectors and the like are thrown away."""
        return {"encoder": self.encoder(params, state)["params"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        return self.source.encode(variables, batch)

    def features_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        return self.source.features_flops(batch_shapes)

    def variant(self, batch: Batch, key: PRNGKeyArray) -> Batch | None:
        return self.source.views(batch, key)[0] if self.source.varied else None

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows = batch_shapes[self.source.fields[0]][0]
        projector = self.pretext.projector
        width = projector.width(self.model.features_width)
        head = projector.flops(self.model.features_width) + 2.0 * width * getattr(self.pretext, "prototypes", 0)
        predictor = self.heads[1].flops(width) if len(self.heads) > 1 else 0.0
        seen = self.source.flops(batch_shapes)
        taught = sum(of + head for of in self.taught(seen)) if self.momentum is not None else 0.0
        return rows * (3.0 * sum(of + head + predictor for of in seen) + taught)

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return self.source.preview(batch, viewed)

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return self.source.preview_pictures(batch, viewed)


def _part(whole: Any, like: Any) -> Any:
    """The entries of nested mappings that another has too."""
    if isinstance(like, Mapping):
        return {name: _part(whole[name], part) for name, part in like.items()}
    return whole


def of_all(value: Float[Array, ""], weights: Float[Array, " batch"], coef: float = 1.0) -> Term:
    """A term that is one number of the whole batch, not a sum over its rows: the step divides by the weights again."""
    return Term(value * jnp.sum(weights), coef)


def of_rows(losses: Float[Array, " batch"], weights: Float[Array, " batch"], coef: float = 1.0) -> Term:
    """A term that is a mean over rows."""
    return Term(jnp.sum(weights * losses), coef)


def mean_of(values: Float[Array, " batch"], weights: Float[Array, " batch"]) -> Mean:
    """A metric that is a mean over rows."""
    return Mean(jnp.sum(weights * values), jnp.sum(weights))


def check_number(name: str, value: float, *, zero: bool = False, most: float | None = None) -> None:
    """Refuses a ``config.pretext.NAME`` that is negative, 0 (unless ``zero``) or more than ``most``.

    Raises:
      UserError: it is.
    """
    if not (value > 0 or (zero and value == 0)) or (most is not None and value > most):
        limit = f", at most {most:g}" if most is not None else ""
        raise UserError(f"config.pretext.{name} is {value}; expected {'at least' if zero else 'more than'} 0{limit}")
