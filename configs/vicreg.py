"""Features that agree, vary and do not repeat each other (VICReg, arXiv 2105.04906).

Command:   python -m sslx.main --config=configs/vicreg.py
Argument:  [SIZE][,data=SOURCE][,batch=ROWS], for example configs/vicreg.py:cifar10
Default:   a small real job on glyphs, characters of matplotlib's fonts: a ResNet-10 of 16 to 128 channels in batches of
           64, some two minutes on two idle cores.
Sizes:     sentences is a small job on texts, the docstrings of python_docs, each twice under different dropout masks
           (SimCSE's views): the encoder of configs/bert_mlm.py with dropout 0.1, 200 batches of 64 rows of 64 tokens.
           With --config.init=runs/bert_mlm it starts from that one's run, as SimCSE does from BERT.
           cifar10 is solo-learn's recipe, a ResNet-18 for 1,000 epochs of CIFAR-10 (tfds:cifar10); its published linear
           accuracy is 92.07 % (trained online: eval/online_linear here). Not run here.
           base is the paper's: a ResNet-50 at 224 pixels, 2,048 pictures a step for 1,000 epochs of ImageNet-1k,
           LARS at 1.6 (0.2 for each 256 pictures); 73.2 % linear. For accelerators.
"""

import ml_collections

from sslx.augment.policy import AugmentConfig
from sslx.models.heads import HeadConfig
from sslx.pretext import recipes
from sslx.pretext.picture_views import TwoViews
from sslx.pretext.sentence_recipes import sentence_job
from sslx.pretext.sentence_views import DropoutViews
from sslx.pretext.vicreg import VicregConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures or texts."""
    jobs = {"default": small_job, "sentences": sentences, "cifar10": cifar, "base": base}
    return recipes.sized(argument, "configs/vicreg.py", jobs)


def small_job() -> ml_collections.ConfigDict:
    """Some minutes on two CPU cores."""
    return recipes.joint_job(small_pretext(TwoViews(recipes.GLYPH_VIEW, recipes.GLYPH_VIEW)))


def sentences() -> ml_collections.ConfigDict:
    """Texts, some minutes on two CPU cores."""
    return sentence_job(small_pretext(DropoutViews()))


def small_pretext(views: TwoViews | DropoutViews) -> VicregConfig:
    """What both small jobs ask."""
    return VicregConfig(projector=HeadConfig(layers=3, hidden=256, out=256), views=views)


def cifar() -> ml_collections.ConfigDict:
    """solo-learn's settings."""
    head = HeadConfig(layers=3, hidden=2048, out=2048)
    view = AugmentConfig(crop_area=(0.2, 1.0), jitter=0.8, saturation=0.2, grey=0.2, solarise=0.1)
    return recipes.cifar10(VicregConfig(projector=head, views=TwoViews(view, view)), 0.3, 1e-4)


def base() -> ml_collections.ConfigDict:
    """The paper's settings."""
    return recipes.imagenet_resnet(VicregConfig(), batch_size=2048, epochs=1000, learning_rate=1.6, weight_decay=1e-6)
