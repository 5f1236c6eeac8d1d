"""Probes an image encoder with its parameters frozen: linear probe, nearest neighbours and few-shot.

Command:  python -m sslx.evaluate --run=runs/vit_mae --config=configs/evaluate/image_probe.py
Argument: [data=SOURCE][,size=N][,channels=1|3], for example configs/evaluate/image_probe.py:data=idx:FOLDER,size=28
Data:     the scripts of glyphs, whose test characters no face of train has; or another source with labels
Beside:   raw pixels, the same architecture with random parameters, and trained on the labels alone for as many steps
          of as many pictures
"""

from pathlib import Path

import ml_collections

from sslx.config import parse_argument, to_config_dict
from sslx.data.images import ImageConfig
from sslx.entry import load_config
from sslx.errors import UserError
from sslx.probing.images import ImageProbeConfig

FINETUNING = Path(__file__).parent.parent / "finetune" / "image_classification.py"


def number(arguments: dict[str, str], name: str) -> int:
    """One of the arguments as a number."""
    if not arguments[name].isdecimal():
        raise UserError(f"{name} of configs/evaluate/image_probe.py is {arguments[name]!r}; expected a number")
    return int(arguments[name])


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    arguments = parse_argument(argument, "data", data="glyphs", size="32", channels="1")
    splits = dict(train_split="train", eval_split="validation", test_split="test")
    if arguments["data"].startswith("idx:"):
        splits |= dict(train_split="train[:90%]", eval_split="train[90%:]")
    data = ImageConfig(
        arguments["data"], image_size=number(arguments, "size"), channels=number(arguments, "channels"), **splits
    )
    supervised = load_config(FINETUNING)
    # What protects a pretrained encoder only holds back one that begins at random; and not every model has them.
    supervised.optimizer.layer_decay, supervised.task.drop_path = 1.0, 0.0
    config = to_config_dict(ImageProbeConfig(data=data))
    config.supervised = {
        name: supervised[name] for name in supervised if name not in ("data", "init", "steps", "batch_size")
    }
    return config
