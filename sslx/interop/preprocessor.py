"""How pictures become what a model takes, as transformers has it: ``preprocessor_config.json``.

In: an image model and where its pictures were cut from. Out: the settings of the processor that resizes the shorter
side and cuts the middle out, as held-out rows are made here. The way back: mean and deviation of the pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslx.data.images import held_out_share
from sslx.errors import UserError
from sslx.models.vit import VitConfig

FILE = "preprocessor_config.json"
BICUBIC = 3  # Pillow's number


def write(model: VitConfig, data: Mapping[str, Any], folder: Path) -> None:
    """Writes the file of a model that was trained on ``config.data``."""
    size, colours = model.image_size, model.channels
    values = {
        "image_processor_type": "BitImageProcessor",  # ViT's own would squeeze what is no square
        "do_convert_rgb": colours == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(size / held_out_share(data.get("crop", "step")))},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **{
            f"image_{name}": list(given) * (colours // len(given))  # one value may stand for all channels
            for name, given in (("mean", model.pixel_mean), ("std", model.pixel_std))
        },
    }
    (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")


def pixel_statistics(folder: Path, name: str) -> dict[str, tuple[float, ...]]:
    """``pixel_mean`` and ``pixel_std`` of a folder's pictures; {} where no file says anything of them.

    Args:
      folder: Where the file may be.
      name: How the user calls it.

    Raises:
      UserError: the file is damaged, or pixels are not brought to [0, 1] first.
    """
    if not (folder / FILE).is_file():
        return {}
    try:
        given = json.loads((folder / FILE).read_text(encoding="utf8"))
        factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
        unit = abs(factor * 255 - 1) < 1e-6
        found = {"pixel_mean": (0.0,), "pixel_std": (1.0,)}
        if given.get("do_normalize", True):
            keys = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
            found = {ours: tuple(map(float, given[key])) for ours, key in keys.items() if key in given}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{name}/{FILE} is damaged; expected JSON with image_mean and image_std") from None
    if not unit:
        raise UserError(f"{name}/{FILE} is of a kind that sslx does not compute: rescale_factor (expected 1/255)")
    return found
