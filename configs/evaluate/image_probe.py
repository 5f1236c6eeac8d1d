"""Probes an image encoder with its parameters frozen: linear probe, nearest neighbours and few-shot.

Command:  python -m sslx.evaluate --run=runs/vit_mae --config=configs/evaluate/image_probe.py
Argument: [data=SOURCE], for example configs/evaluate/image_probe.py:data=idx:FOLDER
Data:     the scripts of glyphs, whose test characters no face of train has; or another source with labels. A tenth of
          idx:FOLDER's training pictures chooses the settings; images:FOLDER is cut 80 : 10 : 10 at random, whatever
          splits it has (config.data.train_split and so on name them). Size and channels are those of the run.
Beside:   raw pixels, the same architecture with random parameters, and trained on the labels alone for as many steps
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
    config = to_config_dict(ImageProbeConfig(data=PictureSet(source, **splits)))
    config.supervised = {name: supervised[name] for name in supervised if name not in ("data", "init", "steps")}
    return config
