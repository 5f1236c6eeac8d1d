"""What the experiments on pictures in ``configs/`` share, beside each method's own settings.

`small_job` and `joint_job` run for some minutes on two CPU cores. `cifar10` is solo-learn's frame for joint embedding,
`imagenet` the common part of recipes for ViTs on ImageNet-1k at 224 pixels with crops that are cut on the host,
`imagenet_vit` and `imagenet_resnet` those of joint embedding, whose crops are cut in the step from pictures of 224
pixels, where the papers cut them from the originals; these are for accelerators. `sized` chooses among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from sslx.augment.policy import AugmentConfig
from sslx.config import experiment, parse_argument
from sslx.data.images import ImageConfig
from sslx.errors import UserError, choose
from sslx.models.resnet import ResnetConfig
from sslx.models.vit import IMAGENET, SIZES, SMALL_PICTURES, VitConfig

# In updates, of which there are more where batches are smaller.
COUNTED = {"steps", "every_steps", "warmup_steps", "frozen_steps", "teacher_temperature_steps", "queue_start"}
CIFAR_IMAGES, IMAGENET_IMAGES = 50_000, 1_281_167
CIFAR_PIXELS = dict(pixel_mean=(0.4914, 0.4822, 0.4465), pixel_std=(0.247, 0.2435, 0.2616))
GLYPH = AugmentConfig(crop_area=(0.6, 1.0), flip=0.0)  # a mirrored character is another one
# For joint embedding, which needs views that differ more; smaller parts of a character than these are anyone's.
GLYPH_VIEW = AugmentConfig(crop_area=(0.4, 1.0), flip=0.0, jitter=0.8, saturation=0.0, hue=0.0)
# solo-learn's "symmetric" and "asymmetric" augmentations for CIFAR-10.
SYMMETRIC = AugmentConfig(
    crop_area=(0.08, 1.0), jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5
)
ASYMMETRIC = AugmentConfig(crop_area=(0.08, 1.0), jitter=0.8, saturation=0.2, grey=0.2)
ASYMMETRIC_SECOND = dataclasses.replace(ASYMMETRIC, solarise=0.2)

# What joint embedding trains on a CPU: within a few hundred steps it learns more than a ViT does.
SMALL_RESNET = ResnetConfig(depth=10, width=16, stem="cifar", image_size=32, channels=1)
SMALL_VIT = VitConfig(**SMALL_PICTURES, positions="sincos", init="xavier", pool="mean", image_size=32, channels=1)


def sized(
    argument: str, file: str, jobs: Mapping[str, Callable[[], ml_collections.ConfigDict]]
) -> ml_collections.ConfigDict:
    """What a config's argument ``[SIZE][,data=SOURCE][,batch=ROWS]`` names; ``jobs`` are its sizes, ``default`` first.

    Raises:
      UserError: another size, or no number of rows.
    """
    arguments = parse_argument(argument, "size", size="default", data="", batch="")
    config = jobs[choose(arguments["size"], jobs, f"size of {file}")]()
    config.data.source = arguments["data"] or config.data.source
    return rebatched(config, arguments["batch"])


def small_job(source: str, pretext: Any, *, batch_size: int) -> ml_collections.ConfigDict:
    """A ViT on small grey pictures."""
    config = experiment(
        data=ImageConfig(source, image_size=32, channels=1),
        model=SMALL_VIT,
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


def joint_job(
    pretext: Any, model: Any = SMALL_RESNET, *, steps: int = 500, batch_size: int = 64
) -> ml_collections.ConfigDict:
    """Joint embedding on glyphs, in batches that a CPU gets through often enough."""
    config = experiment(data=ImageConfig("glyphs", image_size=32, channels=1), model=model, pretext=pretext)
    config.steps = steps
    config.batch_size = batch_size
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 15  # below the steps of a short trial
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = config.checkpoint.every_steps = steps // 5  # often enough for alarms
    config.eval.batches = 8
    config.eval.examples = 0
    return config


def cifar10(
    pretext: Any, learning_rate: float, weight_decay: float, optimizer: str = "lars"
) -> ml_collections.ConfigDict:
    """ResNet-18 with the stem for small pictures, 1,000 epochs of batches of 256."""
    rows, per_epoch = 256, CIFAR_IMAGES // 256
    config = experiment(
        data=ImageConfig("tfds:cifar10", image_size=32, eval_split="test"),
        model=ResnetConfig(depth=18, stem="cifar", image_size=32, **CIFAR_PIXELS),
        pretext=pretext,
    )
    config.batch_size = rows
    config.steps = 1000 * per_epoch
    config.optimizer.name = optimizer
    config.optimizer.learning_rate = learning_rate
    config.optimizer.weight_decay = weight_decay
    config.optimizer.momentum = 0.9
    config.optimizer.trust = 0.02
    config.optimizer.trust_clip = True
    config.optimizer.clip_norm = None
    config.optimizer.warmup_steps = 10 * per_epoch
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 20 * per_epoch
    config.eval.examples = 0
    config.checkpoint.every_steps = 5 * per_epoch
    config.online.probe = True
    config.log.every_steps = 50
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


def imagenet_resnet(
    pretext: Any, *, batch_size: int, epochs: int, learning_rate: float, weight_decay: float
) -> ml_collections.ConfigDict:
    """ResNet-50 with LARS."""
    model = ResnetConfig(depth=50, image_size=224, dtype="bfloat16", **IMAGENET)
    config = _imagenet_joint(pretext, model, batch_size=batch_size, epochs=epochs, warmup_epochs=10)
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.weight_decay = weight_decay
    config.optimizer.momentum = 0.9
    config.optimizer.clip_norm = None
    return config


def imagenet_vit(
    pretext: Any,
    model: Any,
    *,
    batch_size: int,
    epochs: int,
    warmup_epochs: int,
    learning_rate: float,
    clip_norm: float | None,
) -> ml_collections.ConfigDict:
    """A ViT with AdamW, whose weight decay rises from 0.04 to 0.4."""
    config = _imagenet_joint(pretext, model, batch_size=batch_size, epochs=epochs, warmup_epochs=warmup_epochs)
    config.optimizer.learning_rate = learning_rate
    config.optimizer.weight_decay = 0.04
    config.optimizer.weight_decay_end = 0.4
    config.optimizer.clip_norm = clip_norm
    return config


def _imagenet_joint(
    pretext: Any, model: Any, *, batch_size: int, epochs: int, warmup_epochs: int
) -> ml_collections.ConfigDict:
    config = experiment(data=ImageConfig("tfds:imagenet2012", image_size=224), model=model, pretext=pretext)
    per_epoch = IMAGENET_IMAGES // batch_size
    config.batch_size = batch_size
    config.steps = epochs * per_epoch
    config.optimizer.warmup_steps = warmup_epochs * per_epoch
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 5 * per_epoch
    config.eval.examples = 0
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 50
    return config


def rebatched(config: ml_collections.ConfigDict, batch: str) -> ml_collections.ConfigDict:
    """A recipe in batches of another size ("": its own), over as many pictures.

    The learning rate goes with the square root of the size, as suits small batches (SimCLR's appendix B.1), and what is
    averaged over updates keeps its memory in pictures: a momentum m becomes m to the power of the ratio (arXiv
    2307.13813).
    """
    if not batch:
        return config
    if not batch.isdecimal() or int(batch) < 1:
        raise UserError(f"the config's argument batch is {batch!r}; expected a number of rows")
    ratio, pretext = int(batch) / config.batch_size, config.pretext
    config.batch_size = int(batch)
    config.optimizer.learning_rate *= ratio**0.5
    for part in (config, config.eval, config.checkpoint, config.optimizer, pretext, pretext.get("momentum", {})):
        for name in set(part) & COUNTED:
            if part[name]:
                part[name] = max(1, round(part[name] / ratio))
    for part, name in ((pretext, "centre_momentum"), *((pretext.get("momentum", {}), end) for end in ("start", "end"))):
        if name in part:
            part[name] = part[name] ** ratio
    return config
