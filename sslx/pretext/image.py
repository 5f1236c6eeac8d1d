"""What pretext tasks on images have in common: from a written config to the objective, with its data or without.

A task on images derives from `ImagePretext`, names its part of the config and says what it makes of its views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sslx.augment.policy import NONE, AugmentConfig, augment
from sslx.config import build
from sslx.data.images import ImageConfig, ImageRows, abstract_image_row, prepare_images
from sslx.data.prepared import PreparedPictures
from sslx.models.image import IMAGE_MODELS, ImageModel, build_image_model
from sslx.models.losses import softmax_cross_entropy
from sslx.models.pixels import unit
from sslx.models.statistics import apply_with_statistics, encoder_variables, with_statistics
from sslx.objective import Batch, Mean, Objective, Out, Term, Variables, row_keys

STATISTICS_FROM = 256  # held-out pictures that a chance value is computed from


def some_pictures(rows: ImageRows, count: int) -> UInt8[np.ndarray, "some height width channels"]:
    """At most so many pictures, from all over the rows: the first ones of a folder are all of one class."""
    return rows.fetch(np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.int64))["image"]


@dataclasses.dataclass(frozen=True)
class ImagePretext(Objective):
    """A pretext task on pictures; ``pretext`` is its part of the config, of the class ``pretext_config``."""

    pretext_config: ClassVar[type]
    models: ClassVar[tuple[str, ...]] = ("vit",)  # that it can train
    modality = "images"

    pretext: Any
    model: ImageModel
    cropped: bool  # random crops have been cut on the host

    @classmethod
    def check(cls, pretext: Any, model: Any, config: Mapping[str, Any]) -> None:
        """Refuses parts of a config that are right by themselves and not together.

        Raises:
          UserError: they are not.
        """

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Self, PreparedPictures]:
        objective, data_config = cls._built(config)
        return objective, prepare_images(data_config, config["seed"])

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[Self, dict[str, jax.ShapeDtypeStruct]]:
        objective, data_config = cls._built(config)
        return objective, abstract_image_row(data_config)

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> Self:
        return cls._built(config)[0]

    @classmethod
    def _built(cls, config: Mapping[str, Any]) -> tuple[Self, ImageConfig]:
        pretext = build(cls.pretext_config, config["pretext"], "config.pretext")
        data_config = build(ImageConfig, config["data"], "config.data")
        model = build_image_model(config["model"], data_config, cls.models)
        cls.check(pretext, model, config)
        return cls(pretext, model, data_config.crop == "host"), data_config

    def view(self, batch: Batch, key: PRNGKeyArray, config: AugmentConfig, *, train: bool) -> Float[Array, "..."]:
        """One random view of each picture, float32[batch, size, size, channels] in [0, 1]; the picture in evaluation.

        What is cut on the host is not cut again.
        """
        if not train:
            return unit(batch["image"])
        if self.cropped:
            config = dataclasses.replace(config, crop_area=NONE.crop_area)
        row_key, order_key = jax.random.split(key)
        return augment(batch["image"], row_keys(row_key, batch["row"]), order_key, config)

    def whole_encoder(self, key: PRNGKeyArray, batch: Batch) -> dict[str, Any]:
        """Fresh parameters of the encoder with all that features need, even what pretraining leaves as it is."""
        encoder = self.model.encoder()
        return {"encoder": encoder.init(key, batch, deterministic=True, method="features")["params"]}

    @property
    def scope(self) -> str:
        """Batch normalisation compares all rows of a batch."""
        return "batch" if self.model.batch_norm else "row"

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return encoder_variables(params, state)

    def parts(self, params: Any, state: Any) -> dict[str, Any]:
        """The encoder; decoders and heads belong to the question that it was trained with."""
        return {"encoder": self.encoder(params, state)["params"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        return self.model.encoder().apply(variables, batch, deterministic=True, method="features")

    def features_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        return self.model.features_flops()

    def variant(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        return batch | {"image": self.view(batch, key, self.pretext.augment, train=True)}

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        shape = "x".join(map(str, batch["image"].shape[1:]))
        return [{"picture": f"{shape}, mean {image.mean():.0f} of 255"} for image in batch["image"]]


@dataclasses.dataclass(frozen=True)
class ContextTask(ImagePretext):
    """A question about the parts of a picture: ``pieces`` go through the encoder, a head on them names the answer."""

    models = IMAGE_MODELS
    encoded: ClassVar[int]  # how many images the encoder sees of each row

    @property
    def module(self) -> Any:
        """The Linen module: from ``batch["pieces"]`` to logits ``[batch, questions, classes]``."""
        raise NotImplementedError

    def pieces(
        self, images: Float[Array, "batch height width channels"], keys: PRNGKeyArray
    ) -> tuple[Float[Array, "batch pieces height width channels"], Int[Array, "batch questions"]]:
        """What the encoder sees of each row, and the right answers."""
        raise NotImplementedError

    def head_flops(self, rows: int) -> float:
        """Forward FLOPs of what stands on the features."""
        raise NotImplementedError

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        viewed = self.views(batch, key, jnp.zeros((), jnp.int32), train=False)
        variables = dict(self.module.init(key, viewed, deterministic=True))
        return {"params": variables.pop("params"), "state": variables}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        view_key, piece_key = jax.random.split(key)
        images = self.view(batch, view_key, self.pretext.augment, train=train)
        pieces, answer = self.pieces(images, row_keys(piece_key, batch["row"]))
        weights = {self.pretext.name: jnp.ones(answer.shape, jnp.float32)}
        rest = {name: value for name, value in batch.items() if name != "image"}  # which no one looks at again
        return rest | {"pieces": pieces, "answer": answer, "weights": weights}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        logits, stats = apply_with_statistics(self.module, params, state, batch, key, train=train)
        weights = batch["weights"][self.pretext.name]
        term = Term(jnp.sum(weights * softmax_cross_entropy(logits, batch["answer"])))
        hits = (jnp.argmax(logits, axis=-1) == batch["answer"]).astype(jnp.float32)
        return Out({self.pretext.name: term}, {"accuracy": Mean(jnp.sum(weights * hits), jnp.sum(weights))}, stats)

    def after_update(self, params: Any, state: Any, stats: dict, key: PRNGKeyArray, step: Array) -> Any:
        return with_statistics(state, stats)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows = batch_shapes["image"][0]
        return 3.0 * (rows * self.encoded * self.model.features_flops() + self.head_flops(rows))
