"""What detection and segmentation have in common: a ViT whose patches are asked about, and views with their mirror."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sslx.config import build
from sslx.data.fitted import FittedConfig
from sslx.data.labels import saved_labels
from sslx.data.prepared import PreparedPictures
from sslx.errors import UserError
from sslx.models.image import build_image_model
from sslx.models.pixels import unit
from sslx.models.vit import VitConfig
from sslx.objective import Batch, Objective, Variables

THUMB = 128  # pixels along a side that are kept of a picture to be looked at
DRAWN = 12  # pictures of the report


def check_shares(task: Any, *names: str) -> None:
    """Refuses values of ``config.task`` that are no shares.

    Raises:
      UserError: one is none.
    """
    for name in names:
        if not 0 <= getattr(task, name) <= 1:
            raise UserError(f"config.task.{name} is {getattr(task, name)}; expected 0 to 1")


@dataclasses.dataclass(frozen=True)
class DenseTask(Objective):
    """A question about each patch of a picture; ``task`` is its part of the config, of the class ``task_config``."""

    task_config: ClassVar[type]
    data_config: ClassVar[type[FittedConfig]]
    scored = True
    modality = "images"
    head_reads = "tokens"

    task: Any
    model: VitConfig
    label_names: tuple[str, ...]

    @classmethod
    def rows(cls, config: Any) -> PreparedPictures:
        """Prepares the data, after anything that would only be found missing later has been asked for."""
        raise NotImplementedError

    @classmethod
    def abstract_row(cls, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of one row of the data, without the axis of rows."""
        raise NotImplementedError

    @classmethod
    def check(cls, task: Any, model: VitConfig) -> None:
        """Refuses parts of a config that are right by themselves and not together.

        Raises:
          UserError: they are not.
        """

    @property
    def module(self) -> Any:
        """The Linen module, whose ``encoder`` is the ViT."""
        raise NotImplementedError

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Self, PreparedPictures]:
        task, model, data_config = cls._built(config)
        data = cls.rows(data_config)
        return cls(task, model, data.label_names), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[Self, dict[str, jax.ShapeDtypeStruct]]:
        task, model, data_config = cls._built(config)
        # How many classes there are, only the data knows; it matters to nothing but the end of a small head.
        return cls(task, model, ("a", "b")), cls.abstract_row(data_config)

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> Self:
        task, model, _ = cls._built(config)
        return cls(task, model, saved_labels(run))

    @classmethod
    def _built(cls, config: Mapping[str, Any]) -> tuple[Any, VitConfig, Any]:
        task = build(cls.task_config, config["task"], "config.task")
        data_config = build(cls.data_config, config["data"], "config.data")
        model = build_image_model(config["model"], data_config, ("vit",))
        model = dataclasses.replace(model, drop_path=task.drop_path)
        cls.check(task, model)
        return task, model, data_config

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        return {"params": self.module.init(key, batch, deterministic=True)["params"], "state": {}}

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": params["encoder"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        return self.model.encoder().apply(variables, batch, deterministic=True, method="features")


def thumbnails(images: Float[Array, "batch height width channels"]) -> UInt8[Array, "batch high wide channels"]:
    """Few enough pixels to keep those of all held-out rows, which `predict` returns."""
    every = -(-images.shape[1] // THUMB)
    return jnp.round(unit(images[:, ::every, ::every]) * 255).astype(jnp.uint8)


def some(predictions: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The first rows of predictions."""
    return {name: column[:count] for name, column in predictions.items()}
