"""Probes an image encoder with its parameters frozen: linear probe, nearest neighbours and few-shot.

Command:  python -m sslx.evaluate --run=runs/vit_mae --config=configs/evaluate/image_probe.py
Argument: [data=SOURCE], for example configs/evaluate/image_probe.py:data=idx:FOLDER
Data:     the scripts of glyphs, whose test characters no face of train has; or another source with labels. A tenth of
          idx:FOLDER's training pictures chooses the settings; images:FOLDER is cut 80 : 10 : 10 at random, whatever
          splits it has (config.data.train_split and so on name them). Size and channels are those of the run.
Beside:   raw pixels, the same architecture with random parameters, and trained on the labels alone for as many steps
          of as many pictures
"""

from pathlib import Path

import ml_collections

from sslx.config import parse_argument, to_config_dict
from sslx.data.images import PictureSet
from sslx.entry import load_config
from sslx.probing.images import ImageProbeConfig

FINETUNING = Path(__file__).parent.parent / "finetune" / "image_classification.py"


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    source = parse_argument(argument, "data", data="glyphs")["data"]
    splits = dict(train_split="train", eval_split="validation", test_split="test")
    if source.startswith("idx:"):
        splits |= dict(train_split="train[:90%]", eval_split="train[90%:]")
    if source.startswith("images:"):
        splits = dict(train_split="train[:80%]", eval_split="train[80%:90%]", test_split="train[90%:]")
    supervised = load_config(FINETUNING)
    # What protects a pretrained encoder only holds back one that begins at random; and not every model has them.
    supervised.optimizer.layer_decay, supervised.task.drop_path = 1.0, 0.0
    config = to_config_dict(ImageProbeConfig(data=PictureSet(source, **splits)))
    given_by_run = ("data", "init", "steps", "batch_size")
    config.supervised = {name: supervised[name] for name in supervised if name not in given_by_run}
    return config
