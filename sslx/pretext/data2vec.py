"""data2vec 2 on pictures (arXiv 2212.07525): predict a teacher's view of hidden patches, from several masks at once.

In: pictures. Views: a random crop, and for each of ``masks`` maskings of it the patches that are seen, an exact count
in a few squares, and the rest. The student's encoder sees those alone; a small convolutional decoder over all places,
with noise in the hidden ones, predicts targets there. Targets are made once a picture and serve all its masks: the
teacher, who sees all of it, gives its top layers' MLP outputs before the residual sum; each is normalised over the
picture, their mean over the width. Out: the term ``regression``, the distance in hidden places, and where there is a
class token ``class``, that of what it says itself from the mean over all places.

The teacher is a moving average of the whole encoder and takes no gradient. The product is the student. Text has
`sslx.pretext.span_context`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sslx.augment.policy import AugmentConfig
from sslx.errors import UserError
from sslx.models.layers import Dense, gelu
from sslx.models.pixels import patchify, take_patches, unpatchify
from sslx.models.teacher import MomentumConfig, undropped
from sslx.models.vit import VitConfig, VitEncoder
from sslx.objective import Batch, Out, Term, row_keys
from sslx.picture_sheet import sheet
from sslx.pretext.latent_pictures import LatentPictures
from sslx.pretext.latent_targets import EPS, distance, normalised, watched
from sslx.pretext.patch_masks import check_ratio, hidden_count


@dataclasses.dataclass(frozen=True)
class Data2vecConfig:
    """``config.pretext`` of ``name="data2vec"``; the defaults are those for a ViT-B."""

    name: str = "data2vec"
    masks: int = 16  # of each picture
    mask_ratio: float = 0.8
    square: int = 3  # patches along a side of what is left to see
    top_layers: int = 10  # of the teacher, whose mean is the target
    norm_targets: bool = True  # over the width, after the mean
    smooth_beta: float = 0.0  # distance where smooth L1 turns from square to line; 0: square everywhere
    class_weight: float = 0.01  # of what the class token says; 0: no such term
    decoder_layers: int = 6
    decoder_width: int = 768
    decoder_groups: int = 16  # of channels that are convolved apart
    noise: float = 0.01  # deviation of what stands in hidden places
    momentum: MomentumConfig = dataclasses.field(
        default_factory=lambda: MomentumConfig(0.9998, 0.99999, "linear", 100_000)
    )
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        for name in ("masks", "square", "top_layers", "decoder_layers", "decoder_width", "decoder_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"config.pretext.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("smooth_beta", "class_weight", "noise"):
            if getattr(self, name) < 0:
                raise UserError(f"config.pretext.{name} is {getattr(self, name)}; expected at least 0")
        if self.decoder_width % self.decoder_groups:
            raise UserError(
                f"config.pretext.decoder_width {self.decoder_width} does not divide into config.pretext.decoder_groups "
                f"{self.decoder_groups}"
            )


def seen_squares(
    keys: PRNGKeyArray, grid: int, seen: int, square: int
) -> tuple[Int[Array, "batch seen"], Int[Array, "batch hidden"]]:
    """Patches that are seen, in squares at random places, and the hidden ones, both in reading order.

    There are as many squares as would make up the count if they lay apart; where they overlap or reach over the edge,
    they grow by what lies beside them, so that it is exact. (The authors' code drops or adds patches at random.)
    """
    squares = math.ceil(seen / square**2)

    def one(key: PRNGKeyArray) -> Int[Array, " patches"]:
        place_key, tie_key = jax.random.split(key)
        places = jnp.stack(jnp.divmod(jnp.arange(grid**2), grid), axis=-1)
        middles = jax.random.randint(place_key, (squares, 2), 0, grid) + 0.5 * (1 - square % 2)
        away = jnp.min(jnp.max(jnp.abs(places[:, None] - middles[None]), axis=-1), axis=1)
        return jnp.argsort(away + 1e-3 * jax.random.uniform(tie_key, away.shape))

    order = jax.vmap(one)(keys)
    return jnp.sort(order[:, :seen], axis=1), jnp.sort(order[:, seen:], axis=1)


class Decoder(nn.Module):
    """Convolutions over all places, each beside a shortcut where shapes allow, and a dense layer."""

    config: VitConfig
    pretext: Data2vecConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch patches width"]) -> Float[Array, "batch patches width"]:
        config, pretext = self.config, self.pretext
        x = x.reshape(-1, config.grid, config.grid, config.width)
        for layer in range(pretext.decoder_layers):
            y = nn.Conv(
                pretext.decoder_width,
                (3, 3),
                feature_group_count=pretext.decoder_groups,
                dtype=config.compute_dtype,
                kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, None, "embed")),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
                name=f"conv_{layer}",
            )(x)
            y = gelu(jax.nn.standardize(y, axis=-1, epsilon=EPS))
            x = x + y if x.shape == y.shape else y
        x = x.reshape(len(x), config.patches, -1)
        return Dense(config.width, ("embed", None), dtype=config.compute_dtype, name="features")(x).astype(jnp.float32)


class Student(nn.Module):
    """Encoder and decoder."""

    config: VitConfig
    pretext: Data2vecConfig

    def setup(self):
        self.encoder = VitEncoder(self.config)
        self.decoder = Decoder(self.config, self.pretext)

    def __call__(
        self, batch: Batch, *, deterministic: bool
    ) -> tuple[Float[Array, "rows hidden width"], Float[Array, "rows width"] | None]:
        """Predictions in hidden places and the class token's, of each mask of each picture in turn."""
        config, seen, hidden = self.config, _flat(batch["visible"]), _flat(batch["hidden"])
        images = jnp.repeat(batch["image"], batch["visible"].shape[1], axis=0)
        x = self.encoder({"image": images}, visible=seen, deterministic=deterministic)
        # Each row's own noise; it has a place in the batch, for it must not depend on the mesh.
        places = _flat(batch["noise"]).astype(x.dtype)
        places = places.at[jnp.arange(len(x))[:, None], seen].set(x[:, config.front :])
        told = x[:, 0].astype(jnp.float32) if config.class_token else None
        return take_patches(self.decoder(places), hidden), told


def _flat(array: Array) -> Array:
    """Pictures and their masks as one axis."""
    return array.reshape(-1, *array.shape[2:])


@dataclasses.dataclass(frozen=True)
class Data2vec(LatentPictures):
    """The objective of ``config.pretext.name = "data2vec"``."""

    pretext_config = Data2vecConfig

    pretext: Data2vecConfig
    model: VitConfig

    @classmethod
    def check(cls, pretext: Data2vecConfig, model: VitConfig, config: Mapping[str, Any]) -> None:
        check_ratio(pretext.mask_ratio, model.patches, "config.pretext.mask_ratio")
        if pretext.top_layers > model.layers:
            raise UserError(
                f"config.pretext.top_layers {pretext.top_layers} is more than config.model.layers {model.layers}; "
                "expected at most that"
            )
        if model.width % pretext.decoder_groups:
            raise UserError(
                f"config.model.width {model.width} does not divide into config.pretext.decoder_groups "
                f"{pretext.decoder_groups}"
            )

    @property
    def module(self) -> Student:
        """The Linen module of what is trained."""
        return Student(self.model, self.pretext)

    @property
    def tells(self) -> bool:
        """Whether the class token predicts, too."""
        return self.model.class_token and self.pretext.class_weight > 0

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        pretext, model = self.pretext, self.model
        view_key, mask_key = jax.random.split(key)
        images = self.view(batch, view_key, pretext.augment, train=train)
        keys = jax.vmap(lambda key: jax.random.split(key, 2 * pretext.masks))(row_keys(mask_key, batch["row"]))
        mask_keys, noise_keys = jnp.split(keys, 2, axis=1)
        seen = model.patches - hidden_count(model.patches, pretext.mask_ratio)
        visible, hidden = seen_squares(mask_keys.reshape(-1), model.grid, seen, pretext.square)
        apart = lambda of: of.reshape(len(images), pretext.masks, -1)  # noqa: E731
        draw = lambda key: pretext.noise * jax.random.normal(key, (model.patches, model.width))  # noqa: E731
        added = {"image": images, "visible": apart(visible), "hidden": apart(hidden)}
        weights = {"regression": jnp.ones(added["hidden"].shape, jnp.float32)}
        if self.tells:
            weights["class"] = jnp.ones(added["hidden"].shape[:2], jnp.float32)
        return batch | added | {"noise": jax.vmap(jax.vmap(draw))(noise_keys), "weights": weights}

    def targets(self, state: Any, batch: Batch) -> Float[Array, "batch patches width"]:
        """What the teacher makes of all places of whole pictures; no gradient."""
        of_one = jnp.ones((len(batch["image"]), self.model.patches), jnp.int32)
        keep = lambda y: normalised(y[:, self.model.front :], of_one, "instance")  # noqa: E731
        teacher = {"params": jax.lax.stop_gradient(state["teacher"])}
        layers = VitEncoder(undropped(self.model)).apply(teacher, batch, keep, method="each_layer")
        mean = jnp.mean(layers[-self.pretext.top_layers :], axis=0)
        return normalised(mean, of_one, "layer") if self.pretext.norm_targets else mean

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        pretext, weights = self.pretext, jax.tree.map(_flat, batch["weights"])
        whole = self.targets(state, batch)
        predicted, told = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        targets = take_patches(jnp.repeat(whole, pretext.masks, axis=0), _flat(batch["hidden"]))
        # Means over the width, as in `span_context`; fairseq divides the sum by its root.
        each = jnp.mean(distance(predicted - targets, pretext.smooth_beta), axis=-1)
        terms = {"regression": Term(jnp.sum(weights["regression"] * each))}
        if self.tells:
            apart = told - jnp.repeat(jnp.mean(whole, axis=1), pretext.masks, axis=0)
            of_class = jnp.mean(distance(apart, pretext.smooth_beta), axis=-1)
            terms["class"] = Term(jnp.sum(weights["class"] * of_class), pretext.class_weight)
        return Out(terms, watched(predicted, targets, weights["regression"]))

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        pretext, model = self.pretext, self.model
        widths = [model.width] + [pretext.decoder_width] * pretext.decoder_layers
        convolutions = sum(2.0 * 9 * a * b / pretext.decoder_groups for a, b in itertools.pairwise(widths))
        decoder = model.patches * (convolutions + 2.0 * pretext.decoder_width * model.width)
        seen = model.patches - hidden_count(model.patches, pretext.mask_ratio)
        student = pretext.masks * (model.flops_per_image(seen) + decoder)
        return batch_shapes["image"][0] * (3.0 * student + model.flops_per_image())

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What is seen through each of the first masks, on grey."""
        patches = np.asarray(patchify(viewed["image"], self.model.patch_size))

        def shown(hidden: np.ndarray) -> np.ndarray:
            left = patches.copy()
            left[np.arange(len(left))[:, None], hidden] = 0.5
            return np.asarray(unpatchify(left, self.model.patch_size))

        masks = {f"mask {n + 1}": shown(viewed["hidden"][:, n]) for n in range(min(self.pretext.masks, 4))}
        return {"views": sheet({"view": viewed["image"], **masks})}
