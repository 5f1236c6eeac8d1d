"""A teacher's prototypes of crops and of hidden patches (iBOT, arXiv 2111.07832; DINOv2, arXiv 2304.07193).

Command:   python -m sslx.main --config=configs/ibot.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/ibot.py:base
Default:   a small real job on glyphs, characters of matplotlib's fonts, with the encoder of configs/vit_mae.py, but
           for patches of 8, of which local crops of 16 pixels have four, balanced by Sinkhorn; some two minutes on two
           idle cores.
Sizes:     base is iBOT's for a ViT-S/16: 224 pixels and ten crops of 96, 1,024 pictures a step for 800 epochs of
           ImageNet-1k, AdamW at 2e-3 (5e-4 for each 256 pictures), 8,192 prototypes; 77.9 % linear. Gradients are
           clipped to 3 as a whole, where the authors' code clips each parameter's. For accelerators.
"""

import dataclasses

import ml_collections

from sslx.models.heads import HeadConfig
from sslx.models.teacher import MomentumConfig
from sslx.models.vit import IMAGENET, SIZES, VitConfig
from sslx.pretext import recipes
from sslx.pretext.ibot import IbotConfig
from sslx.pretext.picture_views import BYOL, BYOL_SECOND, MultiCrop


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    return recipes.sized(argument, "configs/ibot.py", {"default": small_job, "base": base})


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    small = dataclasses.replace(recipes.GLYPH_VIEW, crop_area=(0.15, 0.4))
    pretext = IbotConfig(
        balance="sinkhorn",  # and few prototypes with sharp targets, for the reasons in configs/dino.py
        teacher_temperature=0.03,
        prototypes=64,
        frozen_steps=20,
        projector=HeadConfig(layers=3, hidden=256, out=64, norm=False, activation="gelu"),
        momentum=MomentumConfig(0.9, 1.0),  # or it would hardly move in so few steps
        views=MultiCrop(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW, small, local_count=2, local_size=16),
    )
    model = dataclasses.replace(recipes.SMALL_VIT, patch_size=8, pool="class")
    config = recipes.joint_job(pretext, model, steps=400)
    config.optimizer.learning_rate = 2e-3
    return config


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    per_epoch = recipes.IMAGENET_IMAGES // 1024
    model = VitConfig(**SIZES["small"], **IMAGENET, drop_path=0.1, dtype="bfloat16")
    pretext = IbotConfig(
        prototypes=8192,
        frozen_steps=per_epoch,
        teacher_temperature=0.07,
        teacher_temperature_steps=30 * per_epoch,
        views=MultiCrop(
            dataclasses.replace(BYOL, crop_area=(0.25, 1.0)),
            dataclasses.replace(BYOL_SECOND, crop_area=(0.25, 1.0)),
            dataclasses.replace(BYOL, crop_area=(0.05, 0.25), blur=0.5),
            local_count=10,
        ),
    )
    return recipes.imagenet_vit(
        pretext, model, batch_size=1024, epochs=800, warmup_epochs=10, learning_rate=5e-4 * 1024 / 256, clip_norm=3.0
    )
