"""Any pretext task, with its features watched while it trains: a linear probe and nearest neighbours.

In: an objective whose rows have a ``label``, which it does not look at. Each step, the encoder's features of some rows
as they are, without gradient, teach a linear classifier; each evaluation tells how many held-out rows it names right
(``online_linear``), and how many the nearest of some training rows do (``online_knn``).

What is pretrained is the same to the bit: the classifier is no parameter but part of the objective's state, which no
gradient reaches, no clipping norm counts and no later reader of the run asks for. The features are standardised by
running averages, and the classifier follows them by Adam at a constant rate, since they never stop moving. So it is a
curve to watch: ``sslx.evaluate``, which trains a probe to the end on features that stand still, says how good they are.
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
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.config import build, load_class
from sslx.errors import UserError
from sslx.models.pooling import unit_vectors
from sslx.objective import Batch, Mean, Objective, Out, Sum, Variables
from sslx.pretext import PRETEXTS
from sslx.probing.knn import KnnConfig, vote
from sslx.settings import OnlineConfig

NAME = "online"  # of its part of the state, of a viewed batch, of the weights and of the statistics
MEMORY = 0.99  # of the running averages
EPS = 1e-6
PLANNED_CLASSES = 1000  # where only the data would know


@dataclasses.dataclass(frozen=True)
class Watched(Objective):
    """``objective`` with its features watched; what training and evaluation ask is left to it."""

    objective: Objective
    config: OnlineConfig
    classes: int

    knn: ClassVar[KnnConfig] = KnnConfig()

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Watched, Any]:
        """As of the objective that the config names.

        Raises:
          UserError: also, its rows have no labels.
        """
        kind, online = cls._parts(config)
        objective, data = kind.prepare(config, tokenizer)
        without = [role for role in ("train", "eval") if "label" not in getattr(data, role).fetch(np.zeros(1, int))]
        if without or not data.label_names:
            source, name = config["data"]["source"], config["pretext"]["name"]
            raise UserError(
                f"config.online.probe needs a label of each row, and those of {name!r} on {source!r} have none in "
                f"{' and '.join(without) or 'words'}; expected rows with classes, or config.online.probe=False"
            )
        return cls(objective, online, len(data.label_names)), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[Watched, dict[str, jax.ShapeDtypeStruct]]:
        kind, online = cls._parts(config)
        objective, row = kind.abstract(config)
        return cls(objective, online, PLANNED_CLASSES), row | {"label": jax.ShapeDtypeStruct((), np.int32)}

    @staticmethod
    def _parts(config: Mapping[str, Any]) -> tuple[type[Objective], OnlineConfig]:
        if "pretext" not in config:
            raise UserError("config.online.probe watches a pretext task; a task's own scores say how good it is")
        kind = load_class(config["pretext"]["name"], PRETEXTS, "config.pretext.name", Objective)
        return kind, build(OnlineConfig, config["online"], "config.online")

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        variables = self.objective.init(key, batch)
        encoder = nn.meta.unbox(self.objective.encoder(variables["params"], variables["state"]))
        dim = jax.eval_shape(self.objective.encode, encoder, _rows(batch)).shape[-1]
        head = {"kernel": jnp.zeros((dim, self.classes)), "bias": jnp.zeros(self.classes)}
        averages = {"mean": jnp.zeros(dim), "variance": jnp.ones(dim)}
        own = {"head": head, "optimizer": self._optimizer.init(head), **averages}
        return {"params": variables["params"], "state": {**variables["state"], NAME: own}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        viewed = self.objective.views(batch, key, step, train=train)
        weights = {**viewed["weights"], NAME: jnp.ones(batch["label"].shape, jnp.float32)}
        return viewed | {"weights": weights, NAME: _rows(batch) | {"label": batch["label"]}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        own, rest, weight = state[NAME], _without(state), batch["weights"][NAME]
        watched = batch[NAME]
        if train:
            watched, weight = jax.tree.map(self._thinned, (watched, weight))
        out = self.objective.loss(params, rest, _without(batch), key, step, train=train)
        # The barrier keeps the compiler from making one computation of parts of two, whose rounding might differ.
        encoder, rows = jax.lax.optimization_barrier(
            jax.lax.stop_gradient((self.objective.encoder(params, rest), watched))
        )
        features, label = self.objective.encode(encoder, _rows(rows)), rows["label"]
        apart = features - own["mean"]
        x = apart * jax.lax.rsqrt(own["variance"] + EPS)
        logits = x @ own["head"]["kernel"] + own["head"]["bias"]
        hits = (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)
        metrics = {**out.metrics, "online_linear": Mean(jnp.sum(weight * hits), jnp.sum(weight))}
        if not train:
            return out.replace(metrics=metrics)
        # The gradient of the summed cross-entropy.
        error = jax.nn.softmax(logits) - jax.nn.one_hot(label, self.classes)
        gradient = {"kernel": x.T @ error, "bias": jnp.sum(error, axis=0)}
        seen = {"rows": jnp.float32(len(label)), "apart": jnp.sum(apart, axis=0), "squared": jnp.sum(apart**2, axis=0)}
        return out.replace(metrics=metrics, stats={**out.stats, NAME: Sum({"gradient": gradient, **seen})})

    def _thinned(self, array: Array) -> Array:
        """One row in so many, evenly, so that each device has its part; in fewer, where so many do not divide them."""
        apart = math.gcd(self.config.one_in, len(array))
        return array.reshape(len(array) // apart, apart, *array.shape[1:])[:, 0]

    def after_update(self, params: Any, state: Any, stats: dict, key: PRNGKeyArray, step: Array) -> Any:
        """Moves the classifier, then the running averages; the first update sets them."""
        own, seen = state[NAME], stats[NAME].value
        gradient = jax.tree.map(lambda total: total / seen["rows"], seen["gradient"])
        moves, optimizer = self._optimizer.update(gradient, own["optimizer"])
        away = seen["apart"] / seen["rows"]  # of the batch's mean from the running one
        spread = jnp.maximum(seen["squared"] / seen["rows"] - away**2, 0.0)
        kept = jnp.minimum(MEMORY, step / (step + 1.0))
        moved = {
            "head": optax.apply_updates(own["head"], moves),
            "optimizer": optimizer,
            "mean": own["mean"] + (1 - kept) * away,
            "variance": kept * own["variance"] + (1 - kept) * (spread + kept * away**2),
        }
        rest = self.objective.after_update(params, _without(state), _without(stats), key, step)
        return {**rest, NAME: moved}

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.config.learning_rate)

    @property
    def bank_rows(self) -> int:
        return self.config.train_rows

    @property
    def compared_rows(self) -> int:
        return self.config.eval_rows

    def remember(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        return {"features": unit_vectors(self._features(params, state, batch)), "label": batch["label"]}

    def compare(self, params: Any, state: Any, batch: Batch, bank: Mapping[str, Array]) -> dict[str, Mean]:
        votes = vote(
            bank["features"],
            bank["label"],
            self._features(params, state, batch),
            neighbours=min(self.knn.neighbours, len(bank["label"])),
            temperature=self.knn.temperature,
            classes=self.classes,
        )
        hits = (jnp.argmax(votes, axis=-1) == batch["label"]).astype(jnp.float32)
        return {"online_knn": Mean(jnp.sum(batch["valid"] * hits), jnp.sum(batch["valid"]))}

    def _features(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch dim"]:
        return self.objective.encode(self.encoder(params, state), _rows(batch))

    def encoder(self, params: Any, state: Any) -> Variables:
        return self.objective.encoder(params, _without(state))

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        return self.objective.encode(variables, batch)

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        return self.objective.predict(params, _without(state), _without(batch))

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch ..."] | None:
        return self.objective.logits(params, _without(state), batch)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows = batch_shapes["label"][0]
        taught = rows // math.gcd(self.config.one_in, rows)
        return self.objective.flops(batch_shapes) + taught * self.objective.features_flops(
            batch_shapes
        )  # forward alone

    # What follows is the objective's own.
    # What is watched needs more of a batch than representations.
    scope = property(lambda self: "row" if self.objective.scope == "row" else "batch")
    scored = property(lambda self: self.objective.scored)
    modality = property(lambda self: self.objective.modality)
    unit = property(lambda self: self.objective.unit)
    head_reads = property(lambda self: self.objective.head_reads)
    model = property(lambda self: self.objective.model)
    chance = property(lambda self: self.objective.chance)
    remedies = property(lambda self: self.objective.remedies)
    spreads = property(lambda self: self.objective.spreads)
    ranks = property(lambda self: self.objective.ranks)
    entropies = property(lambda self: self.objective.entropies)
    balanced = property(lambda self: self.objective.balanced)
    variant = property(lambda self: self.objective.variant)
    derive = property(lambda self: self.objective.derive)
    score = property(lambda self: self.objective.score)
    show = property(lambda self: self.objective.show)
    pictures = property(lambda self: self.objective.pictures)
    preview = property(lambda self: self.objective.preview)
    preview_pictures = property(lambda self: self.objective.preview_pictures)
    report = property(lambda self: self.objective.report)


def _rows(batch: Batch) -> Batch:
    """What the encoder takes of rows: neither their labels nor what the loop adds to them."""
    return {name: value for name, value in batch.items() if name not in ("label", "row", "valid")}


def _without(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What the objective has put there itself."""
    return {name: part for name, part in parts.items() if name != NAME}
