"""Masked image modelling with a plain head (SimMIM, arXiv 2111.09886).

Command:   python -m sslx.main --config=configs/vit_simmim.py
Argument:  [SIZE][,data=SOURCE], for example configs/vit_simmim.py:base,data=tfds:imagenet2012
Default:   a small real job on glyphs, characters of matplotlib's fonts, with the encoder of configs/vit_mae.py.
Sizes:     base is ViT-B with the recipe of its authors' simmim_pretrain__vit_base__img224__800ep.yaml: squares of 32
           pixels, 60 % hidden, 2,048 pictures a step, AdamW at 4e-4 (1e-4 for each 512 pictures), weight decay 0.05,
           drop path 0.1, gradients clipped at 5, 10 epochs of warm-up, 800 in all. Two things are not theirs: positions
           are learned, where theirs are relative ones that all layers share, and the rate falls by a cosine, where
           theirs falls to a tenth at epoch 700. ImageNet-1k is tfds:imagenet2012.
"""

import ml_collections

from sslx.augment.policy import AugmentConfig
from sslx.config import experiment, parse_argument
from sslx.data.images import ImageConfig
from sslx.errors import choose
from sslx.models.vit import IMAGENET, SIZES, SMALL_PICTURES, VitConfig
from sslx.pretext.simmim import SimMimConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="")
    size = choose(arguments["size"], ("default", "base"), "size of configs/vit_simmim.py")
    if size == "default":
        return small_job(arguments["data"] or "glyphs")
    return published(size, arguments["data"] or "tfds:imagenet2012")


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    config = experiment(
        data=ImageConfig(source, image_size=32, channels=1),
        model=VitConfig(**SMALL_PICTURES, positions="sincos", init="xavier", pool="mean", image_size=32, channels=1),
        pretext=SimMimConfig(mask_size=8, augment=AugmentConfig(crop_area=(0.6, 1.0), flip=0.0)),
    )
    config.steps = 1000
    config.batch_size = 128
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 500
    config.eval.examples = 16
    config.checkpoint.every_steps = 500
    return config


def published(size: str, source: str) -> ml_collections.ConfigDict:
    """The recipe for ImageNet."""
    images, rows = 1_281_167, 2048
    config = experiment(
        data=ImageConfig(source, image_size=224, crop="host", crop_area=(0.67, 1.0)),
        model=VitConfig(**SIZES[size], **IMAGENET, pool="mean", drop_path=0.1, dtype="bfloat16"),
        pretext=SimMimConfig(),
    )
    config.batch_size = rows
    config.steps = 800 * images // rows
    config.optimizer.learning_rate = 1e-4 * rows / 512
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 10 * images // rows
    config.optimizer.schedule = "cosine"
    config.optimizer.clip_norm = 5.0
    config.eval.every_steps = 5000
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 50
    return config
