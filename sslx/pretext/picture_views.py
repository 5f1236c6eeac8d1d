"""Several random views of each picture, for any method of joint embedding.

In: uint8 pictures of a batch. Out: a list of batches for the encoder, one a view, whose rows are those of the batch.
Each view of each row has a key of its own, so that neither the mesh nor the views after it change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from sslx.augment.policy import AugmentConfig, Views, crop_views
from sslx.config import build
from sslx.data.images import ImageConfig, abstract_image_row, prepare_images
from sslx.data.prepared import PreparedPictures
from sslx.errors import UserError
from sslx.models.image import ImageModel, build_image_model
from sslx.models.teacher import undropped
from sslx.objective import Batch, row_keys
from sslx.picture_sheet import sheet

# SimCLR's (arXiv 2002.05709): strong colours, which else tell crops of one picture from those of another.
SIMCLR = AugmentConfig(
    crop_area=(0.08, 1.0), jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5
)
# BYOL's pair (arXiv 2006.07733), which Barlow Twins, VICReg, MoCo v3 and DINO took over.
BYOL = AugmentConfig(crop_area=(0.08, 1.0), jitter=0.8, saturation=0.2, grey=0.2, blur=1.0)
BYOL_SECOND = dataclasses.replace(BYOL, blur=0.1, solarise=0.2)


@dataclasses.dataclass(frozen=True)
class TwoViews:
    """``config.pretext.views`` of methods that compare two."""

    first: AugmentConfig = BYOL
    second: AugmentConfig = BYOL_SECOND

    def kinds(self, size: int) -> list[Views]:
        """What views there are to be of pictures of ``size`` pixels."""
        return [Views(1, size, self.first), Views(1, size, self.second)]


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """``config.pretext.views`` of methods that compare two large crops and some small ones (arXiv 2006.09882)."""

    first: AugmentConfig = dataclasses.field(default_factory=lambda: dataclasses.replace(BYOL, crop_area=(0.4, 1.0)))
    second: AugmentConfig = dataclasses.field(
        default_factory=lambda: dataclasses.replace(BYOL_SECOND, crop_area=(0.4, 1.0))
    )
    local: AugmentConfig = dataclasses.field(
        default_factory=lambda: dataclasses.replace(BYOL, crop_area=(0.05, 0.4), blur=0.5)
    )
    local_count: int = 8
    local_size: int = 96  # pixels

    def __post_init__(self):
        if self.local_count < 0 or self.local_size < 1:
            raise UserError(
                f"config.pretext.views has {self.local_count} local crops of {self.local_size} pixels; "
                "expected at least 0 of at least 1"
            )

    def kinds(self, size: int) -> list[Views]:
        """What views there are to be of pictures of ``size`` pixels; the large ones come first."""
        large = [Views(1, size, self.first), Views(1, size, self.second)]
        return large + ([Views(self.local_count, self.local_size, self.local)] if self.local_count else [])


@dataclasses.dataclass(frozen=True)
class PictureViews:
    """Pictures as a source of views (`ViewSource`)."""

    modality = "images"
    models = ("resnet", "vit", "convnext")
    fields = ("image",)
    varied = True

    model: ImageModel
    config: TwoViews | MultiCrop

    @classmethod
    def built(
        cls, config: Mapping[str, Any], views: Any, usual: TwoViews | MultiCrop, models: tuple[str, ...]
    ) -> tuple[PictureViews, ImageConfig]:
        views = usual if views is None else build(type(usual), views, "config.pretext.views")
        data = build(ImageConfig, config["data"], "config.data")
        model = build_image_model(config["model"], data, models)
        if data.crop == "host":
            raise UserError(
                "config.data.crop is 'host', where each row is cut once: all its views would be of the same part; "
                "expected step"
            )
        source = cls(model, views)
        for kind in source.kinds:
            try:
                dataclasses.replace(model, image_size=kind.size)
            except UserError as error:  # what the model needs of a size
                raise UserError(f"views of {kind.size} pixels do not fit the model: {error}") from None
        return source, data

    def prepare(
        self, data: ImageConfig, seed: int, tokenizer: str | None = None
    ) -> tuple[PictureViews, PreparedPictures]:
        return self, prepare_images(data, seed)

    def restored(self, run: Path) -> PictureViews:
        return self

    @staticmethod
    def abstract_row(data: ImageConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_image_row(data)

    def undropped(self) -> PictureViews:
        return dataclasses.replace(self, model=undropped(self.model))

    @property
    def kinds(self) -> list[Views]:
        """What views there are."""
        return self.config.kinds(self.model.image_size)

    @property
    def count(self) -> int:
        """How many views there are of a row."""
        return sum(kind.count for kind in self.kinds)

    def views(self, batch: Batch, key: PRNGKeyArray) -> list[Batch]:
        row_key, order_key = jax.random.split(key)
        made = crop_views(batch["image"], row_keys(row_key, batch["row"]), order_key, self.kinds)
        return [{"image": views[:, number]} for views in made for number in range(views.shape[1])]

    def encoder(self) -> nn.Module:
        return self.model.encoder()

    def features(self, encoder: nn.Module, view: Batch, *, deterministic: bool) -> Array:
        return encoder.features(view, deterministic=deterministic)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> list[float]:
        sized = [dataclasses.replace(self.model, image_size=kind.size).features_flops() for kind in self.kinds]
        return [each for each, kind in zip(sized, self.kinds, strict=True) for _ in range(kind.count)]

    def features_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        return self.model.features_flops()

    def encode(self, variables: Any, batch: Batch) -> Array:
        return self.model.encoder().apply(variables, batch, deterministic=True, method="features")

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, Any]) -> list[dict[str, str]]:
        shape = "x".join(map(str, batch["image"].shape[1:]))
        return [{"picture": f"{shape}, mean {image.mean():.0f} of 255"} for image in batch["image"]]

    def preview_pictures(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A sheet of all views of each row; those smaller than the others have paper around them."""
        views = {f"view {number + 1}": np.asarray(view["image"]) for number, view in enumerate(viewed["views"])}
        return {"views": sheet({"picture": batch["image"], **views})}
