"""iBOT (arXiv 2111.07832) and DINOv2 (arXiv 2304.07193): DINO, and the same for patches that the student does not see.

In: two large crops and some small ones of each row; of half the large crops, each drawn for itself, a block of patches
is hidden from the student behind a learned token. Out: DINO's term on the crops; ``patches``, the cross-entropy between
the teacher's shares of the prototypes for a hidden patch and the student's, the mean over the hidden patches of a crop
and then over such crops; and with ``koleo`` the term of the same name, which keeps a batch's features apart (each row's
distance to its nearest, arXiv 1806.03198). One head serves crops and patches, as in iBOT.

With ``balance="centre"`` patches have a centre of their own, the mean over hidden ones (iBOT's is over all); with
``sinkhorn`` hidden patches of the whole batch are balanced at once, as in DINOv2. The product is the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sslx.augment.chance import chosen
from sslx.errors import UserError
from sslx.models.assignment import centre_moved, centred, cross_entropy, sinkhorn
from sslx.models.contrast import cosines
from sslx.models.layers import bert_init
from sslx.models.pixels import take_patches
from sslx.models.pooling import unit_vectors
from sslx.models.vit import VitConfig
from sslx.objective import Batch, Out, Sum, Term, row_keys
from sslx.pretext.dino import Dino, DinoConfig
from sslx.pretext.joint import Given, check_number, of_all
from sslx.pretext.joint_network import Network, Seen
from sslx.pretext.patch_masks import block_order

EPS = 1e-8  # beside a distance


@dataclasses.dataclass(frozen=True)
class IbotConfig(DinoConfig):
    """``config.pretext`` of ``name="ibot"``."""

    name: str = "ibot"
    masked_rows: float = 0.5  # share of the large crops of which patches are hidden
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # least and largest share of their patches
    patch_weight: float = 0.5  # of the mean over crops with hidden patches; theirs is 1 over all, half of them without
    koleo: float = 0.0  # weight of the term; DINOv2's is 0.1

    def __post_init__(self):
        super().__post_init__()
        check_number("masked_rows", self.masked_rows, most=1.0)
        check_number("koleo", self.koleo, zero=True)
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise UserError(f"config.pretext.mask_ratio is {self.mask_ratio}; expected two rising shares")

    def most_hidden(self, patches: int) -> int:
        """How many of so many patches may be hidden at most."""
        return max(1, int(patches * self.mask_ratio[1]))


def hidden_blocks(
    keys: PRNGKeyArray, grid: int, config: IbotConfig
) -> tuple[Int[Array, "batch hidden"], Float[Array, "batch hidden"]]:
    """Which patches of each row are hidden, and their weights, which add up to 1 in a row of which there are any.

    There is room for the largest share; where fewer are hidden the rest are the number of all patches, which is none.
    """
    patches, most = grid**2, config.most_hidden(grid**2)
    order_keys, count_keys, any_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    low, high = config.mask_ratio
    share = jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(count_keys)
    drawn = chosen(any_keys, config.masked_rows)
    count = jnp.where(drawn, jnp.clip(jnp.floor(share * patches), 1, most), 0)[:, None]
    there = jnp.arange(most)[None, :] < count
    which = jnp.where(there, block_order(order_keys, grid)[:, :most], patches)
    return which, there / jnp.maximum(count, 1.0)


def koleo(features: Float[Array, "batch width"], weights: Float[Array, " batch"]) -> Float[Array, ""]:
    """Minus the mean logarithm of the distance of each unit vector to its nearest, float32.

    Two that are the same have no distance, whose logarithm and gradient are not finite: `EPS` stands beside it.
    """
    x = unit_vectors(features.astype(jnp.float32))
    alone = jnp.eye(len(x), dtype=bool) | (weights <= 0)[None, :]
    nearest = jax.lax.stop_gradient(jnp.argmax(jnp.where(alone, -2.0, cosines(x, x)), axis=1))
    distance = jnp.sqrt(jnp.sum((x - x[nearest]) ** 2, axis=-1) + EPS**2)
    return -jnp.sum(weights * jnp.log(distance + EPS)) / jnp.maximum(jnp.sum(weights), 1e-6)


class PatchNetwork(Network):
    """Encoder, projector and prototypes, for crops and for the patches that ``batch["hidden"]`` names."""

    masked: bool = True  # it does not see them

    def setup(self):
        super().setup()
        if self.masked:
            start = nn.with_logical_partitioning(bert_init, ("norm",))
            self.mask_token = self.param("mask_token", start, (self.model.width,))

    def __call__(self, views: list[Batch], *, deterministic: bool, frozen: Bool[Array, ""] | None = None) -> list[Seen]:
        seen = []
        for view in views:
            hidden = view.get("hidden")
            replaced = None if hidden is None or not self.masked else (hidden, self.mask_token)
            x = self.encoder(view, hidden=replaced, deterministic=deterministic)
            here = self._beyond(self.encoder.pooled(x), deterministic, frozen)
            if hidden is not None:
                patches = x[:, self.model.front :]
                picked = take_patches(patches, jnp.minimum(hidden, patches.shape[1] - 1)).astype(jnp.float32)
                rows = self._beyond(picked.reshape(-1, picked.shape[-1]), deterministic, frozen)
                here = here.replace(patches=rows.scores.reshape(*hidden.shape, -1))
            seen.append(here)
        return seen


@dataclasses.dataclass(frozen=True)
class Ibot(Dino):
    """The objective of ``config.pretext.name = "ibot"``."""

    pretext_config = IbotConfig
    terms = ("distillation", "patches")
    encoders = ("vit",)

    pretext: IbotConfig

    @classmethod
    def check(cls, pretext: IbotConfig, model: VitConfig, config: Mapping[str, Any]) -> None:
        if pretext.koleo and config["batch_size"] < 2:
            raise UserError(
                "config.pretext.koleo needs rows that are each other's nearest; expected a config.batch_size of 2 or "
                "more"
            )
        if pretext.projector.batch_norm:
            raise UserError(
                "config.pretext.projector.norm is True: crops and patches would be normalised together; expected False"
            )

    @property
    def across(self) -> bool:
        return super().across or self.pretext.koleo > 0

    @property
    def network(self) -> PatchNetwork:
        return PatchNetwork(self.source, self.pretext.projector, None, self.pretext.prototypes)

    @property
    def teacher_network(self) -> PatchNetwork:
        return self.network.clone(source=self.source.undropped(), masked=False)

    def memory(self, key: PRNGKeyArray) -> dict[str, Any]:
        kept = super().memory(key)
        return kept | {f"patch_{name}": value for name, value in kept.items()}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        view_key, mask_key = jax.random.split(key)
        viewed = super().views(batch, view_key, step, train=train)
        weights = []
        for number, view in enumerate(viewed["views"][:2]):
            keys = row_keys(jax.random.fold_in(mask_key, number), batch["row"])
            view["hidden"], weight = hidden_blocks(keys, self.model.grid, self.pretext)
            weights.append(weight)
        terms = {"distillation": viewed["weights"]["distillation"], "patches": jnp.stack(weights, axis=1)}
        if self.pretext.koleo:
            terms["koleo"] = terms["distillation"]
        return viewed | {"weights": terms}

    def compared(self, student: list[Seen], teacher: list[Seen], given: Given) -> Out:
        pretext = self.pretext
        out = super().compared(student, teacher, given)
        weights = given.all_weights["patches"]
        scores = jnp.stack([view.patches for view in teacher], axis=1)
        temperature = pretext.teacher_temperature_at(given.step)
        if pretext.balance == "sinkhorn":
            flat = sinkhorn(scores.reshape(-1, scores.shape[-1]), weights.reshape(-1), temperature)
            targets = flat.reshape(scores.shape)
        else:
            targets = centred(scores, given.state.get("patch_centre", 0.0), temperature)
        said = jnp.stack([view.patches for view in student[:2]], axis=1) / pretext.student_temperature
        terms = out.terms | {"patches": Term(jnp.sum(weights * cross_entropy(targets, said)), pretext.patch_weight)}
        stats = dict(out.stats)
        if pretext.balance == "centre":
            total = jnp.einsum("bvhk,bvh->k", scores, jnp.sign(weights))
            stats["patch_centre"] = Sum({"total": jax.lax.stop_gradient(total), "count": jnp.sum(jnp.sign(weights))})
        if pretext.koleo:
            apart = sum(koleo(view.features, given.weights) for view in student[:2])
            terms["koleo"] = of_all(apart, given.weights, pretext.koleo)
        return out.replace(terms=terms, stats=stats)

    def remembered(self, state: Any, stats: dict[str, Any], step: Array) -> Any:
        state = super().remembered(state, stats, step)
        if "patch_centre" not in stats:
            return state
        seen = stats["patch_centre"].value
        moved = centre_moved(state["patch_centre"], **seen, momentum=self.centre_momentum_at(step))
        # An update without any hidden patch leaves it where it is.
        return {**state, "patch_centre": jnp.where(seen["count"] > 0, moved, state["patch_centre"])}

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        # The head runs on room for as many patches as can be hidden; fewer are on the average.
        head, most = self.pretext.projector, self.pretext.most_hidden(self.model.patches)
        each = head.flops(self.model.width) + 2.0 * head.width(self.model.width) * self.pretext.prototypes
        return super().flops(batch_shapes) + batch_shapes[self.source.fields[0]][0] * 2 * most * 4.0 * each

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """Also the loss of shares that are all alike; None with ``koleo``, of which nothing is known."""
        if self.pretext.koleo:
            return None
        return (1.0 + self.pretext.patch_weight) * super().chance(statistics)
