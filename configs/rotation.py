"""Rotation (RotNet, arXiv 1803.07728): by how many quarters has the picture been turned?

Command:   python -m sslx.main --config=configs/rotation.py
Argument:  [SIZE][,data=SOURCE], for example configs/rotation.py:base,data=tfds:imagenet2012
Default:   a small real job on glyphs, characters of matplotlib's fonts, with the encoder of configs/vit_mae.py.
Sizes:     base is a ViT-B at 224 pixels for 100 epochs of ImageNet-1k (tfds:imagenet2012); the paper has an AlexNet.
"""

import ml_collections

from sslx.config import parse_argument
from sslx.errors import choose
from sslx.pretext import recipes
from sslx.pretext.rotation import RotationConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="")
    size = choose(arguments["size"], ("default", "base"), "size of configs/rotation.py")
    if size == "default":
        pretext = RotationConfig(augment=recipes.GLYPH)
        return recipes.small_job(arguments["data"] or "glyphs", pretext, batch_size=64)
    return recipes.imagenet(arguments["data"] or "tfds:imagenet2012", RotationConfig(), pool="mean")
