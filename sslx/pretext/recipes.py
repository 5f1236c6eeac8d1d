"""What the experiments on pictures in ``configs/`` share, beside each method's own settings.

`small_job` runs for some minutes on two CPU cores. `imagenet` is the common part of recipes for ViTs on ImageNet-1k at
224 pixels, with crops that are cut on the host; it is for accelerators.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from sslx.augment.policy import AugmentConfig
from sslx.config import experiment
from sslx.data.images import ImageConfig
from sslx.models.vit import IMAGENET, SIZES, SMALL_PICTURES, VitConfig

IMAGENET_IMAGES = 1_281_167
GLYPH = AugmentConfig(crop_area=(0.6, 1.0), flip=0.0)  # a mirrored character is another one


def small_job(source: str, pretext: Any, *, batch_size: int) -> ml_collections.ConfigDict:
    """A ViT on small grey pictures."""
    config = experiment(
        data=ImageConfig(source, image_size=32, channels=1),
        model=VitConfig(**SMALL_PICTURES, positions="sincos", init="xavier", pool="mean", image_size=32, channels=1),
        pretext=pretext,
    )
    config.steps = 1000
    config.batch_size = batch_size
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 500
    config.eval.examples = 16
    config.checkpoint.every_steps = 500
    return config


def imagenet(
    source: str,
    pretext: Any,
    *,
    size: str = "base",
    batch_size: int = 1024,
    epochs: int = 100,
    warmup_epochs: int = 10,
    learning_rate: float = 5e-4,
    data: dict[str, Any] | None = None,
    **model: Any,
) -> ml_collections.ConfigDict:
    """A ViT of a published size; ``data`` and ``model`` are what differs in these parts."""
    config = experiment(
        data=ImageConfig(source, image_size=224, crop="host", **(data or {})),
        model=VitConfig(**SIZES[size], **IMAGENET, dtype="bfloat16", **model),
        pretext=pretext,
    )
    config.batch_size = batch_size
    config.steps = epochs * IMAGENET_IMAGES // batch_size
    config.optimizer.learning_rate = learning_rate
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = warmup_epochs * IMAGENET_IMAGES // batch_size
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 5000
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 50
    return config
