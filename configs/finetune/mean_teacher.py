"""A classifier from few labels and many pictures without (mean teacher, arXiv 1703.01780).

Command:   python -m sslx.finetune --config=configs/finetune/mean_teacher.py --config.init=scratch
Argument:  [data=SOURCE], for example configs/finetune/mean_teacher.py:data=idx:FOLDER
Default:   the scripts of glyphs, of which 100 characters each keep their labels; a small ViT from random parameters.
           --config.init=RUN starts from what was pretrained. --config.task.consistency=0 is the baseline that learns
           from the labels alone.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.images import ImageConfig
from sslx.models.vit import SMALL_PICTURES, VitConfig
from sslx.pretext import recipes
from sslx.tasks.mean_teacher import MeanTeacherConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one set of pictures."""
    source = parse_argument(argument, "data", data="glyphs")["data"]
    divided = source in ("glyphs", "digits") or source.startswith("idx:")
    model = dict(SMALL_PICTURES, patch_size=8)
    config = experiment(
        data=ImageConfig(source, image_size=32, channels=1, test_split="test" if divided else ""),
        model=VitConfig(**model, positions="sincos", init="xavier", pool="mean", image_size=32, channels=1),
        task=MeanTeacherConfig(augment=recipes.GLYPH),
    )
    config.init = "scratch"
    config.steps = 600
    config.batch_size = 128
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 60
    config.eval.every_steps = 200
    config.checkpoint.every_steps = 200
    config.checkpoint.best_metric = "eval/macro_f1"
    config.checkpoint.best_mode = "max"
    return config
