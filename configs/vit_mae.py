"""Masked autoencoding with a ViT (MAE, arXiv 2111.06377).

Command:   python -m sslx.main --config=configs/vit_mae.py
Argument:  [SIZE][,data=SOURCE], for example configs/vit_mae.py:base,data=tfds:imagenet2012
Default:   a small real job on glyphs, characters of matplotlib's fonts: 32 x 32 grey pixels, patches of 4, an encoder
           of 4 layers x 128 and a decoder of 2 x 96; a quarter of the patches is seen.
Sizes:     small base large huge are ViTs for 224 x 224 pixels with the published recipe: a decoder of 8 x 512, 4,096
           pictures a step, AdamW at 2.4e-3 (1.5e-4 for each 256 pictures) with betas 0.9 and 0.95, weight decay 0.05,
           40 epochs of warm-up, cosine to 0 over 800. ImageNet-1k is tfds:imagenet2012. They are for accelerators.
"""

import ml_collections

from sslx.augment.policy import AugmentConfig
from sslx.config import experiment, parse_argument
from sslx.data.images import ImageConfig
from sslx.errors import choose
from sslx.models.vit import IMAGENET, SIZES, SMALL_PICTURES, VitConfig
from sslx.pretext.mae import MaeConfig

IMAGENET_IMAGES = 1_281_167


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="")
    sizes = ("default", "small", "base", "large", "huge")
    size = choose(arguments["size"], sizes, "size of configs/vit_mae.py")
    if size == "default":
        return small_job(arguments["data"] or "glyphs")
    return published(size, arguments["data"] or "tfds:imagenet2012")


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    config = experiment(
        data=ImageConfig(source, image_size=32, channels=1),
        model=VitConfig(**SMALL_PICTURES, positions="sincos", init="xavier", pool="mean", image_size=32, channels=1),
        pretext=MaeConfig(
            decoder_layers=2,
            decoder_width=96,
            decoder_heads=4,
            augment=AugmentConfig(crop_area=(0.6, 1.0), flip=0.0),  # a mirrored character is another one
        ),
    )
    config.steps = 2000
    config.batch_size = 64
    config.optimizer.learning_rate = 2e-3
    config.optimizer.beta2 = 0.95
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 500
    config.eval.examples = 16
    config.checkpoint.every_steps = 500
    return config


def published(size: str, source: str) -> ml_collections.ConfigDict:
    """The recipe for ImageNet."""
    config = experiment(
        data=ImageConfig(source, image_size=224, crop="host"),
        model=VitConfig(**SIZES[size], **IMAGENET, positions="sincos", init="xavier", dtype="bfloat16"),
        pretext=MaeConfig(),
    )
    config.batch_size = 4096
    config.steps = 800 * IMAGENET_IMAGES // config.batch_size
    config.optimizer.learning_rate = 1.5e-4 * config.batch_size / 256
    config.optimizer.beta2 = 0.95
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 40 * IMAGENET_IMAGES // config.batch_size
    config.optimizer.schedule = "cosine"
    config.optimizer.clip_norm = None  # theirs clips nothing
    config.eval.every_steps = 5000
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 50
    return config
