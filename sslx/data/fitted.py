"""Pictures brought to a square whole, as detection and segmentation need them: nothing is cut off or stretched.

In: a source of encoded pictures. Out: pixels uint8[size, size, channels]: the longer side has ``size`` pixels, the
picture lies at the left and the top, and the rest is grey. They are decoded each time they are read. At preparation
every picture is looked at once; one that cannot be decoded is named, counted and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sslx.data.decoding import decoders, looked_at, still_decodable
from sslx.data.pictures import open_picture, pixels
from sslx.data.prepared import PictureSource, check_shape
from sslx.data.rows import RowOrder
from sslx.data.sources import Source

PADDING = 127  # where there is no picture


@dataclass(frozen=True)
class FittedConfig(PictureSource):
    """What ``config.data`` of detection and of segmentation have in common."""

    source: str = "pasted"
    image_size: int = 64  # height and width of a row
    channels: int = 3  # 3: RGB | 1: grey

    def __post_init__(self):
        super().__post_init__()
        check_shape(self.image_size, self.channels)


class FittedRows:
    """Random access to fitted pictures, with what a subclass knows of each."""

    def __init__(self, source: Source, kept: np.ndarray, config: FittedConfig):
        self._source, self._kept, self._config = source, kept, config

    def __len__(self) -> int:
        return len(self._kept)

    def order(self, seed: int) -> RowOrder:
        """Returns the order in which training takes the rows."""
        return RowOrder(len(self), seed)

    def _decoded(self, ids: np.ndarray, one: Callable[[dict[str, Any], Image.Image], Any]) -> list[Any]:
        """``one(record, picture)`` of rows."""

        def decode(record: dict[str, Any]) -> Any:
            with still_decodable(record):
                picture = open_picture(record["image"], self._config.channels, least=self._config.image_size)
            return one(record, picture)

        return list(decoders().map(decode, self._source.__getitems__(self._kept[ids].tolist())))


def scale_of(shape: tuple[int, int], size: int) -> float:
    """Pixels of a row for each of a picture of ``shape`` (its two sides, in any order)."""
    return size / max(shape)


def fitted(picture: Image.Image, size: int) -> UInt8[np.ndarray, "size size channels"]:
    """The whole picture, its longer side of ``size`` pixels."""
    array = pixels(_resized(picture, size, Image.Resampling.BICUBIC))
    canvas = np.full((size, size, array.shape[-1]), PADDING, np.uint8)
    canvas[: array.shape[0], : array.shape[1]] = array
    return canvas


def fitted_mask(mask: Image.Image, size: int, beyond: int) -> UInt8[np.ndarray, "size size"]:
    """Numbers of classes in the same places, each pixel's the nearest one's; ``beyond`` where there is no picture."""
    array = np.asarray(_resized(mask, size, Image.Resampling.NEAREST))
    canvas = np.full((size, size), beyond, np.uint8)
    canvas[: array.shape[0], : array.shape[1]] = array
    return canvas


def look(
    source: Source, config: FittedConfig, note: Callable[[dict[str, Any], Image.Image], Any]
) -> tuple[np.ndarray, list[Any], list[str]]:
    """Decodes every picture of a slice once.

    Args:
      source: The slice.
      config: As it was written.
      note: What is to be known of a record and its picture; it may raise `BrokenPicture`.

    Returns:
      The records that can be decoded (int64), what was noted of each, and what is said of the others.

    Raises:
      UserError: more than ``broken_share`` cannot be decoded.
    """

    def opened(record: dict[str, Any]) -> Any:
        return note(record, open_picture(record["image"], config.channels))

    broken: list[str] = []
    found = [(i, noted) for i, _, noted in looked_at(source, config.broken_share, opened, broken)]
    return np.array([i for i, _ in found], np.int64), [noted for _, noted in found], broken


def _resized(picture: Image.Image, size: int, method: Image.Resampling) -> Image.Image:
    scale = scale_of(picture.size, size)
    wide, high = (max(1, round(extent * scale)) for extent in picture.size)
    if picture.size == (wide, high):
        return picture
    gap = None if method == Image.Resampling.NEAREST else 3.0
    return picture.resize((wide, high), method, reducing_gap=gap)
