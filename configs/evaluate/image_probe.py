"""Probes an image encoder with its parameters frozen: linear probe, nearest neighbours and few-shot.

Command:  python -m sslx.evaluate --run=runs/vit_mae --config=configs/evaluate/image_probe.py
Argument: [data=SOURCE][,size=N][,channels=1|3], for example configs/evaluate/image_probe.py:data=idx:FOLDER,size=28
Data:     the scripts of glyphs, whose test characters no face of train has; or another source with labels
Beside:   raw pixels, the same architecture with random parameters, and trained on the labels alone for as many steps
"""

from pathlib import Path

import ml_collections

from sslx.config import parse_argument, to_config_dict
from sslx.data.images import ImageConfig
from sslx.entry import load_config
from sslx.probing.images import ImageProbeConfig

FINETUNING = Path(__file__).parent.parent / "finetune" / "image_classification.py"


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    arguments = parse_argument(argument, "data", data="glyphs", size="32", channels="1")
    splits = dict(train_split="train", eval_split="validation", test_split="test")
    if arguments["data"].startswith("idx:"):
        splits |= dict(train_split="train[:90%]", eval_split="train[90%:]")
    data = ImageConfig(
        arguments["data"], image_size=int(arguments["size"]), channels=int(arguments["channels"]), **splits
    )
    supervised = load_config(FINETUNING)
    config = to_config_dict(ImageProbeConfig(data=data))
    config.supervised = {name: supervised[name] for name in supervised if name not in ("data", "init", "steps")}
    return config
