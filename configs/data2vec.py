"""Prediction of a teacher's view of hidden patches (data2vec 2, arXiv 2212.07525).

Command:   python -m sslx.main --config=configs/data2vec.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/data2vec.py:base
Default:   a small real job on glyphs, characters of matplotlib's fonts, with the encoder of configs/vit_mae.py; four
           masks of each picture.
Sizes:     base is the recipe of fairseq's examples/data2vec/config/v2/base_images_only_task.yaml: a ViT-B/16 at 224
           pixels, 256 pictures a step (16 on each of 16 devices) with 16 masks each, AdamW at 1e-3 with betas 0.9 and
           0.95, weight decay 0.05, gradients clipped at 4, 375,300 steps of which 50,040 warm up; ImageNet-1k, 84.2 %
           fine-tuned. Theirs normalises after each branch, here before; the clipping norm is
           divided by the root of the width, as the loss is a mean over it. For accelerators.
"""

import ml_collections

from sslx.models.teacher import MomentumConfig
from sslx.pretext import recipes
from sslx.pretext.data2vec import Data2vecConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    return recipes.sized(argument, "configs/data2vec.py", {"default": small_job, "base": base})


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    pretext = Data2vecConfig(
        masks=4,
        mask_ratio=0.75,
        square=2,
        top_layers=4,
        decoder_layers=2,
        decoder_width=64,
        decoder_groups=1,
        momentum=MomentumConfig(0.99, 0.999, "linear"),
        augment=recipes.GLYPH,
    )
    config = recipes.joint_job(pretext, recipes.SMALL_VIT, batch_size=32)
    config.optimizer.learning_rate = 2e-3
    return config


def base() -> ml_collections.ConfigDict:
    """fairseq's settings."""
    # Theirs weighs the class by 0.01 of a sum over the 256 rows of a device, 16 pictures with 16 masks each.
    pretext = Data2vecConfig(class_weight=2.56)
    config = recipes.imagenet("tfds:imagenet2012", pretext, batch_size=256, learning_rate=1e-3, positions="sincos")
    config.steps = 375_300
    config.optimizer.warmup_steps = 50_040
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = 4 / 768**0.5
    return config
