"""Clusters of other crops (SwAV, arXiv 2006.09882).

Command:   python -m sslx.main --config=configs/swav.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/swav.py:cifar10
Default:   a small real job on glyphs, characters of matplotlib's fonts: a ResNet-10 of 16 to 128 channels in batches of
           64, some two minutes on two idle cores.
Sizes:     cifar10 is solo-learn's recipe, a ResNet-18 for 1,000 epochs of CIFAR-10 (tfds:cifar10); its published linear
           accuracy is 89.17 % (trained online: eval/online_linear here). Not run here.
           base is the paper's: a ResNet-50, 224 pixels and six crops of 96, 4,096 pictures a step for 800 epochs of
           ImageNet-1k, LARS at 4.8, 3,000 prototypes; 75.3 % linear. For accelerators.
"""

import dataclasses

import ml_collections

from sslx.models.heads import HeadConfig
from sslx.pretext import recipes
from sslx.pretext.picture_views import MultiCrop
from sslx.pretext.swav import SwavConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    return recipes.sized(argument, "configs/swav.py", {"default": small_job, "cifar10": cifar, "base": base})


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    small = dataclasses.replace(recipes.GLYPH_VIEW, crop_area=(0.15, 0.4))
    pretext = SwavConfig(
        prototypes=64,  # of so few rows, many prototypes would get shares that are nearly even
        epsilon=0.03,
        frozen_steps=20,
        projector=HeadConfig(layers=2, hidden=256, out=64),
        views=MultiCrop(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW, small, local_count=2, local_size=16),
    )
    config = recipes.joint_job(pretext, steps=400)
    config.optimizer.learning_rate = 3e-3
    return config


def cifar() -> ml_collections.ConfigDict:
    """solo-learn's settings."""
    per_epoch = recipes.CIFAR_IMAGES // 256
    pretext = SwavConfig(
        frozen_steps=2 * per_epoch,
        queue=3840,
        queue_start=50 * per_epoch,
        views=MultiCrop(recipes.SYMMETRIC, recipes.SYMMETRIC, local_count=0),
    )
    return recipes.cifar10(pretext, 0.6, 1e-6)


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    pretext = SwavConfig(frozen_steps=recipes.IMAGENET_IMAGES // 4096)
    return recipes.imagenet_resnet(pretext, batch_size=4096, epochs=800, learning_rate=4.8, weight_decay=1e-6)
