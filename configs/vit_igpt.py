"""Autoregressive pixels with a causal transformer (iGPT, Chen et al. 2020).

Command:   python -m sslx.main --config=configs/vit_igpt.py
Argument:  [SIZE][,data=SOURCE], for example configs/vit_igpt.py:small,data=tfds:imagenet2012
Default:   a small real job on glyphs, characters of matplotlib's fonts, brought to 16 x 16 grey pixels of 8 colours: a
           GPT of 4 layers x 128 over 256 pixels.
Sizes:     small medium large are the published ones: 32 x 32 pixels of 512 colours, 128 pictures a step, Adam at 3e-3
           (small and medium) or 1e-3 with betas 0.9 and 0.95, 1 M steps, cosine to 0. They are for accelerators.
"""

import ml_collections

from sslx.augment.policy import AugmentConfig
from sslx.config import experiment, parse_argument
from sslx.data.images import ImageConfig
from sslx.errors import choose
from sslx.models.igpt import SIZES, IgptConfig
from sslx.pretext.igpt import IgptPretextConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one set of pictures."""
    arguments = parse_argument(argument, "size", size="default", data="")
    size = choose(arguments["size"], ("default", *SIZES), "size of configs/vit_igpt.py")
    if size == "default":
        return small_job(arguments["data"] or "glyphs")
    return published(size, arguments["data"] or "tfds:imagenet2012")


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    config = experiment(
        data=ImageConfig(source, image_size=16, channels=1),
        model=IgptConfig(
            layers=4, width=128, heads=4, mlp_width=512, max_length=256, image_size=16, channels=1, colours=8
        ),
        pretext=IgptPretextConfig(augment=AugmentConfig(crop_area=(1.0, 1.0), flip=0.0)),
    )
    config.steps = 1000
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.beta2 = 0.95
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 500
    config.eval.batches = 32
    config.eval.examples = 8
    config.checkpoint.every_steps = 500
    return config


def published(size: str, source: str) -> ml_collections.ConfigDict:
    """The recipe of one published size."""
    config = experiment(
        data=ImageConfig(source, image_size=32, crop="host", crop_area=(0.35, 1.0)),
        model=IgptConfig(**SIZES[size], dtype="bfloat16"),
        pretext=IgptPretextConfig(),
    )
    config.steps = 1_000_000
    config.batch_size = 128
    config.optimizer.learning_rate = 1e-3 if size == "large" else 3e-3
    config.optimizer.beta2 = 0.95
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = 10_000
    config.eval.batches = 64
    config.checkpoint.every_steps = 10_000
    config.log.every_steps = 100
    return config
