"""Prediction of one's own other view (SimSiam, arXiv 2011.10566).

Command:   python -m sslx.main --config=configs/simsiam.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/simsiam.py:cifar10
Default:   a small real job on glyphs, characters of matplotlib's fonts: a ResNet-10 of 16 to 128 channels in batches of
           64, some two minutes on two idle cores.
Sizes:     sentences is a small job on texts, the docstrings of python_docs, each twice under different dropout masks
           (SimCSE's views): the encoder of configs/bert_mlm.py with dropout 0.1, 200 batches of 64 rows of 64 tokens.
           With --config.init=runs/bert_mlm it starts from that one's run, as SimCSE does from BERT.
           cifar10 is solo-learn's recipe, a ResNet-18 for 1,000 epochs of CIFAR-10 (tfds:cifar10); its published linear
           accuracy is 90.51 % (trained online: eval/online_linear here). Not run here.
           base is the paper's: a ResNet-50 at 224 pixels, 256 pictures a step for 100 epochs of ImageNet-1k,
           SGD at 0.05, the predictor's rate constant; 68.1 % linear. For accelerators.
"""

import dataclasses

import ml_collections

from sslx.models.heads import HeadConfig
from sslx.pretext import recipes
from sslx.pretext.picture_views import TwoViews
from sslx.pretext.sentence_recipes import sentence_job
from sslx.pretext.sentence_views import DropoutViews
from sslx.pretext.simsiam import WEAKER, SimSiamConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures or texts."""
    jobs = {"default": small_job, "sentences": sentences, "cifar10": cifar, "base": base}
    return recipes.sized(argument, "configs/simsiam.py", jobs)


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    return recipes.joint_job(small_pretext(TwoViews(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW)))


def sentences() -> ml_collections.ConfigDict:
    """Texts, some minutes on two CPU cores."""
    return sentence_job(small_pretext(DropoutViews()))


def small_pretext(views: TwoViews | DropoutViews) -> SimSiamConfig:
    """What both small jobs ask."""
    projector = HeadConfig(layers=3, hidden=256, out=256, last_norm=True)
    return SimSiamConfig(projector=projector, predictor=HeadConfig(layers=2, hidden=64, out=256), views=views)


def cifar() -> ml_collections.ConfigDict:
    """solo-learn's settings."""
    view = dataclasses.replace(WEAKER, crop_area=(0.08, 1.0))
    config = recipes.cifar10(SimSiamConfig(views=TwoViews(view, view)), 0.5, 1e-5, optimizer="sgd")
    config.optimizer.constant = (r"^predictor/",)
    return config


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    config = recipes.imagenet_resnet(SimSiamConfig(), batch_size=256, epochs=100, learning_rate=0.05, weight_decay=1e-4)
    config.optimizer.name = "sgd"
    config.optimizer.warmup_steps = 0
    config.optimizer.constant = (r"^predictor/",)
    return config
