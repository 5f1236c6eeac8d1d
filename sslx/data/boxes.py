"""Pictures with boxes: from a config to rows ready for training.

In: a `BoxConfig`, whose source is ``pasted`` (embedded; see `pasted`) or ``coco:FILES`` with ``images``, the folder of
the pictures. Out: `PreparedPictures`, whose rows are whole pictures brought to one size (see `fitted`) with a fixed
number of boxes in the row's pixels. A picture of another size than its annotations say is left out as an undecodable
one is. A box that reaches beyond its picture is clipped and counted; one of which nothing is left is dropped and
counted, and so are the smallest beyond ``max_boxes``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64
from PIL import Image

from sslx.data.cache import cache_folder, hash_of, prepare_once
from sslx.data.coco import open_coco
from sslx.data.decoding import say_broken
from sslx.data.fitted import FittedConfig, FittedRows, fitted, look, scale_of
from sslx.data.pasted import SCRIPTS, Pasted, fingerprint, pasted
from sslx.data.pictures import BrokenPicture
from sslx.data.prepared import PreparedPictures, prepare_roles
from sslx.data.sources import Collection, Source
from sslx.errors import UserError, nearest

SPEC_FORMS = ("pasted", "coco:FILES")
NOTHING, OBJECT, CROWD = 0, 1, 2  # what an entry of ``kind`` says of a box
# Raise this whenever the same files would come out as other rows.
_RECIPE = 2


@dataclass(frozen=True)
class BoxConfig(FittedConfig):
    """``config.data`` of object detection."""

    images: str = ""  # of coco: the folder of the pictures
    max_boxes: int = 100  # in one picture

    def __post_init__(self):
        super().__post_init__()
        if self.max_boxes < 1:
            raise UserError(f"config.data.max_boxes is {self.max_boxes}; expected at least 1")


class BoxRows(FittedRows):
    """Rows of pictures and boxes; ``table`` has what `abstract_box_row` describes but the picture."""

    def __init__(self, source: Source, kept: np.ndarray, table: dict[str, np.ndarray], config: BoxConfig):
        super().__init__(source, kept, config)
        self.table = table

    def fetch(self, row_ids: Int64[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Reads rows: ``image`` uint8[n, size, size, channels] and the entries of `abstract_box_row`."""
        ids = np.asarray(row_ids, np.int64)
        images = self._decoded(ids, lambda record, picture: fitted(picture, self._config.image_size))
        return {"image": np.stack(images)} | {name: column[ids] for name, column in self.table.items()}


class PastedRecords:
    """One split of the embedded set."""

    def __init__(self, made: Pasted, first: int, end: int):
        self._made, self._first, self._end = made, first, end

    def __len__(self) -> int:
        return self._end - self._first

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        rows = []
        for i in (self._first + i for i in ids):
            here = self._made.classes[i] >= 0
            boxes = self._made.boxes[i][here].astype(np.float64)
            record = {"image": self._made.images[i], "mask": self._made.masks[i], "name": f"pasted picture {i + 1}"}
            record |= {"boxes": boxes, "classes": self._made.classes[i][here], "crowd": np.zeros(here.sum(), bool)}
            rows.append(record | {"area": _areas(boxes)})
        return rows


def open_pasted(cache_dir: Path, side: int, label_names: tuple[str, ...]) -> Collection:
    """The embedded set in pictures of one size."""
    made = pasted(cache_dir, side)
    splits = {name: PastedRecords(made, *bounds) for name, bounds in made.bounds.items()}
    return Collection("pasted", fingerprint(side), label_names, splits, {})


def prepare_boxes(config: BoxConfig) -> PreparedPictures:
    """Prepares train, eval and, if asked for, test rows.

    Raises:
      UserError: whatever the source, the splits or the cache do not allow, too many undecodable pictures, or no box.
    """
    cache_dir = cache_folder(config.cache_dir)
    collection = _open(config, cache_dir)

    def rows_of(role: str, source: Source) -> tuple[BoxRows, dict[str, int]]:
        rows, counts = _rows(source, config, cache_dir)
        if not counts["boxes"]:
            raise UserError(
                f"split {source.split!r} of {config.source} has no box in any picture; expected at least one"
            )
        return rows, counts

    settings = (config.image_size, config.channels, config.max_boxes)
    return prepare_roles(config, collection, rows_of, "boxes", _RECIPE, settings)


def abstract_box_row(config: BoxConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one row, without the axis of rows.

    ``boxes`` are left, top, right, bottom in the row's pixels; ``kind`` is `NOTHING` for those that only fill up,
    `OBJECT` or `CROWD` (many in one box, which detection is not asked for); ``area`` is that of the object in the
    picture's own pixels, by which COCO tells small from large; ``scale`` is the row's pixels for each of the picture's;
    ``extent`` is the picture's width and height in the row's pixels, beyond which there is nothing.
    """
    size, most = config.image_size, config.max_boxes
    return {
        "image": jax.ShapeDtypeStruct((size, size, config.channels), np.uint8),
        "boxes": jax.ShapeDtypeStruct((most, 4), np.float32),
        "classes": jax.ShapeDtypeStruct((most,), np.int32),
        "kind": jax.ShapeDtypeStruct((most,), np.int32),
        "area": jax.ShapeDtypeStruct((most,), np.float32),
        "scale": jax.ShapeDtypeStruct((), np.float32),
        "extent": jax.ShapeDtypeStruct((2,), np.float32),
    }


def _open(config: BoxConfig, cache_dir: Path) -> Collection:
    scheme, _, rest = config.source.partition(":")
    if config.source == "pasted":
        return open_pasted(cache_dir, config.image_size, SCRIPTS)
    if scheme == "coco" and rest:
        return open_coco(config.source, rest, config.images)
    near = nearest(f"{scheme}:FILES" if rest else config.source, SPEC_FORMS)
    raise UserError(f"unknown source of boxes {config.source!r}; {near}")


def _rows(source: Source, config: BoxConfig, cache_dir: Path) -> tuple[BoxRows, dict[str, int]]:
    """The rows of one slice, and how many boxes and what was left out."""
    parts = [_RECIPE, source.fingerprint, config.image_size, config.channels, config.max_boxes]
    folder = prepare_once(cache_dir, f"boxes-{hash_of(*parts)}", functools.partial(_look, source, config))
    said = json.loads((folder / "said.json").read_text(encoding="utf8"))
    say_broken(said["undecodable"], source, config.broken_share)
    counts = said["counts"]
    told = {
        "clipped": "reach beyond their pictures and are clipped",
        "outside": "lie outside their pictures or are empty and are left out",
        "surplus": f"are the smallest of more than config.data.max_boxes={config.max_boxes} and are left out",
    }
    for name, what in told.items():
        if counts[name]:
            print(f"note: {counts[name]:,} boxes in {source.split} {what}", flush=True)
    with np.load(folder / "rows.npz") as stored:
        table = dict(stored)
    return BoxRows(source, table.pop("kept"), table, config), counts


def _look(source: Source, config: BoxConfig, folder: Path) -> None:
    """Looks at every picture of a slice once; writes which can be decoded, and their boxes."""

    def note(record: dict[str, Any], picture: Image.Image) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        shape = record.get("shape") or picture.size
        if shape != picture.size:  # such as one whose camera was held upright, and was turned since
            sizes = (" x ".join(map(str, of)) for of in (picture.size, shape))
            raise BrokenPicture(f"has {' pixels, and '.join(sizes)} in its annotations")
        return in_row(record, picture.size, config)

    kept, noted, broken = look(source, config, note)
    table = {name: np.stack([row[name] for row, _ in noted]) for name in noted[0][0]}
    counts = {name: sum(counts[name] for _, counts in noted) for name in noted[0][1]}
    np.savez(folder / "rows.npz", kept=kept, **table)
    said = {"undecodable": broken, "counts": counts | {"undecodable": len(broken)}}
    (folder / "said.json").write_text(json.dumps(said) + "\n", encoding="utf8")


def in_row(
    record: dict[str, Any], shape: tuple[int, int], config: BoxConfig
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The boxes of a record in its row.

    Args:
      record: With ``boxes``, ``classes``, ``crowd`` and ``area``.
      shape: Width and height of its picture.
      config: As it was written.

    Returns:
      The entries of `abstract_box_row` but the picture; and how many boxes there are, and how many were ``clipped``,
      ``outside`` or ``surplus``.
    """
    scale, most = scale_of(shape, config.image_size), config.max_boxes
    given = record["boxes"]
    boxes = np.clip(given, 0, np.tile(np.array(shape, np.float64), 2))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    # A tenth of a pixel is how annotators round.
    clipped = inside & (np.abs(boxes - given) > 0.1).any(1)
    (places,) = np.nonzero(inside)
    largest_first = places[np.argsort(-_areas(boxes[places]), kind="stable")]
    places = np.sort(largest_first[:most])
    row = {
        "boxes": np.zeros((most, 4), np.float32),
        "classes": np.zeros(most, np.int32),
        "kind": np.full(most, NOTHING, np.int32),
        "area": np.zeros(most, np.float32),
        "scale": np.array(scale, np.float32),
        "extent": np.array(shape, np.float32) * np.float32(scale),
    }
    count = len(places)
    row["boxes"][:count] = boxes[places] * scale
    row["classes"][:count] = record["classes"][places]
    row["kind"][:count] = np.where(record["crowd"][places], CROWD, OBJECT)
    row["area"][:count] = record["area"][places]
    counts = {"boxes": count, "clipped": int(clipped.sum()), "outside": int((~inside).sum())}
    return row, counts | {"surplus": int(inside.sum()) - count}


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
