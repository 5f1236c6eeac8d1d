"""Object detection: FCOS (arXiv 1904.01355) on the patches of a plain ViT (arXiv 2203.16527).

In: a picture a row, whole, with boxes and their classes. Views: perhaps mirrored; and what each location of the feature
maps is to say, since the weights of the loss follow from that. Out: three terms: focal loss of the classes (arXiv
1708.02002), GIoU loss of the boxes weighted by their centre-ness (arXiv 2006.09214), cross-entropy of the centre-ness.
Scores are COCO's mean average precision, on the host, after non-maximum suppression.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from sslx.augment.chance import chosen, mirrored, where_rows
from sslx.data.boxes import CROWD, OBJECT, BoxConfig, abstract_box_row, prepare_boxes
from sslx.data.prepared import PreparedPictures
from sslx.errors import UserError
from sslx.models import fcos
from sslx.models.boxes import giou, suppressed
from sslx.models.pixels import unit
from sslx.models.vit import VitConfig
from sslx.objective import Batch, Mean, Out, Report, Term, row_keys
from sslx.picture_sheet import sheet
from sslx.tasks.coco_scores import STATS, coco_scores, require_pycocotools
from sslx.tasks.dense import DRAWN, DenseTask, check_shares, some, thumbnails
from sslx.tasks.drawn_boxes import drawn_boxes, sheet_figure

TRACKED = ("map", "map50", "map75", "recall_100")  # of COCO's table, at every evaluation
SURE, BOXES = 0.3, 6  # a guess is drawn from this score on, and so many of a picture, the surest


@dataclasses.dataclass(frozen=True)
class ObjectDetectionConfig:
    """``config.task`` of ``name="object_detection"``."""

    name: str = "object_detection"
    scales: tuple[float, ...] = (2.0, 1.0, 0.5)  # of the feature maps, against the grid of patches, falling
    head_layers: int = 4  # convolutions in each tower
    head_width: int = 256
    centre_radius: float = 1.5  # strides around a box's middle in which a location is positive; 0: all of the box
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    flip: float = 0.5  # probability of mirroring left and right
    drop_path: float = 0.0  # of the encoder, whatever pretraining used
    candidates: int = 1000  # guesses of a picture before suppression
    least_score: float = 0.05  # of a guess
    suppression: float = 0.6  # IoU above which the less sure of two guesses at one class is dropped
    detections: int = 100  # guesses of a picture after suppression

    def __post_init__(self):
        for name in ("head_layers", "head_width", "candidates", "detections"):
            if getattr(self, name) < 1:
                raise UserError(f"config.task.{name} is {getattr(self, name)}; expected at least 1")
        check_shares(self, "focal_alpha", "flip", "least_score", "suppression")
        for name in ("centre_radius", "focal_gamma"):
            if not getattr(self, name) >= 0:
                raise UserError(f"config.task.{name} is {getattr(self, name)}; expected at least 0")
        falling = all(a > b for a, b in zip(self.scales, self.scales[1:], strict=False))
        if not self.scales or not set(self.scales) <= {4, 2, 1, 0.5} or not falling:
            raise UserError(f"config.task.scales is {self.scales}; expected some of 4, 2, 1 and 0.5, falling")


class Detector(nn.Module):
    """Encoder and head."""

    config: VitConfig
    head_config: fcos.FcosConfig

    def setup(self):
        self.encoder = self.config.encoder()
        self.head = fcos.Fcos(self.head_config, self.config)

    def __call__(self, batch: Batch, *, deterministic: bool) -> fcos.Found:
        x = self.encoder(batch, deterministic=deterministic)
        return self.head(x[:, self.config.front :])


@dataclasses.dataclass(frozen=True)
class ObjectDetection(DenseTask):
    """The objective of ``config.task.name = "object_detection"``."""

    task_config, data_config = ObjectDetectionConfig, BoxConfig
    unit = ""

    task: ObjectDetectionConfig

    @classmethod
    def rows(cls, config: BoxConfig) -> PreparedPictures:
        require_pycocotools()
        return prepare_boxes(config)

    @classmethod
    def abstract_row(cls, config: BoxConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_box_row(config)

    @classmethod
    def check(cls, task: ObjectDetectionConfig, model: VitConfig) -> None:
        if 0.5 in task.scales and model.grid % 2:
            raise UserError(f"config.task.scales has 0.5, and {model.grid} patches a side do not divide by 2")

    @property
    def head(self) -> fcos.FcosConfig:
        """The shape of what stands on the encoder."""
        task = self.task
        return fcos.FcosConfig(len(self.label_names), task.scales, task.head_layers, task.head_width)

    @property
    def module(self) -> Detector:
        """The Linen module."""
        return Detector(self.model, self.head)

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        images, boxes = unit(batch["image"]), batch["boxes"]
        if train and self.task.flip:
            which = chosen(row_keys(key, batch["row"]), self.task.flip)
            images = mirrored(images, which)
            left, top, right, bottom = (boxes[..., side] for side in range(4))
            turned = jnp.stack([images.shape[2] - right, top, images.shape[2] - left, bottom], axis=-1)
            boxes = where_rows(which, turned, boxes)
        targets = fcos.assigned(
            fcos.locations(self.model, self.task.scales),
            boxes,
            batch["classes"],
            batch["kind"] == OBJECT,
            batch["kind"] == CROWD,
            centre_radius=self.task.centre_radius,
        )
        positive = (targets.classes >= 0).astype(jnp.float32)
        weights = {
            # The sum over all locations is divided by the positive ones, and a picture without any counts as one.
            "class": jnp.maximum(jnp.sum(positive, axis=1), 1.0),
            "box": targets.centerness,
            "centerness": positive,
        }
        return batch | {"image": images, "boxes": boxes, "targets": targets, "weights": weights}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        found = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        targets, weights = batch["targets"], batch["weights"]
        # The weight of a row's classes is a count, so rows that only fill up a batch are told by `valid` alone.
        counted = targets.counted * batch.get("valid", jnp.ones(len(targets.counted)))[:, None]
        wanted = jax.nn.one_hot(targets.classes, len(self.label_names))
        focal = fcos.focal_loss(found.logits, wanted, alpha=self.task.focal_alpha, gamma=self.task.focal_gamma)
        agreement = giou(found.boxes, targets.boxes)
        middles = fcos.sigmoid_cross_entropy(found.centerness, targets.centerness)
        terms = {
            "class": Term(jnp.sum(counted[..., None] * focal)),
            "box": Term(jnp.sum(weights["box"] * (1.0 - agreement))),
            "centerness": Term(jnp.sum(weights["centerness"] * middles)),
        }
        return Out(terms, {"giou": Mean(jnp.sum(weights["box"] * agreement), jnp.sum(weights["box"]))})

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        forward = self.model.flops_per_image() + fcos.head_flops(self.head, self.model)
        return 3.0 * batch_shapes["image"][0] * forward

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        """The surest guesses of each row, before suppression, beside the truth."""
        found = self.module.apply({"params": params}, batch, deterministic=True)
        sure = jax.nn.sigmoid(found.logits) * jax.nn.sigmoid(found.centerness)[..., None]
        rows, classes = sure.shape[0], sure.shape[2]
        scores, which = jax.lax.top_k(sure.reshape(rows, -1), min(self.task.candidates, sure[0].size))
        boxes = jnp.take_along_axis(found.boxes, (which // classes)[..., None], axis=1)
        return {
            # Of the two factors the geometric mean, which is as sure as they are.
            "guess_scores": jnp.sqrt(scores),
            "guess_boxes": jnp.clip(boxes, 0.0, jnp.tile(batch["extent"], 2)[:, None]),
            "guess_classes": which % classes,
            "image": thumbnails(batch["image"]),
            **{name: batch[name] for name in ("boxes", "classes", "kind", "area", "scale")},
        }

    def guesses(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """By row, ``boxes`` in its pixels, ``classes`` and ``scores`` that are left after suppression, surest first."""
        found = []
        columns = (predictions[f"guess_{name}"] for name in ("boxes", "classes", "scores"))
        for boxes, classes, scores in zip(*columns, strict=True):
            kept = scores >= self.task.least_score
            boxes, classes, scores = boxes[kept], classes[kept], scores[kept]
            left = ~suppressed(boxes, scores, classes, threshold=self.task.suppression)
            (places,) = np.nonzero(left)
            places = places[np.argsort(-scores[places], kind="stable")][: self.task.detections]
            found.append({"boxes": boxes[places], "classes": classes[places], "scores": scores[places]})
        return found

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        scores, _ = self._scores(predictions)
        return {name: float(np.nan_to_num(scores[name])) for name in TRACKED}

    def _scores(self, predictions: Mapping[str, np.ndarray]) -> tuple[dict[str, float], list[float]]:
        """COCO's, in the pictures' own pixels."""
        truth = _truth(predictions)
        guesses = self.guesses(predictions)
        for row, scale in enumerate(predictions["scale"]):
            for of in (truth[row], guesses[row]):
                of["boxes"] = of["boxes"] / (scale or 1.0)  # 0 only where shapes alone are asked for
        return coco_scores(truth, guesses, len(self.label_names))

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for true, guess in zip(_truth(predictions), self.guesses(predictions), strict=True):
            sure = guess["classes"][guess["scores"] >= SURE]
            names = (", ".join(self.label_names[kind] for kind in sorted(of)) for of in (true["classes"], sure))
            rows.append(dict(zip(("objects", "guesses"), names, strict=True)))
        return rows

    def pictures(self, predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"detections": self._drawn(predictions)}

    def _drawn(self, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        guesses = self.guesses(predictions)
        for guess in guesses:
            sure = guess["scores"] >= SURE
            guess |= {name: column[sure][:BOXES] for name, column in guess.items()}
        return sheet(
            {
                "truth": self._boxes_on(predictions["image"], _truth(predictions)),
                "guess": self._boxes_on(predictions["image"], guesses),
            },
            across=3,
        )

    def _boxes_on(self, images: np.ndarray, rows: list[dict[str, np.ndarray]]) -> np.ndarray:
        size, names = self.model.image_size, self.label_names
        pairs = zip(images, rows, strict=True)
        return np.stack(
            [drawn_boxes(image, of["boxes"] / size, of["classes"], names, of.get("scores")) for image, of in pairs]
        )

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        positive = (viewed["targets"].classes >= 0).sum(axis=1)
        return [
            {"objects": ", ".join(self.label_names[kind] for kind in of["classes"]), "positive locations": str(count)}
            for of, count in zip(_truth(batch), positive, strict=True)
        ]

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        views = np.round(np.asarray(viewed["image"]) * 255).astype(np.uint8)
        return {"views": sheet({"view": self._boxes_on(views, _truth(viewed))}, across=4)}

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        scores, of_class = self._scores(predictions)
        by_class = dict(zip(self.label_names, of_class, strict=True))
        known = {name: scores[name] for name in STATS if not np.isnan(scores[name])}
        known_classes = {name: value for name, value in by_class.items() if not np.isnan(value)}
        wide = max(map(len, (*known, *by_class)))
        lines = [f"{name:<{wide}}  {value:.3f}" for name, value in (known | known_classes).items()]
        figure = sheet_figure(self._drawn(some(predictions, DRAWN)))
        values = {"coco": known, "map_of_class": known_classes}
        return Report("\n".join(lines), values, {"detections": figure})


def _truth(of: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """By row, the boxes that are some: ``boxes``, ``classes``, ``crowd`` and ``area``."""
    rows = []
    for boxes, classes, kind, area in zip(of["boxes"], of["classes"], of["kind"], of["area"], strict=True):
        here = (kind == OBJECT) | (kind == CROWD)
        rows.append({"boxes": boxes[here], "classes": classes[here], "crowd": kind[here] == CROWD, "area": area[here]})
    return rows
