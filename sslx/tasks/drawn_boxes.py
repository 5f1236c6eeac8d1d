"""Boxes and classes drawn on pictures, for a person to judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

SIDE = 192  # pixels that a drawn picture has at least, so that a name can be read
LETTERS = 12  # of a class's name


def colour_of(number: int) -> tuple[int, int, int]:
    """The same colour for a class wherever it is drawn, bright on most photographs."""
    return tuple(round(255 * value) for value in colormaps["tab10"](number % 10)[:3])


def drawn_boxes(
    picture: UInt8[np.ndarray, "height width channels"],
    boxes: Float[np.ndarray, "n 4"],
    classes: Int[np.ndarray, " n"],
    names: Sequence[str],
    scores: Float[np.ndarray, " n"] | None = None,
) -> UInt8[np.ndarray, "tall wide 3"]:
    """The picture, enlarged by a whole factor if it is small, with its boxes, their classes and perhaps scores.

    Args:
      picture: Pixels.
      boxes: In shares of the picture's sides.
      classes: Numbers of names.
      names: Of all classes.
      scores: Shares, written as percentages.
    """
    factor = max(1, -(-SIDE // max(picture.shape[:2])))
    large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    canvas = Image.fromarray(np.ascontiguousarray(np.broadcast_to(large, (*large.shape[:2], 3))))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for number, (box, kind) in enumerate(zip(boxes, classes, strict=True)):
        colour = colour_of(int(kind))
        left, top, right, bottom = box * np.tile([canvas.width, canvas.height], 2)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        name = names[int(kind)][:LETTERS] + (f" {100 * scores[number]:.0f}" if scores is not None else "")
        wide, high = draw.textbbox((0, 0), name, font=font)[2:]
        at = min(max(0, left), max(0, canvas.width - wide - 2)), (top - high - 2 if top > high else bottom)
        draw.rectangle((*at, at[0] + wide + 1, at[1] + high + 1), fill=colour)
        draw.text((at[0] + 1, at[1]), name, fill=(255, 255, 255), font=font)
    return np.asarray(canvas)


def sheet_figure(drawn: UInt8[np.ndarray, "height width 3"]) -> Figure:
    """A sheet as a figure of a report, pixel for pixel."""
    high, wide = drawn.shape[:2]
    figure = Figure(figsize=(wide / 100, high / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(drawn, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure
