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

from sslx.config import parse_argument
from sslx.errors import choose
from sslx.pretext import recipes
from sslx.pretext.simmim import SimMimConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="")
    size = choose(arguments["size"], ("default", "base"), "size of configs/vit_simmim.py")
    if size == "default":
        pretext = SimMimConfig(mask_size=8, augment=recipes.GLYPH)
        return recipes.small_job(arguments["data"] or "glyphs", pretext, batch_size=128)
    config = recipes.imagenet(
        arguments["data"] or "tfds:imagenet2012",
        SimMimConfig(),
        batch_size=2048,
        epochs=800,
        learning_rate=1e-4 * 2048 / 512,
        data={"crop_area": (0.67, 1.0)},
        pool="mean",
        drop_path=0.1,
    )
    config.optimizer.clip_norm = 5.0
    return config
