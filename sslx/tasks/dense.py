"""What detection and segmentation have in common: a ViT whose patches are asked about, and views with their mirror."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from sslx.data.fitted import FittedConfig
from sslx.errors import UserError
from sslx.models.image import build_image_model
from sslx.models.pixels import unit
from sslx.models.vit import VitConfig
from sslx.objective import row_keys

THUMB = 128  # pixels along a side that are kept of a picture to be looked at


def check_shares(task: Any, *names: str) -> None:
    """Refuses values of ``config.task`` that are no shares.

    Raises:
      UserError: one is none.
    """
    for name in names:
        if not 0 <= getattr(task, name) <= 1:
            raise UserError(f"config.task.{name} is {getattr(task, name)}; expected 0 to 1")


def dense_model(config: Mapping[str, Any], data: FittedConfig, drop_path: float) -> VitConfig:
    """The ViT of a config, with the task's drop path."""
    return dataclasses.replace(build_image_model(config["model"], data, ("vit",)), drop_path=drop_path)


def mirrored_rows(keys: PRNGKeyArray, rows: Array, probability: float) -> Bool[Array, " batch"]:
    """Which rows of a step are mirrored, drawn for each row."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(row_keys(keys, rows))


def mirrored(images: Array, which: Bool[Array, " batch"]) -> Array:
    """Left is right in some rows, ``[batch, height, width, ...]``."""
    return jnp.where(which.reshape(-1, *(1,) * (images.ndim - 1)), images[:, :, ::-1], images)


def thumbnails(images: Float[Array, "batch height width channels"]) -> UInt8[Array, "batch high wide channels"]:
    """Few enough pixels to keep those of all held-out rows, which `predict` returns."""
    every = -(-images.shape[1] // THUMB)
    return jnp.round(unit(images[:, ::every, ::every]) * 255).astype(jnp.uint8)


def some(predictions: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The first rows of predictions."""
    return {name: column[:count] for name, column in predictions.items()}
