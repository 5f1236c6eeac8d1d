"""Boxes in COCO's format: JSON files with ``images``, ``annotations`` and ``categories``, and a folder of pictures.

In: ``coco:FILES``, one JSON file, a folder of them or a glob, and the folder of the pictures. Files with ``train``,
``val`` or ``test`` in their names are the splits of these names (``instances_train2017.json``); others are one split.
Out: a `Collection` whose records are ``{"image": bytes, "name", "boxes": float64[k, 4], "classes": int32[k],
"crowd": bool[k], "area": float64[k], "shape": (width, height) or None}``; boxes are left, top, right, bottom in the
picture's pixels, as they were written. Classes are numbered in the order of the categories' ids.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.cache import hash_of
from sslx.data.files import SPLIT_WORD, SPLIT_WORDS, bytes_of, content_of, matching_files
from sslx.data.sources import SLICE_SEED, Collection
from sslx.errors import UserError, first_line, nearest


class CocoRecords:
    """The pictures of one split, read as bytes, with their boxes."""

    def __init__(self, records: list[dict[str, Any]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        rows = []
        for i in ids:
            record = self._records[i]
            rows.append(record | {"image": bytes_of(record["name"])})
        return rows


def open_coco(spec: str, pattern: str, images: str) -> Collection:
    """Opens everything a spec names.

    Args:
      spec: The source as it was written.
      pattern: The part of it that names the files.
      images: The folder of the pictures. A file's pictures may be in a folder of it that is called as the end of the
        file's name is: ``instances_train2017.json`` has them in ``train2017``.

    Raises:
      UserError: no such file or folder, no JSON or not of this form, an unknown picture or category, a missing picture.
    """
    paths = matching_files(spec, pattern, (".json",))
    if not images:
        raise UserError(f"config.data.images is empty; expected the folder of the pictures that {spec} names")
    root = Path(images).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.images is {images!r}; there is no such folder")
    written = {path: _parsed(path) for path in paths}
    names = _categories(written)
    number = {key: place for place, key in enumerate(sorted(names))}
    split_of = {path: _split(path) for path in paths}
    divided = all(split_of.values())
    records: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        split = split_of[path] if divided else "train"
        records.setdefault(split, []).extend(_records(path, written[path], number, names, root))
    splits = {name: CocoRecords(found) for name, found in records.items()}
    orders = {name: np.random.default_rng(SLICE_SEED).permutation(len(split)) for name, split in splits.items()}
    pictures = [record["name"] for found in records.values() for record in found]
    content = hash_of("coco", content_of(paths), content_of(pictures))
    return Collection(spec, content, tuple(names[key] for key in sorted(names)), splits, orders)


def _parsed(path: str) -> dict[str, Any]:
    try:
        written = json.loads(Path(path).read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no JSON: {first_line(error)}") from error
    for part in ("images", "annotations", "categories"):
        if not isinstance(written, dict) or not isinstance(written.get(part), list):
            raise UserError(f"{path} has no list {part!r}; expected COCO's images, annotations and categories")
    if not written["images"] or not written["categories"]:
        raise UserError(f"{path} has {len(written['images'])} images and {len(written['categories'])} categories")
    return written


def _split(path: str) -> str:
    name = Path(path).stem.lower().replace("test-dev", "test")  # COCO's own test pictures for development
    found = {SPLIT_WORDS[word] for word in SPLIT_WORD.findall(name)}
    return found.pop() if len(found) == 1 else ""


def _categories(written: Mapping[str, dict[str, Any]]) -> dict[int, str]:
    """Names of categories by id, which all files have to agree on."""
    names: dict[int, str] = {}
    for path, content in written.items():
        for category in content["categories"]:
            key, name = (_value(category, field, kind, path) for field, kind in (("id", int), ("name", str)))
            if names.setdefault(key, name) != name:
                raise UserError(f"category {key} is {names[key]!r} and {name!r} in {path}; expected one name for it")
    return names


def _records(
    path: str, content: dict[str, Any], number: Mapping[int, int], names: Mapping[int, str], root: Path
) -> list[dict[str, Any]]:
    files = {_value(image, "id", int, path): _value(image, "file_name", str, path) for image in content["images"]}
    if len(files) < len(content["images"]):
        raise UserError(f"{path} has pictures of the same id")
    of_image: dict[int, list[tuple[list[float], int, bool, float]]] = collections.defaultdict(list)
    for annotation in content["annotations"]:
        image, kind = (_value(annotation, field, int, path) for field in ("image_id", "category_id"))
        where = f"{path}: annotation {annotation.get('id', '')}".rstrip()
        if image not in files:
            raise UserError(f"{where} is of image_id {image}, which is not in 'images'")
        if kind not in number:
            known = ", ".join(f"{key} ({name})" for key, name in sorted(names.items())[:20])
            raise UserError(f"{where} has category_id {kind}, which is not in 'categories': {known}")
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_finite(value) for value in box):
            raise UserError(f"{where} has bbox {box!r}; expected [left, top, width, height]")
        if min(box[2:]) < 0:
            raise UserError(
                f"{where} has bbox {box!r}, of negative size; expected [left, top, width, height], not corners"
            )
        left, top, wide, high = map(float, box)
        area = annotation.get("area", wide * high)
        area = float(area) if _finite(area) else wide * high
        of_image[image].append(
            ([left, top, left + wide, top + high], number[kind], bool(annotation.get("iscrowd", 0)), area)
        )
    shapes = {image["id"]: _shape(image) for image in content["images"]}
    folder = _folder(path, root)
    places = {image: _place(file, root, folder) for image, file in files.items()}
    if missing := [files[image] for image, place in places.items() if place is None]:
        here = os.listdir(folder)[:1000]
        raise UserError(
            f"{len(missing):,} of {len(files):,} pictures of {path} are not in {folder}, such as {missing[0]!r}; "
            f"{nearest(missing[0], here)}"
        )
    found = []
    for image in files:
        boxes, classes, crowd, area = zip(*of_image[image], strict=True) if of_image[image] else ((), (), (), ())
        found.append(
            {
                "name": str(places[image]),
                "shape": shapes[image],
                "boxes": np.array(boxes, np.float64).reshape(-1, 4),
                "classes": np.array(classes, np.int32),
                "crowd": np.array(crowd, bool),
                "area": np.array(area, np.float64),
            }
        )
    return found


def _folder(path: str, root: Path) -> Path:
    named = root / Path(path).stem.rpartition("_")[2]
    return named if named.is_dir() else root


def _place(file: str, root: Path, folder: Path) -> Path | None:
    return next((place / file for place in (folder, root) if (place / file).is_file()), None)


def _shape(image: dict[str, Any]) -> tuple[int, int] | None:
    wide, high = image.get("width"), image.get("height")
    return (wide, high) if isinstance(wide, int) and isinstance(high, int) else None


def _value(of: Any, field: str, kind: type, path: str) -> Any:
    value = of.get(field) if isinstance(of, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{path}: {field!r} is {value!r} in {str(of)[:80]}; expected {kind.__name__}")
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
