"""Prediction of a teacher's view (BYOL, arXiv 2006.07733).

Command:   python -m sslx.main --config=configs/byol.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/byol.py:cifar10
Default:   a small real job on glyphs, characters of matplotlib's fonts: a ResNet-10 of 16 to 128 channels in batches of
           64, some two minutes on two idle cores.
Sizes:     sentences is a small job on texts, the docstrings of python_docs, each twice under different dropout masks
           (SimCSE's views): the encoder of configs/bert_mlm.py with dropout 0.1, 200 batches of 64 rows of 64 tokens.
           With --config.init=runs/bert_mlm it starts from that one's run, as SimCSE does from BERT.
           cifar10 is solo-learn's recipe, a ResNet-18 for 1,000 epochs of CIFAR-10 (tfds:cifar10); its published linear
           accuracy is 92.58 % (trained online: eval/online_linear here). Not run here.
           base is the paper's: a ResNet-50 at 224 pixels, 4,096 pictures a step for 1,000 epochs of ImageNet-1k,
           LARS at 3.2 (0.2 for each 256 pictures), momentum 0.996 to 1; 74.3 % linear. For accelerators.
"""

import ml_collections

from sslx.models.heads import HeadConfig
from sslx.models.teacher import MomentumConfig
from sslx.pretext import recipes
from sslx.pretext.byol import ByolConfig
from sslx.pretext.picture_views import TwoViews
from sslx.pretext.sentence_recipes import sentence_job
from sslx.pretext.sentence_views import DropoutViews


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures or texts."""
    jobs = {"default": small_job, "sentences": sentences, "cifar10": cifar, "base": base}
    return recipes.sized(argument, "configs/byol.py", jobs)


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    return recipes.joint_job(small_pretext(TwoViews(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW)), steps=400)


def sentences() -> ml_collections.ConfigDict:
    """Texts, some minutes on two CPU cores."""
    return sentence_job(small_pretext(DropoutViews()))


def small_pretext(views: TwoViews | DropoutViews) -> ByolConfig:
    """What both small jobs ask."""
    head = HeadConfig(layers=2, hidden=256, out=64)
    return ByolConfig(projector=head, predictor=head, momentum=MomentumConfig(0.98, 1.0), views=views)


def cifar() -> ml_collections.ConfigDict:
    """solo-learn's settings."""
    views = TwoViews(recipes.ASYMMETRIC, recipes.ASYMMETRIC_SECOND)
    return recipes.cifar10(ByolConfig(momentum=MomentumConfig(0.99, 1.0), views=views), 1.0, 1e-5)


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    return recipes.imagenet_resnet(ByolConfig(), batch_size=4096, epochs=1000, learning_rate=3.2, weight_decay=1.5e-6)
