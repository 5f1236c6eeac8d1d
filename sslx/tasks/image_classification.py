"""Image classification: a pretrained encoder's features and a linear head.

In: one picture a row with an int label. Views: a random crop and what else the config says; mixup or cutmix make a
row's target shares of two classes. Out: one cross-entropy term. With ``probe``, the encoder stays as it is, running
averages too, and its features are normalised by the batch without scale and bias before the head, as in MAE's linear
probe (arXiv 2111.06377).

With ``ema``, an exponential moving average of the parameters, and of the running averages of batch normalisation that
belong to them, is what is evaluated, exported and started from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.augment.mixing import cutmix, mixup
from sslx.augment.policy import NONE, AugmentConfig, augment
from sslx.config import build
from sslx.data.images import ImageConfig, abstract_image_row, prepare_labelled_images
from sslx.data.labels import saved_labels
from sslx.data.prepared import PreparedPictures
from sslx.errors import UserError
from sslx.models.image import ImageModel, build_image_model
from sslx.models.layers import Dense, Dropout
from sslx.models.pixels import unit
from sslx.models.statistics import NAME as STATISTICS
from sslx.models.statistics import apply_with_statistics, encoder_variables, with_statistics
from sslx.models.teacher import followed
from sslx.objective import Batch, Mean, Objective, Out, Report, Term, Variables, row_keys
from sslx.picture_sheet import sheet
from sslx.tasks.class_report import class_report, class_scores

PROBE_EPS = 1e-6  # beside the variance of frozen features


@dataclasses.dataclass(frozen=True)
class ImageClassificationConfig:
    """``config.task`` of ``name="image_classification"``."""

    name: str = "image_classification"
    probe: bool = False  # train the head alone, on features that the batch normalises
    dropout: float = 0.0  # before the head
    drop_path: float = 0.0  # of the encoder, whatever pretraining used
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution; 0: none
    cutmix: float = 0.0  # the same; with both, each row takes one of them
    ema: float = 0.0  # momentum of the parameters' moving average; 0: none
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        for name in ("dropout", "drop_path", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config.task.{name} is {getattr(self, name)}; expected 0 or a share below 1")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"config.task.{name} is {getattr(self, name)}; expected at least 0")


class ImageClassifier(nn.Module):
    """Encoder, dropout, linear head; of a probe, features without gradient, normalised by the batch."""

    config: ImageModel
    classes: int
    dropout: float
    probe: bool

    def setup(self):
        self.encoder = self.config.encoder()
        self.drop = Dropout(self.dropout)
        self.head = Dense(self.classes, ("embed", "types"))
        if self.probe:
            # Not by the difference of large squares: frozen features may have means far above their deviations.
            self.norm = nn.BatchNorm(
                momentum=0.9, epsilon=PROBE_EPS, use_scale=False, use_bias=False, use_fast_variance=False
            )

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch classes"]:
        x = self.encoder.features(batch, deterministic=deterministic or self.probe)
        if self.probe:
            x = self.norm(jax.lax.stop_gradient(x), use_running_average=deterministic)
        return self.head(self.drop(x, deterministic=deterministic)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ImageClassification(Objective):
    """The objective of ``config.task.name = "image_classification"``."""

    task: ImageClassificationConfig
    model: ImageModel
    label_names: tuple[str, ...]
    cropped: bool  # random crops have been cut on the host

    task_config: ClassVar[type] = ImageClassificationConfig
    scored = True
    modality = "images"

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Self, PreparedPictures]:
        """Builds objective and data from the written config.

        Raises:
          UserError: anything in its parts that cannot be, or data without labels.
        """
        task, model, data_config = cls._built(config)
        data = prepare_labelled_images(data_config, config["seed"])
        return cls(task, model, data.label_names, data_config.crop == "host"), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[Self, dict[str, jax.ShapeDtypeStruct]]:
        task, model, data_config = cls._built(config)
        # How many classes there are, only the data knows; it matters to nothing but a small head.
        return cls(task, model, ("a", "b"), False), abstract_image_row(data_config, labelled=True)

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> Self:
        task, model, data_config = cls._built(config)
        return cls(task, model, saved_labels(run), data_config.crop == "host")

    @classmethod
    def _built(cls, config: Mapping[str, Any]) -> tuple[ImageClassificationConfig, ImageModel, ImageConfig]:
        task = build(cls.task_config, config["task"], "config.task")
        data_config = build(ImageConfig, config["data"], "config.data")
        model = build_image_model(config["model"], data_config)
        if task.probe and not config["optimizer"]["freeze"]:
            raise UserError(
                "config.task.probe leaves the encoder as it is, and weight decay would not; expected "
                "config.optimizer.freeze=('^encoder/',)"
            )
        if not hasattr(model, "drop_path"):
            if task.drop_path:
                raise UserError(f"config.task.drop_path is {task.drop_path}, and a {model.name} has none; expected 0")
            return task, model, data_config
        return task, dataclasses.replace(model, drop_path=task.drop_path), data_config

    @property
    def module(self) -> ImageClassifier:
        """The Linen module."""
        return ImageClassifier(self.model, len(self.label_names), self.task.dropout, self.task.probe)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        state = dict(self.module.init(key, batch, deterministic=True))
        params = state.pop("params")
        if self.task.ema:
            # A copy: the step donates both, and one buffer cannot be given twice.
            state["ema"] = jax.tree.map(jnp.copy, {"params": params, **state})
        return {"params": params, "state": state}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        weights = {"classification": jnp.ones(batch["image"].shape[0], jnp.float32)}
        targets = jax.nn.one_hot(batch["label"], len(self.label_names))
        if not train:
            return batch | {"image": unit(batch["image"]), "targets": targets, "weights": weights}
        row_key, order_key, mix_key = jax.random.split(key, 3)
        config = self.task.augment
        if self.cropped:
            config = dataclasses.replace(config, crop_area=NONE.crop_area)
        images = augment(batch["image"], row_keys(row_key, batch["row"]), order_key, config)
        images, targets = self._mixed(images, targets, row_keys(mix_key, batch["row"]))
        smoothing = self.task.label_smoothing
        targets = (1 - smoothing) * targets + smoothing / len(self.label_names)
        return batch | {"image": images, "targets": targets, "weights": weights}

    def _mixed(self, images: Array, targets: Array, keys: PRNGKeyArray) -> tuple[Array, Array]:
        choose_keys, mix_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        if self.task.mixup and self.task.cutmix:
            which = jax.vmap(jax.random.bernoulli)(choose_keys)
            blended, pasted = (
                mix(images, targets, mix_keys, alpha)
                for mix, alpha in ((mixup, self.task.mixup), (cutmix, self.task.cutmix))
            )
            return (
                jnp.where(which[:, None, None, None], blended[0], pasted[0]),
                jnp.where(which[:, None], blended[1], pasted[1]),
            )
        if self.task.mixup:
            return mixup(images, targets, mix_keys, self.task.mixup)
        if self.task.cutmix:
            return cutmix(images, targets, mix_keys, self.task.cutmix)
        return images, targets

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        params, state = (params, state) if train else self._evaluated(params, state)
        logits, stats = apply_with_statistics(self.module, params, state, batch, key, train=train)
        return self.classified(logits, batch).replace(stats=stats)

    def classified(self, logits: Float[Array, "batch classes"], batch: Batch) -> Out:
        """The term and the accuracy of what has been said of rows."""
        weights = batch["weights"]["classification"]
        losses = -jnp.sum(batch["targets"] * jax.nn.log_softmax(logits), axis=-1)
        hits = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        return Out(
            {"classification": Term(jnp.sum(weights * losses))},
            {"accuracy": Mean(jnp.sum(weights * hits), jnp.sum(weights))},
        )

    def after_update(self, params: Any, state: Any, stats: dict, key: PRNGKeyArray, step: Array) -> Any:
        """Moves the average; the first update copies the parameters, which may have been started from elsewhere."""
        state = with_statistics(state, stats)
        if not self.task.ema:
            return state
        now = {"params": params, **{name: tree for name, tree in state.items() if name != "ema"}}
        return {**state, "ema": followed(state["ema"], now, self.task.ema, step)}

    @property
    def scope(self) -> str:
        """Batch normalisation compares all rows of a batch."""
        return "batch" if self.model.batch_norm or self.task.probe else "row"

    @staticmethod
    def _evaluated(params: Any, state: Any) -> tuple[Any, Any]:
        """Parameters and state that are evaluated: the moving averages, if they are kept."""
        averages = dict(state.get("ema", {"params": params, **state}))
        return averages.pop("params"), averages

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return encoder_variables(*cls._evaluated(params, state))

    def parts(self, params: Any, state: Any) -> dict[str, Any]:
        """The averages where they are kept; how a probe normalises features goes into its head, one linear layer."""
        params, state = self._evaluated(params, state)
        head = params["head"]
        if self.task.probe:
            mean, variance = (np.float64(state[STATISTICS]["norm"][name]) for name in ("mean", "var"))
            kernel = np.float64(head["kernel"]) / np.sqrt(variance + PROBE_EPS)[:, None]
            head = {"kernel": np.float32(kernel), "bias": np.float32(head["bias"] - mean @ kernel)}
        return {"encoder": params["encoder"], "head": head}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        return self.model.encoder().apply(variables, batch, deterministic=True, method="features")

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch classes"]:
        key = jax.random.key(0)  # of a dropout that is not there
        return apply_with_statistics(self.module, *self._evaluated(params, state), batch, key, train=False)[0]

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        head = 3.0 * 2 * self.model.features_width * len(self.label_names)
        return batch_shapes["image"][0] * ((1.0 if self.task.probe else 3.0) * self.model.features_flops() + head)

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """The entropy of the held-out labels: the loss of a model that knows only how common each class is."""
        return statistics.get("eval_label_entropy")

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        # Not the pictures: those of all held-out rows are kept until the end.
        return {"logits": self.logits(params, state, batch), "label": batch["label"]}

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        return class_scores(predictions["label"], np.argmax(predictions["logits"], axis=-1))

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return [
            {"label": self.label_names[label], "guess": self.label_names[int(np.argmax(logits))]}
            for label, logits in zip(predictions["label"], predictions["logits"], strict=True)
        ]

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return [{"label": self.label_names[label]} for label in batch["label"]]

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return {"views": sheet({"picture": batch["image"], "view": viewed["image"]})}

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        return class_report(predictions["label"], np.argmax(predictions["logits"], axis=-1), self.label_names)
