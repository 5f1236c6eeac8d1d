"""What a method of joint embedding trains, and what its teacher is: an encoder with a projector and what else it has.

In: views, each a batch for the encoder. Out: what is made of each, `Seen`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sslx.models.heads import Head, HeadConfig, Prototypes
from sslx.objective import Batch
from sslx.pretext.view_source import ViewSource


@flax.struct.dataclass
class Seen:
    """What a network makes of one view, float32 with a row each; what it has no part for is None."""

    features: Float[Array, "batch features"]
    projection: Float[Array, "batch width"]
    prediction: Float[Array, "batch width"] | None = None
    scores: Float[Array, "batch prototypes"] | None = None
    patches: Float[Array, "batch hidden prototypes"] | None = None  # scores of the patches that a student does not see


class Network(nn.Module):
    """Encoder, projector, and as the method has it predictor and prototypes."""

    source: ViewSource  # whose encoder it is
    projecting: HeadConfig
    predicting: HeadConfig | None = None
    prototype_count: int = 0
    together: bool = False  # all views are normalised by one mean and variance, not each by its own

    @property
    def model(self) -> Any:
        """The encoder's config."""
        return self.source.model

    def setup(self):
        self.encoder = self.source.encoder()
        self.projector = Head(self.projecting)
        if self.predicting is not None:
            self.predictor = Head(self.predicting)
        if self.prototype_count:
            self.prototypes = Prototypes(self.prototype_count)

    def __call__(self, views: list[Batch], *, deterministic: bool, frozen: Bool[Array, ""] | None = None) -> list[Seen]:
        """What it makes of each view.

        Args:
          views: Batches of as many rows each.
          deterministic: No dropout, and normalising by running averages.
          frozen: Whether prototypes take no gradient.
        """
        if not self.together:
            seen = []
            for view in views:
                features = self.source.features(self.encoder, view, deterministic=deterministic)
                seen.append(self._beyond(features, deterministic, frozen))
            return seen
        features = []
        for alike in _alike(views):
            many = jax.tree.map(lambda *arrays: _side_by_side(arrays), *alike)
            features += _apart(self.source.features(self.encoder, many, deterministic=deterministic), len(alike))
        seen = self._beyond(_side_by_side(features), deterministic, frozen)
        parts = [_apart(part, len(views)) if part is not None else [None] * len(views) for part in _fields(seen)]
        return [Seen(*each) for each in zip(*parts, strict=True)]

    def _beyond(self, features: Array, deterministic: bool, frozen: Array | None) -> Seen:
        projection = self.projector(features, deterministic=deterministic)
        prediction = scores = None
        if self.predicting is not None:
            prediction = self.predictor(projection, deterministic=deterministic)
        if self.prototype_count:
            scores = self.prototypes(projection, frozen)
        return Seen(features, projection, prediction, scores)


def _fields(seen: Seen) -> list[Array | None]:
    return [getattr(seen, field.name) for field in dataclasses.fields(seen)]


def _alike(views: list[Batch]) -> list[list[Batch]]:
    """Views that follow each other and have the same shapes."""
    groups: list[list[Batch]] = []
    for view in views:
        if groups and jax.tree.map(jnp.shape, groups[-1][0]) == jax.tree.map(jnp.shape, view):
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


def _side_by_side(arrays: Any) -> Array:
    """Rows of several arrays as one, those of a row beside each other, so that each device keeps its own."""
    stacked = jnp.stack(list(arrays), axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _apart(array: Array, count: int) -> list[Array]:
    rows = array.reshape(-1, count, *array.shape[1:])
    return [rows[:, number] for number in range(count)]
