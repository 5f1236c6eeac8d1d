"""A teacher's prototypes, told from any crop (DINO, arXiv 2104.14294).

Command:   python -m sslx.main --config=configs/dino.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/dino.py:cifar10
Default:   a small real job on glyphs, characters of matplotlib's fonts: a ResNet-10 of 16 to 128 channels in batches of
           64, balanced by Sinkhorn; some two minutes on two idle cores.
Sizes:     cifar10 is solo-learn's recipe, a ResNet-18 for 1,000 epochs of CIFAR-10 (tfds:cifar10); its published linear
           accuracy is 89.52 % (trained online: eval/online_linear here). Not run here.
           base is the paper's for a ViT-S/16: 224 pixels and eight crops of 96, 1,024 pictures a step for 800 epochs of
           ImageNet-1k, AdamW at 2e-3 (5e-4 for each 256 pictures), 65,536 prototypes; 77.0 % linear. Gradients are
           clipped to 3 as a whole, where the authors' code clips each parameter's. For accelerators.
"""

import dataclasses

import ml_collections

from sslx.models.heads import HeadConfig
from sslx.models.teacher import MomentumConfig
from sslx.models.vit import IMAGENET, SIZES, VitConfig
from sslx.pretext import recipes
from sslx.pretext.dino import DinoConfig
from sslx.pretext.picture_views import MultiCrop


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    return recipes.sized(argument, "configs/dino.py", {"default": small_job, "cifar10": cifar, "base": base})


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    small = dataclasses.replace(recipes.GLYPH_VIEW, crop_area=(0.15, 0.4))
    pretext = DinoConfig(
        # Within some hundred updates of batches this small, targets that a centre balances hardly tell rows apart.
        balance="sinkhorn",
        teacher_temperature=0.03,
        prototypes=64,
        frozen_steps=20,
        # Normalised, without which all scores are alike at first and stay so for hundreds of steps.
        projector=HeadConfig(layers=3, hidden=256, out=64, activation="gelu"),
        momentum=MomentumConfig(0.9, 1.0),  # or it would hardly move in so few steps
        views=MultiCrop(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW, small, local_count=2, local_size=16),
    )
    config = recipes.joint_job(pretext, steps=300)
    config.optimizer.learning_rate = 3e-3
    return config


def cifar() -> ml_collections.ConfigDict:
    """solo-learn's settings."""
    per_epoch = recipes.CIFAR_IMAGES // 256
    # solo-learn's own defaults: the teacher's temperature rises from 0.04 to 0.07 over 50 epochs.
    pretext = DinoConfig(
        prototypes=4096,
        frozen_steps=per_epoch,
        teacher_temperature=0.07,
        teacher_temperature_steps=50 * per_epoch,
        projector=HeadConfig(layers=3, hidden=2048, out=256, norm=False, activation="gelu"),
        momentum=MomentumConfig(0.9995, 1.0),
        views=MultiCrop(recipes.ASYMMETRIC, recipes.ASYMMETRIC_SECOND, local_count=0),
    )
    return recipes.cifar10(pretext, 0.3, 1e-6)


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    per_epoch = recipes.IMAGENET_IMAGES // 1024
    model = VitConfig(**SIZES["small"], **IMAGENET, drop_path=0.1, dtype="bfloat16")
    pretext = DinoConfig(
        frozen_steps=per_epoch,
        teacher_temperature=0.07,
        teacher_temperature_steps=30 * per_epoch,
    )
    config = recipes.imagenet_vit(
        pretext, model, batch_size=1024, epochs=800, warmup_epochs=10, learning_rate=5e-4 * 1024 / 256, clip_norm=3.0
    )
    config.optimizer.final_scale = 5e-4  # to 1e-6
    return config
