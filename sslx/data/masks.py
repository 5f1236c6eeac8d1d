"""Pictures with a class for each pixel: from a config to rows ready for training.

In: a `MaskConfig`, whose source is ``pasted`` (embedded; see `pasted`) or ``masks:FOLDER``, a folder of pictures, with
``masks``, the folder of their masks: PNG files in the same places and of the same names, each pixel the number of a
class (palette or grey of 8 bits; 255: not asked for), and ``classes.txt`` in the masks' folder, a name a line, the
first of class 0. Folders in it that are named like splits are the splits. Out: `PreparedPictures`, whose rows are whole
pictures and masks brought to one size (see `fitted`).
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64
from PIL import Image

from sslx.data.boxes import open_pasted
from sslx.data.cache import cache_folder, hash_of, prepare_once
from sslx.data.decoding import say_broken
from sslx.data.files import SPLIT_WORDS, bytes_of, content_of, matching_files
from sslx.data.fitted import FittedConfig, FittedRows, fitted, fitted_mask, look
from sslx.data.image_sources import SUFFIXES
from sslx.data.pasted import SCRIPTS
from sslx.data.pictures import BrokenPicture, loaded
from sslx.data.prepared import PreparedPictures, prepare_roles
from sslx.data.sources import SLICE_SEED, Collection, Source
from sslx.data.text import entropy
from sslx.errors import UserError, nearest

SPEC_FORMS = ("pasted", "masks:FOLDER")
IGNORED = 255  # the class of pixels that are not asked for, and of what lies beyond the picture
CLASSES_FILE = "classes.txt"
# Raise this whenever the same files would come out as other rows.
_RECIPE = 1


@dataclass(frozen=True)
class MaskConfig(FittedConfig):
    """``config.data`` of semantic segmentation."""

    masks: str = ""  # of masks:FOLDER, the folder of the masks


class MaskRows(FittedRows):
    """Rows of pictures and masks."""

    def fetch(self, row_ids: Int64[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Reads rows: ``image`` uint8[n, size, size, channels] and ``mask`` uint8[n, size, size]."""
        size = self._config.image_size

        def one(record: dict[str, Any], picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
            return fitted(picture, size), fitted_mask(opened_mask(record), size, IGNORED)

        images, masks = zip(*self._decoded(np.asarray(row_ids, np.int64), one), strict=True)
        return {"image": np.stack(images), "mask": np.stack(masks)}


class MaskFiles:
    """One split of files, read as bytes."""

    def __init__(self, pairs: list[tuple[str, str]]):
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        rows = []
        for picture, mask in (self._pairs[i] for i in ids):
            rows.append({"image": bytes_of(picture), "mask": bytes_of(mask), "name": picture, "mask_name": mask})
        return rows


def prepare_masks(config: MaskConfig) -> PreparedPictures:
    """Prepares train, eval and, if asked for, test rows.

    Raises:
      UserError: whatever the source, the splits or the cache do not allow, a mask that does not fit its picture or has
        a class without a name, or too many undecodable pictures.
    """
    cache_dir = cache_folder(config.cache_dir)
    collection = _open(config, cache_dir)

    def rows_of(role: str, source: Source) -> tuple[MaskRows, dict[str, Any]]:
        rows, said = _rows(source, config, cache_dir)
        if not any(said["pixels"]):
            raise UserError(f"split {source.split!r} of {config.source} has no pixel of any class; all are {IGNORED}")
        found = {"undecodable": len(said["undecodable"]), "pixel_entropy": entropy(np.array(said["pixels"]))}
        return rows, found

    return prepare_roles(config, collection, rows_of, "masks", _RECIPE, (config.image_size, config.channels))


def abstract_mask_row(config: MaskConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one row, without the axis of rows; ``mask`` has numbers of classes and `IGNORED`."""
    size = config.image_size
    return {
        "image": jax.ShapeDtypeStruct((size, size, config.channels), np.uint8),
        "mask": jax.ShapeDtypeStruct((size, size), np.uint8),
    }


def opened_mask(record: dict[str, Any]) -> Image.Image:
    """The mask of a record, its pixels numbers of classes.

    Raises:
      UserError: it is no picture of one number a pixel.
    """
    if isinstance(record["mask"], np.ndarray):
        return Image.fromarray(record["mask"])
    try:
        mask = loaded(record["mask"])
    except BrokenPicture as error:
        raise UserError(f"{record['mask_name']} is no mask: {error}") from error
    if mask.mode not in ("P", "L", "1"):
        raise UserError(f"{record['mask_name']} is a picture in {mask.mode}; expected a palette or 8 bits of grey")
    return Image.fromarray(np.asarray(mask, np.uint8))  # of a palette the numbers, not the colours


def _open(config: MaskConfig, cache_dir: Path) -> Collection:
    scheme, _, rest = config.source.partition(":")
    if config.source == "pasted":
        return open_pasted(cache_dir, config.image_size, ("background", *SCRIPTS))
    if scheme == "masks" and rest:
        return _folders(config.source, rest, config.masks)
    near = nearest(f"{scheme}:FOLDER" if rest else config.source, SPEC_FORMS)
    raise UserError(f"unknown source of masks {config.source!r}; {near}")


def _folders(spec: str, pictures: str, masks: str) -> Collection:
    root, mask_root = (Path(os.path.expanduser(folder)) for folder in (pictures, masks))
    if not masks or not mask_root.is_dir():
        raise UserError(f"config.data.masks is {masks!r}; expected the folder of the masks of {spec}")
    names_file = mask_root / CLASSES_FILE
    if not names_file.is_file():
        raise UserError(f"there is no {names_file}; expected the names of the classes, a line each, from class 0 on")
    names = tuple(name.strip() for name in names_file.read_text(encoding="utf8").splitlines() if name.strip())
    if not 2 <= len(names) <= IGNORED:
        raise UserError(f"{names_file} has {len(names)} names; expected 2 to {IGNORED}")
    if doubled := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UserError(f"{names_file} has the name {doubled[0]!r} twice; expected one for each class")
    paths = matching_files(spec, pictures, SUFFIXES)
    if not root.is_dir():
        raise UserError(f"{spec} is no folder; expected one, with its masks in the same places of config.data.masks")
    inner = [Path(path).relative_to(os.path.abspath(root)) for path in paths]
    mask_of = [mask_root / place.with_suffix(".png") for place in inner]
    if missing := [str(mask) for mask in mask_of if not mask.is_file()]:
        raise UserError(f"{len(missing):,} of {len(paths):,} pictures of {spec} have no mask, such as {missing[0]}")
    divided = all(len(place.parts) > 1 and place.parts[0].lower() in SPLIT_WORDS for place in inner)
    pairs: dict[str, list[tuple[str, str]]] = {}
    for path, place, mask in zip(paths, inner, mask_of, strict=True):
        pairs.setdefault(SPLIT_WORDS[place.parts[0].lower()] if divided else "train", []).append((path, str(mask)))
    splits = {name: MaskFiles(found) for name, found in pairs.items()}
    orders = {name: np.random.default_rng(SLICE_SEED).permutation(len(split)) for name, split in splits.items()}
    content = hash_of("masks", names, content_of(paths), content_of([str(mask) for mask in mask_of]))
    return Collection(spec, content, names, splits, orders)


def _rows(source: Source, config: MaskConfig, cache_dir: Path) -> tuple[MaskRows, dict[str, Any]]:
    """The rows of one slice, and what was found in it."""
    parts = [_RECIPE, source.fingerprint, config.image_size, config.channels]
    folder = prepare_once(cache_dir, f"masks-{hash_of(*parts)}", functools.partial(_look, source, config))
    said = json.loads((folder / "said.json").read_text(encoding="utf8"))
    say_broken(said["undecodable"], source, config.broken_share)
    return MaskRows(source, np.load(folder / "kept.npy"), config), said


def _look(source: Source, config: MaskConfig, folder: Path) -> None:
    """Looks at every picture and mask of a slice once; writes which can be used and how common each class is."""
    classes = len(source.label_names)

    def note(record: dict[str, Any], picture: Image.Image) -> np.ndarray:
        mask = opened_mask(record)
        if mask.size != picture.size:
            sizes = (" x ".join(map(str, of.size)) for of in (mask, picture))
            raise UserError(f"the mask of {record['name']} has {' pixels and the picture '.join(sizes)}")
        counts = np.bincount(np.asarray(mask).ravel(), minlength=IGNORED + 1)
        if unnamed := [value for value in np.flatnonzero(counts[:IGNORED]).tolist() if value >= classes]:
            raise UserError(
                f"the mask of {record['name']} has class {unnamed[0]}; {CLASSES_FILE} names 0 to {classes - 1} "
                f"({IGNORED} is not asked for)"
            )
        return counts[:classes]

    kept, counts, broken = look(source, config, note)
    np.save(folder / "kept.npy", kept)
    said = {"undecodable": broken, "pixels": np.sum(counts, axis=0).tolist()}
    (folder / "said.json").write_text(json.dumps(said) + "\n", encoding="utf8")
