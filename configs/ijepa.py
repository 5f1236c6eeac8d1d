"""Prediction of blocks of a picture in features (I-JEPA, arXiv 2301.08243).

Command:   python -m sslx.main --config=configs/ijepa.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/ijepa.py:base
Default:   a small real job on glyphs, characters of matplotlib's fonts, with the encoder of configs/vit_mae.py; some
           two minutes on two idle cores.
Sizes:     base is the paper's for a ViT-B/16: 224 pixels, 2,048 pictures a step for 600 epochs of ImageNet-1k, AdamW at
           1e-3, weight decay 0.04 to 0.4, momentum 0.996 to 1; 72.9 % linear. For accelerators.
"""

import dataclasses

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.images import ImageConfig
from sslx.errors import choose
from sslx.models.teacher import MomentumConfig
from sslx.models.vit import IMAGENET, SIZES, VitConfig
from sslx.pretext import recipes
from sslx.pretext.ijepa import IJepaConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="", batch="")
    size = choose(arguments["size"], ("default", "base"), "size of configs/ijepa.py")
    config = {"default": small_job, "base": base}[size]()
    config.data.source = arguments["data"] or config.data.source
    return recipes.rebatched(config, arguments["batch"])


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    pretext = IJepaConfig(
        predictor_layers=2,
        predictor_width=64,
        predictor_heads=4,
        momentum=MomentumConfig(0.95, 1.0, "linear"),
        augment=recipes.GLYPH,
    )
    return recipes.joint_job(pretext, dataclasses.replace(recipes.SMALL_VIT, class_token=False))


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    rows, per_epoch = 2048, recipes.IMAGENET_IMAGES // 2048
    config = experiment(
        data=ImageConfig("tfds:imagenet2012", image_size=224),
        model=VitConfig(
            **SIZES["base"], **IMAGENET, positions="sincos", class_token=False, pool="mean", dtype="bfloat16"
        ),
        pretext=IJepaConfig(),
    )
    config.batch_size = rows
    config.steps = 600 * per_epoch
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.04
    config.optimizer.weight_decay_end = 0.4
    config.optimizer.clip_norm = None
    config.optimizer.warmup_steps = 15 * per_epoch
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 5 * per_epoch
    config.eval.examples = 0
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 50
    return config
