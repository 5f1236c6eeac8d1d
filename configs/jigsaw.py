"""Jigsaw (Noroozi and Favaro, arXiv 1603.09246): in which order have nine pieces of the picture been laid?

Command:   python -m sslx.main --config=configs/jigsaw.py
Argument:  [SIZE][,data=SOURCE], for example configs/jigsaw.py:base,data=tfds:imagenet2012
Default:   a small real job on glyphs, characters of matplotlib's fonts, with the encoder of configs/vit_mae.py.
Sizes:     base is a ViT-B at 224 pixels for 100 epochs of ImageNet-1k (tfds:imagenet2012), 1,000 permutations; the
           paper has an AlexNet.
"""

import ml_collections

from sslx.config import parse_argument
from sslx.errors import choose
from sslx.pretext import recipes
from sslx.pretext.jigsaw import JigsawConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="")
    size = choose(arguments["size"], ("default", "base"), "size of configs/jigsaw.py")
    if size == "default":
        pretext = JigsawConfig(permutations=64, augment=recipes.GLYPH)
        return recipes.small_job(arguments["data"] or "glyphs", pretext, batch_size=32)
    return recipes.imagenet(arguments["data"] or "tfds:imagenet2012", JigsawConfig(head_width=4096), pool="mean")
