"""Semantic segmentation from a pretrained ViT: a linear head on its patches.

Command:   python -m sslx.finetune --config=configs/finetune/segmentation.py --config.init=runs/vit_mae
Argument:  [HOW][,data=SOURCE], for example configs/finetune/segmentation.py:linear,data=masks:pictures
           (and --config.data.masks=FOLDER, --config.data.image_size=224).
How:       full (default) trains everything, rates fall by 0.8 a layer. linear trains the head on the frozen encoder.
Default:   characters of five scripts pasted on photographs, 64 x 64 grey pixels, and the background. Characters and
           photographs of test are in none of train.
Note:      The model is the one of the run, at this config's image_size, which fixed positions allow (sincos, rope) and
           learned ones do not.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.masks import MaskConfig
from sslx.errors import choose
from sslx.models.vit import SMALL_PICTURES, VitConfig
from sslx.tasks.segmentation import SegmentationConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config; the model is the one of the run that ``config.init`` names."""
    arguments = parse_argument(argument, "how", how="full", data="pasted")
    full = choose(arguments["how"], ("full", "linear"), "way of configs/finetune/segmentation.py") == "full"
    embedded = arguments["data"] == "pasted"
    shape = dict(image_size=64, channels=1)
    config = experiment(
        data=MaskConfig(arguments["data"], test_split="test" if embedded else "", **shape),
        model=VitConfig(**SMALL_PICTURES, positions="sincos", init="xavier", pool="mean", **shape),
        task=SegmentationConfig(flip=0.0 if embedded else 0.5),  # a mirrored character is another one
    )
    config.steps = 600
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-3 if full else 3e-3
    config.optimizer.layer_decay = 0.8 if full else 1.0
    config.optimizer.freeze = () if full else ("^encoder/",)
    config.optimizer.weight_decay = 0.05 if full else 0.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.eval.every_steps = 200
    config.eval.examples = 12
    config.checkpoint.every_steps = 200
    config.checkpoint.best_metric = "eval/miou"
    config.checkpoint.best_mode = "max"
    return config
