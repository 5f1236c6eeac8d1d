"""Prediction of blocks of a picture in features (I-JEPA, arXiv 2301.08243).

Command:   python -m sslx.main --config=configs/ijepa.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/ijepa.py:base
Default:   a small real job on glyphs, characters of matplotlib's fonts, with the encoder of configs/vit_mae.py; some
           two minutes on two idle cores.
Sizes:     base is the paper's for a ViT-B/16: 224 pixels, 2,048 pictures a step for 600 epochs of ImageNet-1k, AdamW at
           1e-3, weight decay 0.04 to 0.4, momentum 0.996 to 1; 72.9 % linear. The authors' code also starts the
           kernels that end a branch smaller, by the root of twice their layer's number. For accelerators.
"""

import dataclasses

import ml_collections

from sslx.models.teacher import MomentumConfig
from sslx.models.vit import IMAGENET, SIZES, VitConfig
from sslx.pretext import recipes
from sslx.pretext.ijepa import IJepaConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    return recipes.sized(argument, "configs/ijepa.py", {"default": small_job, "base": base})


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    pretext = IJepaConfig(
        predictor_layers=2,
        predictor_width=64,
        predictor_heads=4,
        momentum=MomentumConfig(0.99, 1.0, "linear"),  # forgets the first parameters within the run
        augment=recipes.GLYPH,
    )
    # Branches at full size from the start give all places much the same features, which are told without looking: of
    # targets with mean square 1, the variance was 0.2 without layer scale and is 0.7 with it.
    model = dataclasses.replace(recipes.SMALL_VIT, class_token=False, layer_scale=0.1)
    config = recipes.joint_job(pretext, model, steps=1000, batch_size=32)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    return config


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    model = VitConfig(**SIZES["base"], **IMAGENET, positions="sincos", class_token=False, pool="mean", dtype="bfloat16")
    pretext = IJepaConfig()
    return recipes.imagenet_vit(
        pretext, model, batch_size=2048, epochs=600, warmup_epochs=15, learning_rate=1e-3, clip_norm=None
    )
