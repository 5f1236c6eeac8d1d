"""Contrast with a teacher's views (MoCo v3, arXiv 2104.02057).

Command:   python -m sslx.main --config=configs/moco_v3.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/moco_v3.py:cifar10
Default:   a small real job on glyphs, characters of matplotlib's fonts: a ResNet-10 of 16 to 128 channels in batches of
           64, some two minutes on two idle cores.
Sizes:     sentences is a small job on texts, the docstrings of python_docs, each twice under different dropout masks
           (SimCSE's views): the encoder of configs/bert_mlm.py with dropout 0.1, 200 batches of 64 rows of 64 tokens.
           With --config.init=runs/bert_mlm it starts from that one's run, as SimCSE does from BERT.
           cifar10 is solo-learn's recipe, a ResNet-18 for 1,000 epochs of CIFAR-10 (tfds:cifar10); its published linear
           accuracy is 93.10 % (trained online: eval/online_linear here). Not run here.
           base is the paper's: a ResNet-50 at 224 pixels, 4,096 pictures a step for 300 epochs of ImageNet-1k,
           LARS at 4.8 (0.3 for each 256 pictures), temperature 1, momentum 0.99 to 1; 72.8 % linear. For accelerators.
"""

import dataclasses

import ml_collections

from sslx.models.heads import HeadConfig
from sslx.models.teacher import MomentumConfig
from sslx.pretext import recipes
from sslx.pretext.moco_v3 import MocoV3Config
from sslx.pretext.picture_views import BYOL, BYOL_SECOND, TwoViews
from sslx.pretext.sentence_recipes import sentence_job
from sslx.pretext.sentence_views import DropoutViews


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures or texts."""
    jobs = {"default": small_job, "sentences": sentences, "cifar10": cifar, "base": base}
    return recipes.sized(argument, "configs/moco_v3.py", jobs)


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    return recipes.joint_job(small_pretext(TwoViews(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW)), steps=400)


def sentences() -> ml_collections.ConfigDict:
    """Texts, some minutes on two CPU cores."""
    return sentence_job(small_pretext(DropoutViews()))


def small_pretext(views: TwoViews | DropoutViews) -> MocoV3Config:
    """What both small jobs ask."""
    return MocoV3Config(
        temperature=0.2,
        projector=HeadConfig(layers=3, hidden=256, out=64, last_norm=True),
        predictor=HeadConfig(layers=2, hidden=256, out=64, last_norm=True),
        momentum=MomentumConfig(0.98, 1.0),
        views=views,
    )


def cifar() -> ml_collections.ConfigDict:
    """solo-learn's settings."""
    views = TwoViews(recipes.ASYMMETRIC, recipes.ASYMMETRIC_SECOND)
    pretext = MocoV3Config(temperature=0.2, momentum=MomentumConfig(0.99, 1.0), views=views)
    return recipes.cifar10(pretext, 0.3, 1e-6)


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    views = TwoViews(
        dataclasses.replace(BYOL, crop_area=(0.2, 1.0)), dataclasses.replace(BYOL_SECOND, crop_area=(0.2, 1.0))
    )
    pretext = MocoV3Config(momentum=MomentumConfig(0.99, 1.0), views=views)
    return recipes.imagenet_resnet(pretext, batch_size=4096, epochs=300, learning_rate=4.8, weight_decay=1e-6)
