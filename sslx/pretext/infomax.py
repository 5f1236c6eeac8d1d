"""Deep InfoMax (arXiv 1808.06670): a picture's summary tells of each of its places, and of no other picture's.

In: two views of each row. The encoder's features of one view and its states at each place of the other (patches, or
the last feature map) go through a head each; their product over the root of the width is the score of a pair of rows.
Out: one term, minus a bound of the mutual information between summaries and places (`sslx.models.information`), of both
views with each other; the places of one view with the summary of the other are AMDIM's change (arXiv 1906.00910), as
within one view the encoder could copy. With ``bound="infonce"`` the term is the cross-entropy, ln N by chance.

All bounds are reported in nats, whichever is trained: ``infonce``, which cannot pass ln N, ``nwj`` and ``mine``, which
can and vary the more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sslx.errors import UserError, choose
from sslx.models.heads import Head, HeadConfig
from sslx.models.information import BOUNDS
from sslx.objective import Batch, Mean, Out
from sslx.pretext.joint import Given, JointEmbedding, of_all
from sslx.pretext.joint_network import Network, Seen
from sslx.pretext.picture_views import TwoViews


@dataclasses.dataclass(frozen=True)
class InfomaxConfig:
    """``config.pretext`` of ``name="infomax"``."""

    name: str = "infomax"
    bound: str = "infonce"  # infonce | jsd | nwj | mine
    projector: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=2, hidden=1024, out=256))
    place_head: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(layers=2, hidden=1024, out=256))
    views: TwoViews = dataclasses.field(default_factory=TwoViews)

    def __post_init__(self):
        choose(self.bound, tuple(BOUNDS), "config.pretext.bound")
        if not self.projector.layers or not self.place_head.layers or self.projector.out != self.place_head.out:
            raise UserError(
                f"config.pretext.projector.out is {self.projector.out} and config.pretext.place_head.out "
                f"{self.place_head.out}, which are multiplied; expected the same, of at least one layer each"
            )


class PlaceNetwork(Network):
    """Encoder and projector, and a head on each place, which is in ``prediction`` [batch, places, width]."""

    placing: HeadConfig | None = None

    def setup(self):
        super().setup()
        self.place_head = Head(self.placing)

    def __call__(self, views: list[Batch], *, deterministic: bool, frozen: Bool[Array, ""] | None = None) -> list[Seen]:
        seen = []
        for view in views:
            x = self.encoder(view, deterministic=deterministic)
            if self.model.name == "vit":
                features, places = self.encoder.pooled(x), x[:, self.model.front :]
            else:
                places = x.reshape(len(x), -1, x.shape[-1])
                features = jnp.mean(places.astype(jnp.float32), axis=1)
            here = self._beyond(features, deterministic, frozen)
            flat = self.place_head(places.reshape(-1, places.shape[-1]), deterministic=deterministic)
            seen.append(here.replace(prediction=flat.reshape(*places.shape[:2], -1)))
        return seen


def pair_scores(
    summary: Float[Array, "rows width"], places: Float[Array, "rows places width"]
) -> Float[Array, "rows rows places"]:
    """Of each row's summary with each row's places."""
    scores = jnp.einsum("id,jpd->ijp", summary, places, precision=jax.lax.Precision.HIGHEST)
    return scores / summary.shape[-1] ** 0.5


@dataclasses.dataclass(frozen=True)
class Infomax(JointEmbedding):
    """The objective of ``config.pretext.name = "infomax"``."""

    pretext_config = InfomaxConfig
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("no_learning", "collapse", "low_rank"),
        "config.pretext.bound=infonce, more rows in a batch, a lower learning rate",
    )
    terms = ("information",)
    encoders = ("vit", "resnet")

    pretext: InfomaxConfig

    @property
    def network(self) -> PlaceNetwork:
        return PlaceNetwork(self.source, self.pretext.projector, placing=self.pretext.place_head)

    @property
    def scope(self) -> str:
        return "batch" if self.pretext.place_head.batch_norm else super().scope

    def compared(self, student: list[Seen], teacher: None, given: Given) -> Out:
        first, second = student
        weights, count = given.weights, jnp.sum(given.weights)
        both = [pair_scores(a.projection, b.prediction) for a, b in ((first, second), (second, first))]
        bounds = {name: 0.5 * sum(bound(scores, weights) for scores in both) for name, bound in BOUNDS.items()}
        loss = -bounds[self.pretext.bound]
        if self.pretext.bound == "infonce":
            loss = loss + jnp.log(jnp.maximum(jnp.sum(weights > 0), 1))
        nats = {f"{name}_nats": Mean(count * bounds[name], count) for name in ("infonce", "nwj", "mine")}
        return Out({"information": of_all(loss, weights)}, nats)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows = batch_shapes[self.source.fields[0]][0]
        model, head = self.model, self.pretext.place_head
        halved = 8 if getattr(model, "stem", "") == "cifar" else 32
        places = model.patches if model.name == "vit" else (-(-model.image_size // halved)) ** 2
        each = head.flops(model.features_width) + 2.0 * rows * head.out
        return super().flops(batch_shapes) + rows * 3.0 * 2 * places * each

    def chance(self, statistics: Mapping[str, float]) -> float:
        """Of scores that are all alike, at the value that serves the bound best."""
        contrast = math.log(self.rows_compared(statistics))
        return {"infonce": contrast, "jsd": 2 * math.log(2), "nwj": 0.0, "mine": 0.0}[self.pretext.bound]
