"""Semantic segmentation: a class for each pixel from a linear head on the patches of a plain ViT.

In: a picture a row, whole, with the number of a class for each pixel. Views: perhaps mirrored. Out: one cross-entropy
term over the pixels that are asked for; the patches' logits are enlarged bilinearly, as a linear head's are in the
measuring of features (arXiv 2304.07193). Scored by the mean over classes of intersection over union (mIoU), of all
pixels together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.augment.chance import chosen, mirrored
from sslx.data.masks import IGNORED, MaskConfig, abstract_mask_row, prepare_masks
from sslx.data.prepared import PreparedPictures
from sslx.errors import UserError
from sslx.models.layers import Dense, Dropout
from sslx.models.losses import softmax_cross_entropy
from sslx.models.pixels import unit
from sslx.models.vit import VitConfig
from sslx.objective import Batch, Mean, Out, Report, Term, row_keys
from sslx.picture_sheet import sheet
from sslx.tasks.dense import DRAWN, DenseTask, check_shares, some, thumbnails
from sslx.tasks.drawn_boxes import colour_of, sheet_figure

PALETTE = np.array([(0, 0, 0), *(colour_of(number) for number in range(254)), (200, 200, 200)], np.uint8)


@dataclasses.dataclass(frozen=True)
class SegmentationConfig:
    """``config.task`` of ``name="segmentation"``."""

    name: str = "segmentation"
    dropout: float = 0.0  # before the head
    drop_path: float = 0.0  # of the encoder, whatever pretraining used
    flip: float = 0.5  # probability of mirroring left and right

    def __post_init__(self):
        check_shares(self, "flip")
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.task.dropout is {self.dropout}; expected 0 or a share below 1")


class Segmenter(nn.Module):
    """Encoder, dropout, linear head, bilinear enlargement."""

    config: VitConfig
    classes: int
    dropout: float

    def setup(self):
        self.encoder = self.config.encoder()
        self.drop = Dropout(self.dropout)
        self.head = Dense(self.classes, ("embed", "types"))

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch height width classes"]:
        config = self.config
        x = self.encoder(batch, deterministic=deterministic)[:, config.front :]
        logits = self.head(self.drop(x, deterministic=deterministic)).astype(jnp.float32)
        logits = logits.reshape(len(logits), config.grid, config.grid, self.classes)
        shape = (len(logits), config.image_size, config.image_size, self.classes)
        return jax.image.resize(logits, shape, "bilinear")


@dataclasses.dataclass(frozen=True)
class Segmentation(DenseTask):
    """The objective of ``config.task.name = "segmentation"``."""

    task_config, data_config = SegmentationConfig, MaskConfig

    task: SegmentationConfig

    @classmethod
    def rows(cls, config: MaskConfig) -> PreparedPictures:
        return prepare_masks(config)

    @classmethod
    def abstract_row(cls, config: MaskConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_mask_row(config)

    @property
    def module(self) -> Segmenter:
        """The Linen module."""
        return Segmenter(self.model, len(self.label_names), self.task.dropout)

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        images, masks = unit(batch["image"]), batch["mask"]
        if train and self.task.flip:
            which = chosen(row_keys(key, batch["row"]), self.task.flip)
            images, masks = mirrored(images, which), mirrored(masks, which)
        weights = {"segmentation": (masks != IGNORED).astype(jnp.float32)}
        return batch | {"image": images, "mask": masks, "weights": weights}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        logits = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        weights, wanted = batch["weights"]["segmentation"], _wanted(batch["mask"])
        term = Term(jnp.sum(weights * softmax_cross_entropy(logits, wanted)))
        hits = (jnp.argmax(logits, axis=-1) == wanted).astype(jnp.float32)
        return Out({"segmentation": term}, {"pixel_accuracy": Mean(jnp.sum(weights * hits), jnp.sum(weights))})

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        head = 2.0 * self.model.patches * self.model.width * len(self.label_names)
        return 3.0 * batch_shapes["image"][0] * (self.model.flops_per_image() + head)

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """The entropy of the held-out pixels: the loss of a model that knows only how common each class is."""
        return statistics.get("eval_pixel_entropy")

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        """How often each class is taken for each in a row, and pictures to look at."""
        guess = jnp.argmax(self.module.apply({"params": params}, batch, deterministic=True), axis=-1)
        asked = batch["mask"] != IGNORED
        every = -(-guess.shape[1] // thumbnails(batch["image"]).shape[1])
        return {
            "confusion": confusion(_wanted(batch["mask"]), guess, asked, len(self.label_names)),
            "image": thumbnails(batch["image"]),
            "mask": batch["mask"][:, ::every, ::every],
            "guess": guess[:, ::every, ::every].astype(jnp.uint8),
        }

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        of_class = intersection_over_union(predictions["confusion"].sum(axis=0))
        return {"miou": float(np.nanmean(of_class)) if np.isfinite(of_class).any() else 0.0}

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for counts in predictions["confusion"]:
            there, said = ((of > 0) for of in (counts.sum(axis=1), counts.sum(axis=0)))
            names = (", ".join(np.array(self.label_names)[of]) for of in (there, said))
            rows.append(dict(zip(("classes", "guesses"), names, strict=True)))
        return rows

    def pictures(self, predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"segments": self._drawn(predictions)}

    def _drawn(self, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        image, mask = predictions["image"], predictions["mask"]
        guess = np.where(mask == IGNORED, IGNORED, predictions["guess"])
        columns = {"picture": image, "truth": coloured(mask), "guess": coloured(guess)}
        return sheet(columns, across=3, key=self._key(mask, guess))

    def _key(self, *masks: np.ndarray) -> dict[str, tuple[int, int, int]]:
        """The colour of everything in masks, by its name."""
        numbers = np.unique(np.concatenate([mask.ravel() for mask in masks])).tolist()
        names = {number: name for number, name in enumerate(self.label_names)} | {IGNORED: "not asked for"}
        return {names[number]: tuple(PALETTE[number].tolist()) for number in numbers}

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        found = ([number for number in np.unique(mask) if number != IGNORED] for mask in batch["mask"])
        return [{"classes": ", ".join(self.label_names[number] for number in numbers)} for numbers in found]

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        mask = np.asarray(viewed["mask"])
        return {"views": sheet({"view": viewed["image"], "mask": coloured(mask)}, across=2, key=self._key(mask))}

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        counts = predictions["confusion"].sum(axis=0)
        of_class = dict(zip(self.label_names, intersection_over_union(counts).tolist(), strict=True))
        known = {name: value for name, value in of_class.items() if np.isfinite(value)}
        wide = max(map(len, known), default=0)
        text = "\n".join(f"{name:<{wide}}  IoU {value:.3f}" for name, value in known.items())
        figure = sheet_figure(self._drawn(some(predictions, DRAWN)))
        return Report(text, {"iou_of_class": known, "confusion_matrix": counts.tolist()}, {"segments": figure})


def confusion(wanted: Array, guess: Array, asked: Array, classes: int) -> Array:
    """int32[batch, classes, classes]: pixels of each class (first) that are taken for each (second)."""
    pair = jnp.where(asked, wanted * classes + guess, classes**2)
    count = lambda pairs: jnp.zeros(classes**2 + 1, jnp.int32).at[pairs].add(1)  # noqa: E731
    return jax.vmap(count)(pair.reshape(len(pair), -1))[:, :-1].reshape(-1, classes, classes)


def intersection_over_union(counts: np.ndarray) -> np.ndarray:
    """Of each class, from ``counts[true, guessed]`` of all pixels; NaN for one that is neither there nor guessed."""
    counts = counts.astype(np.float64)
    union = counts.sum(axis=0) + counts.sum(axis=1) - np.diag(counts)
    return np.divide(np.diag(counts), union, out=np.full(len(counts), np.nan), where=union > 0)


def coloured(masks: np.ndarray) -> np.ndarray:
    """Masks as pictures: class 0 black, pixels that are not asked for grey, the others in the colours of boxes."""
    return PALETTE[masks]


def _wanted(mask: Array) -> Array:
    """Numbers of classes; 0 where none is asked for, which its weight makes nothing of."""
    return jnp.where(mask == IGNORED, 0, mask).astype(jnp.int32)
