"""Where pictures come from: opened as one random-access collection of encoded pictures or pixels, with class labels.

In: a source spec. Out: a `Collection` whose records are ``{"image": bytes or pixels, "label": int, "name": str}``.

- ``glyphs`` and ``digits`` need no download: characters of matplotlib's fonts (`glyphs`), and scikit-learn's 1,797
  handwritten digits of 8 by 8 pixels (divided at random into 70, 10 and 20 %).
- ``images:FOLDER``: files of any size. Folders in it named like splits (``train``, ``val``, ``testing``, ...: see
  `SPLIT_WORDS`) are the splits, or else all is ``train``; folders below are the classes, in each split or not at
  all.
- ``idx:FOLDER``: the format of MNIST, zipped or not: ``train-images-idx3-ubyte`` and so on.
- ``tfds:NAME[/CONFIG]``: a prepared dataset with an image feature.
"""

from __future__ import annotations

import difflib
import gzip
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data import glyphs as glyph_set
from sslx.data.cache import hash_of
from sslx.data.files import SPLIT_WORDS, bytes_of, content_of, matching_files
from sslx.data.sources import SLICE_SEED, Collection, data_sources, described_splits, prepared_builder
from sslx.errors import UserError, choose, nearest

SPEC_FORMS = ("glyphs", "digits", "images:FOLDER", "idx:FOLDER", "tfds:NAME[/CONFIG]")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
GZIP = b"\x1f\x8b"
MOST_AXES = 8  # of an array of MNIST's format; pictures have three


class PixelRecords:
    """One split of pictures that are in memory or mapped as uint8 pixels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, names: Sequence[str] | None = None):
        self._images, self._labels, self._names = images, labels, names

    def __len__(self) -> int:
        return len(self._images)

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        return [
            {"image": self._images[i], "name": f"picture {i + 1}"}
            | ({} if self._labels is None else {"label": int(self._labels[i])})
            for i in ids
        ]


class ImageFiles:
    """One split of files, read as bytes."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | None):
        self._paths, self._labels = paths, labels

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        rows = []
        for i in ids:
            row: dict[str, Any] = {"image": bytes_of(self._paths[i]), "name": _printable(self._paths[i])}
            rows.append(row | ({"label": self._labels[i]} if self._labels is not None else {}))
        return rows


class TfdsImages:
    """One TFDS split; pictures stay encoded."""

    def __init__(self, spec: str, split: str, examples: Any, image_field: str, label_field: str):
        self._spec, self._split, self._examples = spec, split, examples
        self._image_field, self._label_field = image_field, label_field

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, ids: list[int]) -> list[dict[str, Any]]:
        rows = []
        for i, example in zip(ids, self._examples.__getitems__(ids), strict=True):
            row = {"image": example[self._image_field], "name": f"{self._spec}, {self._split} record {i + 1}"}
            rows.append(row | ({"label": int(example[self._label_field])} if self._label_field else {}))
        return rows


def open_images(
    spec: str, *, image_field: str, label_field: str, cache_dir: str | os.PathLike[str], tfds_dir: str | None = None
) -> Collection:
    """Opens everything a spec names.

    Args:
      spec: The source.
      image_field: Of a TFDS dataset.
      label_field: Of a TFDS dataset, where it may be missing if it is ``label``; of ``glyphs``: script, category or
        face (``label`` means script).
      cache_dir: Where ``glyphs`` are drawn.
      tfds_dir: Where TFDS keeps its datasets; None: its own default.

    Raises:
      UserError: an unknown form, no such folder or files, a damaged idx file, a dataset not prepared or without images.
    """
    scheme, _, rest = spec.partition(":")
    if spec == "glyphs":
        return _glyphs(label_field, cache_dir)
    if label_field != "label" and scheme in ("digits", "images", "idx"):
        raise UserError(
            f"config.data.label_field is {label_field!r}, and {spec} has labels of one kind; expected label"
        )
    if spec == "digits":
        return _digits()
    if scheme == "images" and rest:
        return _folder(spec, rest)
    if scheme == "idx" and rest:
        return _idx(spec, Path(rest).expanduser())
    if scheme == "tfds" and rest:
        return _tfds(spec, rest, image_field, label_field, tfds_dir)
    forms = {form.partition(":")[0]: form for form in SPEC_FORMS}
    close = difflib.get_close_matches(scheme, forms, n=1, cutoff=0.5)  # what follows says nothing of what was meant
    raise UserError(f"unknown image source {spec!r}; {nearest(forms[close[0]] if close else '', SPEC_FORMS)}")


def _glyphs(label_field: str, cache_dir: str | os.PathLike[str]) -> Collection:
    label = "script" if label_field == "label" else label_field
    choose(label, glyph_set.LABELS, "config.data.label_field of glyphs")
    made = glyph_set.glyphs(cache_dir)
    splits = {
        name: PixelRecords(made.images[first:end], made.labels[label][first:end])
        for name, (first, end) in made.bounds.items()
    }
    return Collection("glyphs", hash_of(glyph_set.fingerprint(), label), made.names[label], splits, {})


def _digits() -> Collection:
    import sklearn
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.default_rng(SLICE_SEED).permutation(len(images))
    edges = np.round(np.array([0, 0.7, 0.8, 1]) * len(images)).astype(int)
    splits = {
        name: PixelRecords(images[order[first:end]], found.target[order[first:end]])
        for name, first, end in zip(("train", "validation", "test"), edges[:-1], edges[1:], strict=True)
    }
    return Collection("digits", hash_of("digits", sklearn.__version__), tuple(map(str, range(10))), splits, {})


def _folder(spec: str, pattern: str) -> Collection:
    paths = matching_files(spec, pattern, SUFFIXES)
    root = os.path.abspath(os.path.expanduser(pattern))
    parts = [Path(os.path.relpath(path, root)).parts[:-1] if os.path.isdir(root) else () for path in paths]
    named = [SPLIT_WORDS.get(part[0].lower(), "") if part else "" for part in parts]
    divided = all(named)
    # One such name among others is a class (a train, a test); two are splits that something has been left beside.
    if not divided and len(set(named) - {""}) > 1:
        folders = sorted({part[0] for part, name in zip(parts, named, strict=True) if name})
        raise UserError(
            f"{paths[named.index('')]} lies beside {', '.join(folders)} of {spec}; expected every picture in a folder "
            "of a split, or folders of other names as classes"
        )
    ids: dict[str, list[int]] = {}
    for i, name in enumerate(named):
        ids.setdefault(name if divided else "train", []).append(i)
    classes = [_printable(os.sep.join(part[1:] if divided else part)) for part in parts]
    names = tuple(sorted(set(classes) - {""})) or None
    number = {name: i for i, name in enumerate(names or ())}
    splits: dict[str, ImageFiles] = {}
    for split, members in ids.items():
        without = [i for i in members if not classes[i]]
        if 0 < len(without) < len(members):
            raise UserError(
                f"{paths[without[0]]} is in no class folder, but others of {spec} are; expected all of a split or none"
            )
        labels = None if without else [number[classes[i]] for i in members]
        splits[split] = ImageFiles([paths[i] for i in members], labels)
    orders = {name: np.random.default_rng(SLICE_SEED).permutation(len(split)) for name, split in splits.items()}
    content = hash_of("images", content_of(paths), named if divided else [], classes)
    return Collection(spec, content, names, splits, orders)


def _printable(path: str) -> str:
    """A path for people: of a name from before UTF-8, the bytes that are none are written out."""
    return os.fsencode(path).decode("utf8", "backslashreplace")


def _idx(spec: str, folder: Path) -> Collection:
    if not folder.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        near = nearest(folder.name, (path.name for path in beside if path.is_dir()))
        raise UserError(f"{spec}: no folder {folder}; {near}")
    splits, digests, classes = {}, [], 0
    for split, prefix in (("train", "train"), ("test", "t10k")):
        files = [_idx_file(folder, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        if split == "test" and not any(files):
            continue
        for file, kind in zip(files, ("images-idx3", "labels-idx1"), strict=True):
            if file is None:
                name = f"{prefix}-{kind}-ubyte"
                raise UserError(f"{spec} has no {name} or {name}.gz; {nearest(name, os.listdir(folder))}")
        images, labels = (_read_idx(file) for file in files)
        if images.ndim != 3 or not images.size or labels.ndim != 1 or len(images) != len(labels):
            raise UserError(
                f"{spec}: {files[0].name} is {list(images.shape)} and {files[1].name} {list(labels.shape)}; "
                "expected pictures [n, height, width] and as many labels [n]"
            )
        splits[split] = PixelRecords(images[..., None], labels.astype(np.int32))
        classes = max(classes, int(labels.max()) + 1)
        digests += content_of([str(file) for file in files])
    # In order, MNIST's last rows are those of other writers: a slice is to be a random sample.
    orders = {name: np.random.default_rng(SLICE_SEED).permutation(len(records)) for name, records in splits.items()}
    return Collection(spec, hash_of("idx", digests), tuple(map(str, range(classes))), splits, orders)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((folder / file for file in (name, f"{name}.gz") if (folder / file).is_file()), None)


def _read_idx(file: Path) -> np.ndarray:
    """An array of unsigned bytes: two zeros, the type (8), the number of axes, each axis as a big-endian uint32."""
    try:
        data = file.read_bytes()
        # By what it holds: some programs unzip a file and leave its name, or zip it and do not say so.
        data = gzip.decompress(data) if data[:2] == GZIP else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] > MOST_AXES or len(data) < 4 + 4 * data[3]:
        raise UserError(
            f"{file} is no idx file of unsigned bytes: it begins with {data[:4].hex(' ') or 'nothing'}, expected "
            f"00 00 08 and the number of axes (3 for pictures, 1 for labels)"
        )
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if len(body) != math.prod(shape):
        raise UserError(f"{file} should hold {math.prod(shape):,} bytes for {list(shape)} and holds {len(body):,}")
    return body.reshape(shape)


def _tfds(spec: str, name: str, image_field: str, label_field: str, tfds_dir: str | None) -> Collection:
    import tensorflow_datasets as tfds

    builder = prepared_builder(name, tfds_dir)
    features = builder.info.features
    if image_field not in features or not isinstance(features[image_field], tfds.features.Image):
        images = [key for key in features if isinstance(features[key], tfds.features.Image)]
        raise UserError(f"{spec} has no image feature {image_field!r}; {nearest(image_field, images)}")
    labelled = label_field in features and isinstance(features[label_field], tfds.features.ClassLabel)
    if not labelled and label_field != "label":
        classes = [key for key in features if isinstance(features[key], tfds.features.ClassLabel)]
        raise UserError(f"{spec} has no class feature {label_field!r}; {nearest(label_field, classes)}")
    skip = {image_field: tfds.decode.SkipDecoding()}
    opened: Mapping[str, Any] = data_sources(spec, builder, decoders=skip)
    splits = {
        split: TfdsImages(spec, split, examples, image_field, label_field if labelled else "")
        for split, examples in opened.items()
    }
    read = [image_field, label_field if labelled else ""]
    content = hash_of("tfds images", builder.info.full_name, described_splits(builder), read)
    names = tuple(features[label_field].names) if labelled else None
    return Collection(spec, content, names, splits, {})
