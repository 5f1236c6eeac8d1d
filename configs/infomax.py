"""Mutual information between a picture and its places (Deep InfoMax, arXiv 1808.06670).

Command:   python -m sslx.main --config=configs/infomax.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/infomax.py:base
Default:   a small real job on glyphs, characters of matplotlib's fonts: a ResNet-10 of 16 to 128 channels in batches of
           64, some two minutes on two idle cores.
Sizes:     base is a ResNet-18 on CIFAR-10 (tfds:cifar10) with the optimizer of SimCLR's recipe there; the paper's
           encoders are far smaller, and no number of theirs compares.
"""

import ml_collections

from sslx.models.heads import HeadConfig
from sslx.pretext import recipes
from sslx.pretext.infomax import InfomaxConfig
from sslx.pretext.picture_views import TwoViews


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    return recipes.sized(argument, "configs/infomax.py", {"default": small_job, "base": base})


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    head, views = HeadConfig(layers=2, hidden=256, out=64), TwoViews(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW)
    return recipes.joint_job(InfomaxConfig(projector=head, place_head=head, views=views))


def base() -> ml_collections.ConfigDict:
    """At CIFAR-10's size."""
    views = TwoViews(recipes.ASYMMETRIC, recipes.ASYMMETRIC)
    return recipes.cifar10(InfomaxConfig(views=views), 0.4, 1e-4)
