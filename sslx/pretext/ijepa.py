"""I-JEPA (arXiv 2301.08243): predict, in features and not in pixels, blocks of a picture from the rest of it.

In: pictures. Views: a random crop, a few target blocks, and a context, which is a large block without what is in any
target. The student's encoder sees the context alone; a narrow predictor sees its outputs with a mask token in each
place of one target block, block by block. Out: one term, smooth L1 between the predictions and what the teacher, a
moving average of the student's encoder, makes of these places of the whole crop, normalised over the width.

Shapes are static: where the authors draw the sizes of blocks for each batch, here targets have one area, lying or
standing, and the context keeps as many patches as are left if no targets overlap, drawn from those that are. The
product is the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sslx.augment.policy import AugmentConfig
from sslx.errors import UserError
from sslx.models.layers import Dense, bert_init
from sslx.models.pixels import patchify, take_patches, unpatchify
from sslx.models.teacher import MomentumConfig, undropped
from sslx.models.transformer import Transformer
from sslx.models.vit import VitConfig, VitEncoder, sincos_table
from sslx.objective import Batch, Out, Term, Variables, row_keys
from sslx.picture_sheet import sheet
from sslx.pretext.latent_pictures import LatentPictures
from sslx.pretext.latent_targets import distance, watched

CONTEXT = 0.925  # share of the picture: the middle of the paper's 0.85 to 1


@dataclasses.dataclass(frozen=True)
class IJepaConfig:
    """``config.pretext`` of ``name="ijepa"``."""

    name: str = "ijepa"
    targets: int = 4  # blocks
    target_area: float = 0.175  # of each, as a share of the picture: the middle of the paper's 0.15 to 0.2
    target_aspect: float = 1.25  # its longer side over its shorter one
    predictor_layers: int = 6
    predictor_width: int = 384
    predictor_heads: int = 12
    smooth_beta: float = 1.0  # distance where smooth L1 turns from square to line
    momentum: MomentumConfig = dataclasses.field(default_factory=lambda: MomentumConfig(0.996, 1.0, "linear"))
    augment: AugmentConfig = dataclasses.field(default_factory=lambda: AugmentConfig(crop_area=(0.3, 1.0), flip=0.0))

    def __post_init__(self):
        for name in ("targets", "predictor_layers", "predictor_width", "predictor_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"config.pretext.{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.target_area < 1 or self.target_aspect < 1:
            raise UserError(
                f"config.pretext.target_area is {self.target_area} and target_aspect {self.target_aspect}; expected a "
                "share between 0 and 1, and at least 1"
            )
        if not self.smooth_beta > 0:
            raise UserError(f"config.pretext.smooth_beta is {self.smooth_beta}; expected more than 0")
        if self.predictor_width % self.predictor_heads or self.predictor_width % 4:
            raise UserError(
                f"config.pretext.predictor_width {self.predictor_width} does not divide into "
                f"config.pretext.predictor_heads {self.predictor_heads}, or by 4"
            )

    def block(self, grid: int) -> tuple[int, int]:
        """Patches along the longer and the shorter side of a target."""
        area = self.target_area * grid**2
        longer = max(1, min(grid, round((area * self.target_aspect) ** 0.5)))
        return longer, max(1, min(grid, round(area / longer)))

    def context_side(self, grid: int) -> int:
        """Patches along a side of the context's block."""
        return max(1, min(grid, round(CONTEXT**0.5 * grid)))

    def context(self, grid: int) -> int:
        """How many patches the context has."""
        longer, shorter = self.block(grid)
        return self.context_side(grid) ** 2 - self.targets * longer * shorter


def blocks(
    keys: PRNGKeyArray, grid: int, config: IJepaConfig
) -> tuple[Int[Array, "batch context"], Int[Array, "batch targets block"]]:
    """Patches of the context, in reading order, and of each target block."""
    longer, shorter = config.block(grid)
    side, kept = config.context_side(grid), config.context(grid)

    def place(key: PRNGKeyArray, high: Array | int, wide: Array | int) -> tuple[Array, Array]:
        drawn = jax.random.uniform(key, (2,))
        top, left = (jnp.floor(u * (grid - extent + 1)) for u, extent in zip(drawn, (high, wide), strict=True))
        return top.astype(jnp.int32), left.astype(jnp.int32)

    def target(key: PRNGKeyArray) -> Int[Array, " block"]:
        place_key, way_key = jax.random.split(key)
        lying = jax.random.bernoulli(way_key)
        high, wide = jnp.where(lying, shorter, longer), jnp.where(lying, longer, shorter)
        top, left = place(place_key, high, wide)
        row, column = jnp.divmod(jnp.arange(longer * shorter), wide)
        return (top + row) * grid + left + column

    def one(key: PRNGKeyArray) -> tuple[Array, Array]:
        target_key, place_key, draw_key = jax.random.split(key, 3)
        targets = jax.vmap(target)(jax.random.split(target_key, config.targets))
        top, left = place(place_key, side, side)
        row, column = jnp.divmod(jnp.arange(grid**2), grid)
        inside = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
        free = inside.at[targets.reshape(-1)].set(False)
        order = jnp.argsort(jnp.where(free, 0.0, 2.0) + jax.random.uniform(draw_key, free.shape))
        return jnp.sort(order[:kept]), targets

    return jax.vmap(one)(keys)


class Predictor(nn.Module):
    """From the context's states to those of a target block's places."""

    config: VitConfig  # its own shape
    out: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch context width"],
        context: Int[Array, "batch context"],
        target: Int[Array, "batch block"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch block out"]:
        config = self.config
        options = dict(kernel_init=config.kernel_init, dtype=config.compute_dtype)
        table = jnp.asarray(sincos_table(config.grid, config.width), config.compute_dtype)
        x = Dense(config.width, ("embed", None), name="embed", **options)(x) + table[context]
        token = self.param("mask_token", nn.with_logical_partitioning(bert_init, ("norm",)), (config.width,))
        x = jnp.concatenate([x, token.astype(x.dtype) + table[target]], axis=1)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        order = jnp.zeros(x.shape[:2], jnp.int32)
        asked = jnp.broadcast_to(context.shape[1] + jnp.arange(target.shape[1]), target.shape)
        x = Transformer(config, name="transformer")(x, None, order, asked, deterministic=deterministic)
        return Dense(self.out, ("embed", None), name="features", **options)(x).astype(jnp.float32)


class Student(nn.Module):
    """Encoder and predictor."""

    config: VitConfig
    predicting: VitConfig

    def setup(self):
        self.encoder = VitEncoder(self.config)
        self.predictor = Predictor(self.predicting, self.config.width)

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch targets block width"]:
        context, targets = batch["context"], batch["targets"]
        x = self.encoder(batch, visible=context, deterministic=deterministic)[:, self.config.front :]
        # Each target by itself: the predictor does not see how the others lie.
        times = lambda of: jnp.repeat(of, targets.shape[1], axis=0)  # noqa: E731
        flat = targets.reshape(-1, targets.shape[-1])
        y = self.predictor(times(x), times(context), flat, deterministic=deterministic)
        return y.reshape(*targets.shape, -1)


def predictor_of(model: VitConfig, pretext: IJepaConfig) -> VitConfig:
    """The predictor's shape: the encoder's kind of block, with fixed positions."""
    width = pretext.predictor_width
    size = dict(layers=pretext.predictor_layers, width=width, heads=pretext.predictor_heads, mlp_width=4 * width)
    return dataclasses.replace(model, **size, positions="sincos", drop_path=0.0, registers=0)


@dataclasses.dataclass(frozen=True)
class IJepa(LatentPictures):
    """The objective of ``config.pretext.name = "ijepa"``."""

    pretext_config = IJepaConfig

    pretext: IJepaConfig
    model: VitConfig

    @classmethod
    def check(cls, pretext: IJepaConfig, model: VitConfig, config: Mapping[str, Any]) -> None:
        if pretext.context(model.grid) < 1:
            longer, shorter = pretext.block(model.grid)
            raise UserError(
                f"config.pretext.targets is {pretext.targets}, of {longer} x {shorter} patches of {model.grid} x "
                f"{model.grid}: they may leave no context; expected fewer, or a smaller config.pretext.target_area"
            )
        if model.class_token:
            raise UserError("config.model.class_token is True, which no target teaches anything; expected False")

    @property
    def module(self) -> Student:
        """The Linen module of what is trained."""
        return Student(self.model, predictor_of(self.model, self.pretext))

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        view_key, block_key = jax.random.split(key)
        images = self.view(batch, view_key, self.pretext.augment, train=train)
        context, targets = blocks(row_keys(block_key, batch["row"]), self.model.grid, self.pretext)
        weights = {"prediction": jnp.ones(targets.shape, jnp.float32)}
        return batch | {"image": images, "context": context, "targets": targets, "weights": weights}

    def targets(self, state: Any, batch: Batch) -> Float[Array, "batch targets block width"]:
        """What the teacher makes of the targets' places in the whole crop; no gradient."""
        encoder = VitEncoder(undropped(self.model))
        x = encoder.apply({"params": jax.lax.stop_gradient(state["teacher"])}, batch, deterministic=True)
        x = jax.nn.standardize(x[:, self.model.front :].astype(jnp.float32), axis=-1, epsilon=1e-5)
        flat = batch["targets"].reshape(len(x), -1)
        return take_patches(x, flat).reshape(*batch["targets"].shape, -1)

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        weights, targets = batch["weights"]["prediction"], self.targets(state, batch)
        predicted = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        each = jnp.mean(distance(predicted - targets, self.pretext.smooth_beta), axis=-1)
        flat = [of.reshape(len(of), -1, *of.shape[3:]) for of in (predicted, targets, weights)]
        return Out({"prediction": Term(jnp.sum(weights * each))}, watched(*flat))

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": state["teacher"]}

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        pretext, model = self.pretext, self.model
        predictor, context = predictor_of(model, pretext), pretext.context(model.grid)
        block = int(np.prod(pretext.block(model.grid)))
        each = predictor.flops_per_row(context + block, block) + 2 * (context + block) * model.width * predictor.width
        student = model.flops_per_image(context) + pretext.targets * each
        return batch_shapes["image"][0] * (3.0 * student + model.flops_per_image())

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The context and each target on grey."""
        patches = np.asarray(patchify(viewed["image"], self.model.patch_size))

        def shown(which: np.ndarray) -> np.ndarray:
            there = np.zeros(patches.shape[:2], bool)
            there[np.arange(len(patches))[:, None], which] = True
            return np.asarray(unpatchify(np.where(there[..., None], patches, 0.5), self.model.patch_size))

        targets = {f"target {n + 1}": shown(viewed["targets"][:, n]) for n in range(self.pretext.targets)}
        return {"views": sheet({"view": viewed["image"], "context": shown(viewed["context"]), **targets})}
