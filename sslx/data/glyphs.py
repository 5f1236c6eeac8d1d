"""An embedded set of pictures: every named character of the fonts that matplotlib ships, in 13 faces.

It needs no download. What a row is: one character in one face, 32 by 32 grey pixels, light on dark. Its caption is the
character's Unicode name and the face; its labels are the script, the general category and the face. Characters are
divided, not pictures: those of validation and test are in no face of train, and characters that look the same in some
face (Latin A, Greek Alpha) stay together, so that a probe is asked about shapes that the encoder has never seen.

In: a cache folder. Out: `Glyphs`, arrays mapped from files. Two machines with the same versions of matplotlib and
Pillow hold the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import unicodedata
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from fontTools.unicodedata import script, script_name
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sslx.data.cache import hash_of, prepare_once

# Raise this whenever the code below would make other pictures from the same fonts.
_RECIPE = 2

SIZE = 32
INK = 28  # pixels that the longer side of a character may have
SIZES = range(8, 29)  # of a face; the largest that fits is drawn, so a full stop stays small
FACES = {
    **{
        f"DejaVu {family} {style}".strip(): f"DejaVu{family.replace(' ', '')}{suffix}.ttf"
        for family, styles in {
            "Sans": {"": "", "Bold": "-Bold", "Oblique": "-Oblique", "Bold Oblique": "-BoldOblique"},
            "Sans Mono": {"": "", "Bold": "-Bold", "Oblique": "-Oblique", "Bold Oblique": "-BoldOblique"},
            "Serif": {"": "", "Bold": "-Bold", "Italic": "-Italic", "Bold Italic": "-BoldItalic"},
        }.items()
        for style, suffix in styles.items()
    },
    "STIX General": "STIXGeneral.ttf",
}
SPLITS = {"train": 0.8, "validation": 0.08, "test": 0.12}
# Scripts of fewer characters are one label: in a small one, validation and test would have two or three.
LEAST_OF_SCRIPT = 40
OTHER = "other"
LABELS = ("script", "category", "face")
# Blanks, controls, marks that stand on another character, surrogates and private characters have no shape of their own.
_WITHOUT_SHAPE = ("Z", "C", "Mn")
CATEGORIES = {
    "Lu": "capital letter",
    "Ll": "small letter",
    "Lt": "title letter",
    "Lm": "modifier letter",
    "Lo": "other letter",
    "Nd": "digit",
    "Nl": "letter number",
    "No": "other number",
    "Pc": "connector",
    "Pd": "dash",
    "Ps": "opening bracket",
    "Pe": "closing bracket",
    "Pi": "opening quote",
    "Pf": "closing quote",
    "Po": "other punctuation",
    "Sm": "mathematical symbol",
    "Sc": "currency symbol",
    "Sk": "modifier symbol",
    "So": "other symbol",
    "Mc": "spacing mark",
    "Me": "enclosing mark",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Glyphs:
    """All pictures, ordered by split; rows of a split are in random order."""

    images: np.ndarray  # uint8[rows, 32, 32, 1], mapped
    characters: np.ndarray  # int32[rows], code points
    labels: dict[str, np.ndarray]  # int32[rows] by name, of `LABELS`
    names: dict[str, tuple[str, ...]]  # of each label's classes
    bounds: dict[str, tuple[int, int]]  # first row of a split and the one after its last

    def caption(self, row: int) -> str:
        """``GREEK SMALL LETTER ALPHA, DejaVu Sans Bold``."""
        face = self.names["face"][self.labels["face"][row]]
        return f"{unicodedata.name(chr(self.characters[row]))}, {face}"


def glyphs(cache_dir: str | os.PathLike[str]) -> Glyphs:
    """Returns the pictures; draws them under ``cache_dir`` the first time (10 s, 50 MB).

    Raises:
      UserError: the folder cannot be written.
    """
    folder = prepare_once(Path(cache_dir), f"glyphs-{fingerprint()}", _build)
    with np.load(folder / "rows.npz") as stored:
        rows = dict(stored)
    return Glyphs(
        images=np.load(folder / "images.npy", mmap_mode="r"),
        characters=rows["characters"],
        labels={name: rows[name] for name in LABELS},
        names={name: tuple(rows[f"{name}_names"].tolist()) for name in LABELS},
        bounds={name: tuple(bounds) for name, bounds in zip(SPLITS, rows["bounds"].tolist(), strict=True)},
    )


def fingerprint() -> str:
    """Returns hex digits that change with whatever decides the pictures."""
    versions = [importlib.metadata.version(name) for name in ("matplotlib", "pillow", "fonttools")]
    return hash_of("glyphs", _RECIPE, unicodedata.unidata_version, versions)


def _build(folder: Path) -> None:
    images, characters, faces = _drawn()
    known, which = np.unique(characters, return_inverse=True)
    scripts = np.array([script_name(script(chr(c))) for c in known])
    names, counts = np.unique(scripts, return_counts=True)
    scripts = np.where(np.isin(scripts, names[counts >= LEAST_OF_SCRIPT]), scripts, OTHER)
    found = {
        "script": scripts[which],
        "category": np.array([CATEGORIES[unicodedata.category(chr(c))] for c in known])[which],
        "face": np.array(list(FACES))[faces],
    }
    splits = _splits(known, scripts, _look_alikes(images, which))[which]
    shuffled = np.random.default_rng(_RECIPE).permutation(len(characters))
    order = shuffled[np.argsort(splits[shuffled], kind="stable")]
    ends = np.cumsum(np.bincount(splits, minlength=len(SPLITS)))
    rows = {"characters": characters[order].astype(np.int32), "bounds": np.stack([np.append(0, ends[:-1]), ends], 1)}
    for name, values in found.items():
        rows[f"{name}_names"], ids = np.unique(values, return_inverse=True)
        rows[name] = ids[order].astype(np.int32)
    np.save(folder / "images.npy", images[order])
    np.savez(folder / "rows.npz", **rows)


def _drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every named character of every face: pictures, code points, and numbers of faces."""
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, characters, faces = [], [], []
    for number, file in enumerate(FACES.values()):
        with TTFont(fonts / file, lazy=True) as font:
            available = sorted(font.getBestCmap())
        drawing = _Face(fonts / file)
        for character in map(chr, available):
            if unicodedata.name(character, "") and not unicodedata.category(character).startswith(_WITHOUT_SHAPE):
                picture = drawing(character)
                if picture.any():  # some have a name and no ink, such as an empty braille cell
                    images.append(picture)
                    characters.append(ord(character))
                    faces.append(number)
    return np.stack(images)[..., None], np.array(characters), np.array(faces)


class _Face:
    """Draws characters of one face, each as large as fits, in the middle."""

    def __init__(self, file: Path):
        self._at = [ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC) for size in SIZES]

    def __call__(self, character: str) -> np.ndarray:
        left, top, right, bottom = box = self._box(len(SIZES) - 1, character)
        at = len(SIZES) - 1
        if _extent(box) > INK:
            # Extents are proportional to the size but for hinting: begin a little above what should fit.
            at = min(at, max(0, SIZES[-1] * INK // _extent(box) + 2 - SIZES[0]))
            while at and _extent(self._box(at, character)) > INK:
                at -= 1
            left, top, right, bottom = self._box(at, character)
        canvas = Image.new("L", (SIZE, SIZE))
        place = (SIZE - (right - left)) / 2 - left, (SIZE - (bottom - top)) / 2 - top
        ImageDraw.Draw(canvas).text(tuple(map(round, place)), character, fill=255, font=self._at[at], anchor="ls")
        # Boxes count the width to the next character in, which says nothing: the ink is what is to be in the middle.
        ink = canvas.crop(canvas.getbbox())
        middle = Image.new("L", (SIZE, SIZE))
        middle.paste(ink, ((SIZE - ink.width) // 2, (SIZE - ink.height) // 2))
        return np.asarray(middle)

    def _box(self, at: int, character: str) -> tuple[int, int, int, int]:
        return tuple(map(round, self._at[at].getbbox(character, anchor="ls")))


def _extent(box: tuple[int, int, int, int]) -> int:
    """The longer side of left, top, right, bottom."""
    return max(box[2] - box[0], box[3] - box[1])


def _look_alikes(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    """int[characters]: for each character the first of those that share a picture with it, directly or by others.

    ``which`` int[pictures] is the character of each picture.
    """
    seen: dict[bytes, int] = {}  # np.unique of rows is a hundred times as slow
    same = np.array([seen.setdefault(image.tobytes(), len(seen)) for image in images])
    count = which.max() + 1
    edges = np.ones(len(which), bool), (which, count + same)
    size = count + len(seen)
    group = connected_components(coo_array(edges, shape=(size, size)), directed=False)[1][:count]
    _, first, of = np.unique(group, return_index=True, return_inverse=True)
    return first[of]


def _splits(characters: np.ndarray, scripts: np.ndarray, leaders: np.ndarray) -> np.ndarray:
    """The number of each character's split: those of each script are dealt in the order of their leaders' hashes."""
    splits = np.empty(len(characters), int)
    for name in np.unique(scripts):
        (members,) = np.nonzero(scripts[leaders] == name)
        members = np.array(sorted(members, key=lambda i: (_hash(characters[leaders[i]]), i)))
        edges = np.round(np.cumsum(list(SPLITS.values())) * len(members)).astype(int)
        place = np.arange(len(members))
        splits[members] = np.searchsorted(edges, place, side="right")
    return splits[leaders]  # all that look alike go where the first of them goes


def _hash(character: int) -> bytes:
    return hashlib.blake2b(f"glyphs {character}".encode()).digest()
