"""Object detection from a pretrained ViT: FCOS's head on its patches, everything is trained.

Command:   python -m sslx.finetune --config=configs/finetune/object_detection.py --config.init=runs/vit_mae
Argument:  [SIZE][,data=SOURCE], for example configs/finetune/object_detection.py:full,data=coco:annotations
           (and --config.data.images=FOLDER, --config.data.image_size=448).
Default:   small: characters of five scripts pasted on photographs, 64 x 64 grey pixels, four at most; one map at the
           patches' own grid, a head of two layers x 64. Characters and photographs of test are in none of train.
Sizes:     small, full (maps at 2, 1 and 1/2 of the grid, a head of four layers x 256).
Own data:  up to 100 objects a picture, and pictures are mirrored.
Note:      The model is the one of the run, at this config's image_size, which fixed positions allow (sincos, rope) and
           learned ones do not. Needs pycocotools (pip install "sslx[detection]").
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.boxes import BoxConfig
from sslx.errors import choose
from sslx.models.vit import SMALL_PICTURES, VitConfig
from sslx.tasks.object_detection import ObjectDetectionConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config; the model is the one of the run that ``config.init`` names."""
    arguments = parse_argument(argument, "size", size="small", data="pasted")
    sizes = ("small", "full")
    small = choose(arguments["size"], sizes, "size of configs/finetune/object_detection.py") == "small"
    shape, own = dict(image_size=64, channels=1), {}
    if arguments["data"] == "pasted":
        own = dict(max_boxes=4, test_split="test")
    config = experiment(
        data=BoxConfig(arguments["data"], **own, **shape),
        model=VitConfig(**SMALL_PICTURES, positions="sincos", init="xavier", pool="mean", **shape),
        task=ObjectDetectionConfig(
            flip=0.0 if own else 0.5,  # a mirrored character is another one
            **(dict(scales=(1.0,), head_layers=2, head_width=64, candidates=200) if small else {}),
        ),
    )
    config.steps = 800
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.layer_decay = 0.8
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.eval.every_steps = 200
    config.eval.examples = 12
    config.checkpoint.every_steps = 200
    config.checkpoint.best_metric = "eval/map"
    config.checkpoint.best_mode = "max"
    return config
