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

from sslx.config import parse_argument
from sslx.errors import choose
from sslx.pretext import recipes
from sslx.pretext.mae import MaeConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="")
    size = choose(arguments["size"], ("default", "small", "base", "large", "huge"), "size of configs/vit_mae.py")
    if size == "default":
        return small_job(arguments["data"] or "glyphs")
    config = recipes.imagenet(
        arguments["data"] or "tfds:imagenet2012",
        MaeConfig(),
        size=size,
        batch_size=4096,
        epochs=800,
        warmup_epochs=40,
        learning_rate=1.5e-4 * 4096 / 256,
        positions="sincos",
        init="xavier",
    )
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = None  # theirs clips nothing
    return config


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    pretext = MaeConfig(decoder_layers=2, decoder_width=96, decoder_heads=4, augment=recipes.GLYPH)
    config = recipes.small_job(source, pretext, batch_size=64)
    config.steps = 2000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.beta2 = 0.95
    return config
