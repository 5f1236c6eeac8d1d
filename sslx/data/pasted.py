"""An embedded set for detection and segmentation: characters pasted on photographs, with exact boxes and masks.

It needs no download. A picture is a part of one of the two photographs that scikit-learn ships, with one to four
characters of matplotlib's fonts (`glyphs`) on it: of any size from a fifth to nearly a half of the picture's side, in a
colour that stands out from what is under it, none on top of another. Their classes are five scripts. Nothing is shared
by two splits: characters are divided as `glyphs` divides them, and each split has its own part of the photographs.

In: a cache folder and the side of the pictures. Out: `Pasted`, arrays mapped from files. Two machines with the same
versions of matplotlib, Pillow, scikit-learn and NumPy hold the same pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
from pathlib import Path

import numpy as np
from PIL import Image

from sslx.augment.colour import LUMA
from sslx.data import glyphs as glyph_set
from sslx.data.cache import hash_of, prepare_once

# Raise this whenever the code below would make other pictures from the same characters.
_RECIPE = 1

SCRIPTS = ("Arabic", "Braille", "Canadian Aboriginal", "Georgian", "Latin")
PICTURES = {"train": 4000, "validation": 400, "test": 800}
MOST = 4  # characters on a picture
SIDES = (0.2, 0.45)  # of a character's longer side, as shares of the picture's
INK = 64  # of 255: from here on a pixel belongs to the character
CONTRAST = 90  # of 255, between the character's luma and the mean of what is under it
LEAST_CUT = 48  # pixels of the photograph that a picture shows at least, along a side
# Each split's columns of the photographs, as shares of their width.
COLUMNS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}


@dataclasses.dataclass(frozen=True, eq=False)
class Pasted:
    """All pictures, ordered by split."""

    images: np.ndarray  # uint8[rows, side, side, 3], mapped
    masks: np.ndarray  # uint8[rows, side, side], mapped: 0, or one more than the class of the character there
    boxes: np.ndarray  # float32[rows, MOST, 4]: left, top, right, bottom in pixels; zeros where there is none
    classes: np.ndarray  # int32[rows, MOST], -1 where there is none
    bounds: dict[str, tuple[int, int]]  # first row of a split and the one after its last


def pasted(cache_dir: str | os.PathLike[str], side: int) -> Pasted:
    """Returns the pictures; makes them under ``cache_dir`` the first time (a few seconds).

    Raises:
      UserError: the folder cannot be written.
    """
    folder = prepare_once(Path(cache_dir), f"pasted-{fingerprint(side)}", functools.partial(_build, cache_dir, side))
    ends = np.cumsum(list(PICTURES.values())).tolist()
    bounds = dict(zip(PICTURES, zip([0, *ends[:-1]], ends, strict=True), strict=True))
    with np.load(folder / "boxes.npz") as stored:
        boxes, classes = stored["boxes"], stored["classes"]
    images, masks = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "masks"))
    return Pasted(images, masks, boxes, classes, bounds)


def fingerprint(side: int) -> str:
    """Returns hex digits that change with whatever decides the pictures."""
    versions = [importlib.metadata.version(name) for name in ("scikit-learn", "numpy")]
    return hash_of("pasted", _RECIPE, glyph_set.fingerprint(), versions, side, SCRIPTS, PICTURES)


def _build(cache_dir: str | os.PathLike[str], side: int, folder: Path) -> None:
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    made = glyph_set.glyphs(cache_dir)
    rows = sum(PICTURES.values())
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (rows, side, side, 3))
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, (rows, side, side))
    boxes, classes = np.zeros((rows, MOST, 4), np.float32), np.full((rows, MOST), -1, np.int32)
    row = 0
    for split, count in PICTURES.items():
        first, end = made.bounds[split]
        scripts = made.labels["script"][first:end]
        of_class = [first + np.flatnonzero(scripts == made.names["script"].index(name)) for name in SCRIPTS]
        edges = COLUMNS[split]
        parts = [p[:, slice(*(round(edge * p.shape[1]) for edge in edges))] for p in photographs]
        for _ in range(count):
            draw = np.random.default_rng([_RECIPE, row])
            image, mask, here = _picture(draw, parts, made.images, of_class, side)
            images[row], masks[row] = image, mask
            for place, (kind, box) in enumerate(here):
                boxes[row, place], classes[row, place] = box, kind
            row += 1
    images.flush()
    masks.flush()
    np.savez(folder / "boxes.npz", boxes=boxes, classes=classes)


def _picture(
    draw: np.random.Generator, parts: list[np.ndarray], drawn: np.ndarray, of_class: list[np.ndarray], side: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """One picture, its mask, and the class and box of each character."""
    image = _background(draw, parts[draw.integers(len(parts))], side)
    mask, found = np.zeros((side, side), np.uint8), []
    for _ in range(draw.integers(1, MOST + 1)):
        kind = int(draw.integers(len(of_class)))
        ink = _sized(drawn[draw.choice(of_class[kind])][..., 0], round(side * draw.uniform(*SIDES)))
        high, wide = ink.shape
        for _ in range(20):  # on a full picture there may be no place left
            top, left = int(draw.integers(side - high + 1)), int(draw.integers(side - wide + 1))
            under = (slice(top, top + high), slice(left, left + wide))
            # A pixel of distance, so that what touches is not one shape.
            around = (slice(max(0, top - 1), top + high + 1), slice(max(0, left - 1), left + wide + 1))
            if not _overlaps(found, around):
                break
        else:
            continue
        shape = ink >= INK
        rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
        colour = _colour(draw, image[under].reshape(-1, 3).mean(0) @ np.array(LUMA))
        share = (ink / 255.0)[..., None]
        image[under] = share * colour + (1 - share) * image[under]
        mask[under][shape] = kind + 1
        box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        found.append((kind, tuple(map(int, box))))
    return np.round(image).astype(np.uint8), mask, found


def _overlaps(found: list, around: tuple[slice, slice]) -> bool:
    rows, columns = around
    return any(
        left < columns.stop and columns.start < right and top < rows.stop and rows.start < bottom
        for _, (left, top, right, bottom) in found
    )


def _background(draw: np.random.Generator, photograph: np.ndarray, side: int) -> np.ndarray:
    """A square part of a photograph, float64[side, side, 3]."""
    most = min(photograph.shape[:2])
    cut = int(draw.integers(min(LEAST_CUT, most), most + 1))
    top, left = (int(draw.integers(extent - cut + 1)) for extent in photograph.shape[:2])
    part = Image.fromarray(np.ascontiguousarray(photograph[top : top + cut, left : left + cut]))
    part = part.resize((side, side), Image.Resampling.BICUBIC)
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part
    return np.asarray(part).astype(np.float64)


def _sized(picture: np.ndarray, longer: int) -> np.ndarray:
    """A character's ink without the margin, its longer side of so many pixels."""
    rows, columns = np.flatnonzero(picture.max(1) >= INK), np.flatnonzero(picture.max(0) >= INK)
    ink = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    high, wide = (max(3, round(extent * longer / max(ink.shape))) for extent in ink.shape)
    small = np.asarray(Image.fromarray(np.ascontiguousarray(ink)).resize((wide, high), Image.Resampling.BICUBIC))
    return np.round(small * (255.0 / small.max())).astype(np.uint8)  # a thin stroke made smaller is pale


def _colour(draw: np.random.Generator, under: float) -> np.ndarray:
    """A random colour whose luma is far from that of what is under it."""
    while True:
        colour = draw.uniform(0, 255, 3)
        if abs(colour @ np.array(LUMA) - under) >= CONTRAST:
            return colour
