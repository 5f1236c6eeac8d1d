"""Pictures side by side on one sheet, for a person to judge: a row for each example, a titled column for each kind."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 96  # pixels of a picture on the sheet; a smaller one is enlarged by a whole factor
GAP, TITLE, SWATCH = 4, 16, 10
PAPER = (255, 255, 255)


def sheet(
    columns: Mapping[str, np.ndarray],
    *,
    across: int = 1,
    heading: str = "",
    key: Mapping[str, tuple[int, int, int]] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a sheet.

    Args:
      columns: By title, pictures uint8 or float in [0, 1], ``[examples, height, width, 1 or 3]``.
      across: How many examples stand beside each other.
      heading: Stands above all of it.
      key: What the colours of a picture mean, by name; stands below.
    """
    tiles = {title: _rgb(np.asarray(images)) for title, images in columns.items()}
    count = min(len(images) for images in tiles.values())
    factor = max(1, -(-LEAST_SIDE // max(max(images.shape[1:3]) for images in tiles.values())))
    tiles = {title: images.repeat(factor, axis=1).repeat(factor, axis=2) for title, images in tiles.items()}
    high, wide = (max(images.shape[axis] for images in tiles.values()) + GAP for axis in (1, 2))
    across = max(1, min(across, count))
    top = TITLE if heading else 0
    font = ImageFont.load_default(11)
    width, end = across * len(tiles) * wide + GAP, -(-count // across) * high + top + TITLE + GAP
    places = _places([font.getlength(name) for name in key or ()], width)
    canvas = Image.new("RGB", (width, end + (places[-1][1] + TITLE if places else 0)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for (name, colour), (left, below) in zip((key or {}).items(), places, strict=True):
        draw.rectangle((left, end + below + 2, left + SWATCH, end + below + 2 + SWATCH), fill=colour, outline=(0, 0, 0))
        draw.text((left + SWATCH + GAP, end + below + 1), name, fill=(0, 0, 0), font=font)
    draw.text((GAP, 2), heading, fill=(0, 0, 0), font=font)
    for place in range(across * len(tiles)):
        draw.text((GAP + place * wide, top + 2), list(tiles)[place % len(tiles)], fill=(0, 0, 0), font=font)
    for example in range(count):
        row, group = divmod(example, across)
        for column, images in enumerate(tiles.values()):
            at = (GAP + (group * len(tiles) + column) * wide, top + TITLE + row * high)
            canvas.paste(Image.fromarray(images[example]), at)
    return np.asarray(canvas)


def _places(lengths: list[float], width: int) -> list[tuple[int, int]]:
    """Where the entries of a key begin, from the left and from its top, in lines no longer than ``width``."""
    places, left, below = [], GAP, 0
    for length in lengths:
        whole = round(SWATCH + length) + 4 * GAP
        if left > GAP and left + whole > width:
            left, below = GAP, below + TITLE
        places.append((left, below))
        left += whole
    return places


def _rgb(images: np.ndarray) -> UInt8[np.ndarray, "examples height width 3"]:
    if not np.issubdtype(images.dtype, np.integer):
        images = np.round(np.clip(images, 0.0, 1.0) * 255)
    images = images.astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:-1], 3)))
