"""Masked image modelling with a plain head (SimMIM, arXiv 2111.09886): paint what is hidden, from where it is hidden.

In: pictures. Views: a random crop, and squares of ``mask_size`` pixels that are hidden, an exact count. A learned token
stands for each hidden patch, so the encoder sees all places, and one dense layer predicts pixels from its outputs. Out:
one term, the mean absolute error over hidden pixels, normalised as the model takes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sslx.augment.policy import AugmentConfig
from sslx.data.prepared import PreparedPictures
from sslx.errors import UserError
from sslx.models.layers import Dense, bert_init
from sslx.models.pixels import patchify, take_patches, unit
from sslx.models.vit import VitConfig, VitEncoder
from sslx.objective import Batch, Out, Term, row_keys
from sslx.pretext.image import STATISTICS_FROM, some_pictures
from sslx.pretext.patch_masks import MaskedPixels, reconstructed, split_patches


@dataclasses.dataclass(frozen=True)
class SimMimConfig:
    """``config.pretext`` of ``name="simmim"``."""

    name: str = "simmim"
    mask_ratio: float = 0.6
    mask_size: int = 32  # side of a hidden square, in pixels
    augment: AugmentConfig = dataclasses.field(default_factory=lambda: AugmentConfig(crop_area=(0.67, 1.0)))


class SimMimModel(nn.Module):
    """Encoder, mask token, and one dense layer to pixels."""

    config: VitConfig

    def setup(self):
        config = self.config
        self.encoder = VitEncoder(config)
        self.mask_token = self.param("mask_token", nn.with_logical_partitioning(bert_init, ("norm",)), (config.width,))
        self.pixels = Dense(config.patch_values, ("embed", None), kernel_init=config.kernel_init)

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch hidden values"]:
        x = self.encoder(batch, hidden=(batch["hidden"], self.mask_token), deterministic=deterministic)
        return self.pixels(take_patches(x, self.config.front + batch["hidden"])).astype(jnp.float32)


def patches_of_squares(squares: Int[Array, "batch some"], grid: int, factor: int) -> Int[Array, "batch more"]:
    """The patches in squares of ``factor`` by ``factor`` patches; ``grid`` is how many squares stand along a side."""
    top, left = jnp.divmod(squares, grid)
    down, right = jnp.divmod(jnp.arange(factor**2), factor)
    rows, columns = top[..., None] * factor + down, left[..., None] * factor + right
    return (rows * (grid * factor) + columns).reshape(squares.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class SimMim(MaskedPixels):
    """The objective of ``config.pretext.name = "simmim"``."""

    pretext_config = SimMimConfig

    pretext: SimMimConfig

    @classmethod
    def check(cls, pretext: SimMimConfig, model: VitConfig, config: Mapping[str, Any]) -> None:
        size = pretext.mask_size
        if size < 1 or size % model.patch_size or model.image_size % size:
            raise UserError(
                f"config.pretext.mask_size is {size}; expected a multiple of config.model.patch_size "
                f"{model.patch_size} that divides config.model.image_size {model.image_size}"
            )
        squares = (model.image_size // size) ** 2
        if not 0 < pretext.mask_ratio < 1 or math.ceil(squares * pretext.mask_ratio) >= squares:
            raise UserError(
                f"config.pretext.mask_ratio is {pretext.mask_ratio} of {squares} squares of config.pretext.mask_size "
                f"{size}; expected a share that hides some and leaves some"
            )

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[SimMim, PreparedPictures]:
        objective, data = super().prepare(config, tokenizer)
        pixels = np.asarray(unit(jnp.asarray(some_pictures(data.eval, STATISTICS_FROM))))
        std = np.asarray(objective.model.pixel_std)
        data.statistics["pixel_deviation"] = float(np.mean(np.abs(pixels - np.median(pixels, axis=(0, 1, 2))) / std))
        return objective, data

    @property
    def module(self) -> SimMimModel:
        """The Linen module."""
        return SimMimModel(self.model)

    @property
    def _squares(self) -> tuple[int, int]:
        """Squares along a side, and patches along a square's."""
        return self.model.image_size // self.pretext.mask_size, self.pretext.mask_size // self.model.patch_size

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        view_key, mask_key = jax.random.split(key)
        images = self.view(batch, view_key, self.pretext.augment, train=train)
        grid, factor = self._squares
        count = math.ceil(grid**2 * self.pretext.mask_ratio)
        _, squares = split_patches(row_keys(mask_key, batch["row"]), grid**2, count)
        hidden = patches_of_squares(squares, grid, factor)
        weights = {"reconstruction": jnp.ones(hidden.shape, jnp.float32)}
        return batch | {"image": images, "hidden": hidden, "weights": weights}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        predicted = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        targets = take_patches(patchify(self.model.normalised(batch["image"]), self.model.patch_size), batch["hidden"])
        errors = jnp.mean(jnp.abs(predicted - targets), axis=-1)
        return Out({"reconstruction": Term(jnp.sum(batch["weights"]["reconstruction"] * errors))})

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        grid, factor = self._squares
        hidden = math.ceil(grid**2 * self.pretext.mask_ratio) * factor**2
        head = 2 * hidden * self.model.width * self.model.patch_values
        return 3.0 * batch_shapes["image"][0] * (self.model.flops_per_image() + head)

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """The loss of one value everywhere, the median."""
        return statistics.get("pixel_deviation")

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        predicted = self.module.apply({"params": params}, batch, deterministic=True)
        return reconstructed(batch, self.model.pixels(predicted), self.model.patch_size)
