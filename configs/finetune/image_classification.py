"""Image classification from a pretrained encoder: a whole fine-tuning, or a linear probe of the frozen encoder.

Command:   python -m sslx.finetune --config=configs/finetune/image_classification.py --config.init=runs/vit_mae
Argument:  [HOW][,data=SOURCE], for example configs/finetune/image_classification.py:linear,data=idx:FOLDER
How:       full (default) trains everything: rates fall by 0.75 a layer, drop path 0.1, label smoothing 0.1, a moving
           average of the parameters is evaluated. linear freezes the encoder and trains the head alone, on features
           that the batch normalises.
Default:   the scripts of glyphs; characters of validation and test are in none of the 13 faces of train. Of images: and
           tfds: sources the report is on the held-out rows, unless config.data.test_split names others.
"""

import ml_collections

from sslx.augment.policy import AugmentConfig
from sslx.config import experiment, parse_argument
from sslx.data.images import ImageConfig
from sslx.errors import choose
from sslx.models.vit import SMALL_PICTURES, VitConfig
from sslx.tasks.image_classification import ImageClassificationConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config; the model is the one of the run that ``config.init`` names."""
    arguments = parse_argument(argument, "how", how="full", data="glyphs")
    full = choose(arguments["how"], ("full", "linear"), "way of configs/finetune/image_classification.py") == "full"
    divided = arguments["data"] in ("glyphs", "digits") or arguments["data"].startswith("idx:")
    view = AugmentConfig(crop_area=(0.6, 1.0), flip=0.0)
    config = experiment(
        data=ImageConfig(arguments["data"], image_size=32, channels=1, test_split="test" if divided else ""),
        model=VitConfig(**SMALL_PICTURES, positions="sincos", init="xavier", pool="mean", image_size=32, channels=1),
        task=ImageClassificationConfig(drop_path=0.1, label_smoothing=0.1, ema=0.99, augment=view)
        if full
        else ImageClassificationConfig(probe=True, augment=view),
    )
    config.steps = 1000
    config.batch_size = 128
    config.optimizer.learning_rate = 1e-3 if full else 3e-3
    config.optimizer.layer_decay = 0.75 if full else 1.0
    config.optimizer.freeze = () if full else ("^encoder/",)
    config.optimizer.weight_decay = 0.05 if full else 0.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 250
    config.checkpoint.best_metric = "eval/macro_f1"
    config.checkpoint.best_mode = "max"
    return config
