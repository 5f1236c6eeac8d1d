"""Rotation (RotNet, arXiv 1803.07728): by how many quarters has the picture been turned?

Command:   python -m sslx.main --config=configs/rotation.py
Argument:  [SIZE][,data=SOURCE], for example configs/rotation.py:base,data=tfds:imagenet2012
Default:   a small real job on glyphs, characters of matplotlib's fonts, with the encoder of configs/vit_mae.py.
Sizes:     base is a ViT-B at 224 pixels for 100 epochs of ImageNet-1k (tfds:imagenet2012); the paper has an AlexNet.
"""

import ml_collections

from sslx.augment.policy import AugmentConfig
from sslx.config import experiment, parse_argument
from sslx.data.images import ImageConfig
from sslx.errors import choose
from sslx.models.vit import IMAGENET, SIZES, SMALL_PICTURES, VitConfig
from sslx.pretext.rotation import RotationConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="")
    size = choose(arguments["size"], ("default", "base"), "size of configs/rotation.py")
    if size == "default":
        return small_job(arguments["data"] or "glyphs")
    return published(size, arguments["data"] or "tfds:imagenet2012")


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    config = experiment(
        data=ImageConfig(source, image_size=32, channels=1),
        model=VitConfig(**SMALL_PICTURES, positions="sincos", init="xavier", pool="mean", image_size=32, channels=1),
        pretext=RotationConfig(augment=AugmentConfig(crop_area=(0.6, 1.0), flip=0.0)),
    )
    config.steps = 1000
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 500
    config.eval.examples = 16
    config.checkpoint.every_steps = 500
    return config


def published(size: str, source: str) -> ml_collections.ConfigDict:
    """At ImageNet size; the optimizer is the one that ViTs need."""
    images, rows = 1_281_167, 1024
    config = experiment(
        data=ImageConfig(source, image_size=224, crop="host"),
        model=VitConfig(**SIZES[size], **IMAGENET, pool="mean", dtype="bfloat16"),
        pretext=RotationConfig(),
    )
    config.batch_size = rows
    config.steps = 100 * images // rows
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 10 * images // rows
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 5000
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 50
    return config
