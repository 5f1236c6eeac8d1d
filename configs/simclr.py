"""Contrast between two views of a picture (SimCLR, arXiv 2002.05709).

Command:   python -m sslx.main --config=configs/simclr.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/simclr.py:cifar10
Default:   a small real job on glyphs, characters of matplotlib's fonts: a ResNet-10 of 16 to 128 channels in batches of
           64, some two minutes on two idle cores.
Sizes:     sentences is a small job on texts, the docstrings of python_docs, each twice under different dropout masks
           (SimCSE's views): the encoder of configs/bert_mlm.py with dropout 0.1, 200 batches of 64 rows of 64 tokens.
           With --config.init=runs/bert_mlm it starts from that one's run, as SimCSE does from BERT.
           cifar10 is solo-learn's recipe, a ResNet-18 for 1,000 epochs of CIFAR-10 (tfds:cifar10); its published linear
           accuracy is 90.74 % (trained online: eval/online_linear here). Not run here.
           base is the paper's: a ResNet-50 at 224 pixels, 4,096 pictures a step for 1,000 epochs of ImageNet-1k,
           LARS at 4.8 (0.3 for each 256 pictures), temperature 0.1; 69.3 % linear. For accelerators.
"""

import ml_collections

from sslx.models.heads import HeadConfig
from sslx.pretext import recipes
from sslx.pretext.picture_views import TwoViews
from sslx.pretext.sentence_recipes import sentence_job
from sslx.pretext.sentence_views import DropoutViews
from sslx.pretext.simclr import SimClrConfig

SMALL_HEAD = HeadConfig(layers=2, hidden=256, out=64)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures or texts."""
    jobs = {"default": small_job, "sentences": sentences, "cifar10": cifar, "base": base}
    return recipes.sized(argument, "configs/simclr.py", jobs)


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    views = TwoViews(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW)
    return recipes.joint_job(SimClrConfig(temperature=0.2, projector=SMALL_HEAD, views=views))


def sentences() -> ml_collections.ConfigDict:
    """Texts, at SimCSE's temperature."""
    return sentence_job(SimClrConfig(temperature=0.05, projector=SMALL_HEAD, views=DropoutViews()))


def cifar() -> ml_collections.ConfigDict:
    """solo-learn's settings."""
    # Theirs has no batch normalisation in the projector.
    head = HeadConfig(layers=2, hidden=2048, out=256, norm=False)
    views = TwoViews(recipes.SYMMETRIC, recipes.SYMMETRIC)
    return recipes.cifar10(SimClrConfig(temperature=0.2, projector=head, views=views), 0.4, 1e-4)


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    return recipes.imagenet_resnet(SimClrConfig(), batch_size=4096, epochs=1000, learning_rate=4.8, weight_decay=1e-6)
