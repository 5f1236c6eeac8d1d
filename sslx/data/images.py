"""From an image config to rows ready for training: open, look at every picture once, keep what can be used.

In: an `ImageConfig`. Out: `PreparedPictures`, whose rows are uint8 pixels of one size. How they come to that size is
``config.data.crop``:

- ``step``: pictures are brought to ``image_size`` once, at preparation (the square in the middle), and mapped from one
  file; random crops are cut from that inside the training step. For pictures that are small to begin with.
- ``host``: files stay as they are, and each time a row is trained on, a random part is cut from the whole picture
  before it is brought to size, which resizing first would blur. Which part is a function of the seed, the epoch and the
  row. Held-out rows are the square in the middle of 0.875 of the shorter side, as is usual.

A picture that cannot be decoded is named, counted and left out; more than ``broken_share`` of them are an error.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from sslx.data.cache import cache_folder, hash_of, prepare_once
from sslx.data.decoding import decoders, looked_at, say_broken, still_decodable
from sslx.data.image_sources import open_images
from sslx.data.pictures import DRAWS, has_colours, middle, open_picture, pixels, random_crop
from sslx.data.prepared import PictureSource, PreparedPictures, check_shape, prepare_roles
from sslx.data.rows import RowOrder
from sslx.data.sources import HIDDEN, Source
from sslx.data.text import entropy
from sslx.errors import UserError, choose

CENTRE = 0.875  # of the shorter side; see `held_out_share`
# Raise this whenever the same pictures would come out as other pixels.
_RECIPE = 2


@dataclass(frozen=True)
class PictureSet(PictureSource):
    """Which pictures, and not yet of what size: ``config.data`` of an evaluation, where the run has the rest."""

    source: str = "glyphs"  # or digits, images:FOLDER, idx:FOLDER, tfds:NAME[/CONFIG]
    image_field: str = "image"  # of TFDS
    label_field: str = "label"  # of TFDS; of glyphs: script, category or face
    crop: str = "step"  # step | host: where random crops are cut
    labels_per_class: int = 0  # train on so many rows of each class, drawn by the run's seed; 0: on all
    crop_area: tuple[float, float] = (0.2, 1.0)  # of host crops: least and largest share of the picture's area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # of host crops: width over height
    tfds_dir: str = ""  # "" = TFDS's own default

    def __post_init__(self):
        super().__post_init__()
        if self.labels_per_class < 0:
            raise UserError(f"config.data.labels_per_class is {self.labels_per_class}; expected at least 0 (all)")
        choose(self.crop, ("step", "host"), "config.data.crop")
        check_range(self.crop_area, "config.data.crop_area", most=1.0)
        check_range(self.crop_aspect, "config.data.crop_aspect")


@dataclass(frozen=True)
class ImageConfig(PictureSet):
    """``config.data`` of image experiments."""

    image_size: int = 32  # height and width of a row
    channels: int = 3  # 3: RGB | 1: grey

    def __post_init__(self):
        super().__post_init__()
        check_shape(self.image_size, self.channels)


def check_range(bounds: tuple[float, ...], option: str, most: float = float("inf")) -> None:
    """Refuses what is no pair of positive numbers in rising order.

    Raises:
      UserError: it is none.
    """
    numbers = len(bounds) == 2 and all(isinstance(bound, int | float) for bound in bounds)
    if not numbers or not 0 < bounds[0] <= bounds[1] <= most:
        limit = f", at most {most:g}" if most < float("inf") else ""
        raise UserError(f"{option} is {tuple(bounds)}; expected two rising numbers above 0{limit}")


class ImageRows:
    """Random access to pictures as pixels; ``labels`` int32[rows] or None."""

    def __init__(self, labels: np.ndarray | None):
        self.labels = labels

    def order(self, seed: int) -> RowOrder:
        """Returns the order in which training takes the rows."""
        return RowOrder(len(self), seed)

    def fetch(self, row_ids: Int64[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Reads rows as they are evaluated.

        Returns:
          ``image`` uint8[n, image_size, image_size, channels] and, if there are labels, ``label`` int32[n].
        """
        ids = np.asarray(row_ids, np.int64)
        return self._labelled(ids, self._images(ids, None))

    def draw(
        self, row_ids: Int64[np.ndarray, " n"], epochs: Int64[np.ndarray, " n"], seed: int
    ) -> dict[str, np.ndarray]:
        """Reads rows for training: a host crop is decided by the run's seed, the epoch of each row and the row."""
        ids = np.asarray(row_ids, np.int64)
        keys = zip(np.asarray(epochs).tolist(), ids.tolist(), strict=True)
        return self._labelled(ids, self._images(ids, [np.random.SeedSequence(seed, spawn_key=key) for key in keys]))

    def _labelled(self, ids: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": images} | ({} if self.labels is None else {"label": self.labels[ids]})

    def __len__(self) -> int:
        raise NotImplementedError

    def _images(self, ids: np.ndarray, draws: list[np.random.SeedSequence] | None) -> np.ndarray:
        """Pixels; ``draws`` seeds each row's crop, None asks for the middle."""
        raise NotImplementedError


class MappedRows(ImageRows):
    """Rows of pixels that were made at preparation; ``kept`` are their places in ``images``."""

    def __init__(self, images: np.ndarray, kept: np.ndarray, labels: np.ndarray | None):
        super().__init__(labels)
        self._pixels, self.kept = images, kept

    def __len__(self) -> int:
        return len(self.kept)

    def _images(self, ids: np.ndarray, draws: list[np.random.SeedSequence] | None) -> np.ndarray:
        return self._pixels[self.kept[ids]]


class DecodedRows(ImageRows):
    """Rows that are decoded and cut each time they are read."""

    def __init__(self, source: Source, kept: np.ndarray, labels: np.ndarray | None, config: ImageConfig):
        super().__init__(labels)
        self._source, self.kept, self._config = source, kept, config

    def __len__(self) -> int:
        return len(self.kept)

    def _images(self, ids: np.ndarray, draws: list[np.random.SeedSequence] | None) -> np.ndarray:
        config = self._config
        records = self._source.__getitems__(self.kept[ids].tolist())
        # After a JPEG has been decoded smaller, even the smallest and narrowest part is to have pixels enough.
        narrow = max(config.crop_aspect[1], 1 / config.crop_aspect[0])
        least = math.ceil(config.image_size / (config.crop_area[0] / narrow) ** 0.5)

        def one(place: int) -> np.ndarray:
            record = records[place]
            with still_decodable(record):
                if draws is None:
                    return held_out_pixels(record["image"], config)
                picture = open_picture(record["image"], config.channels, least=least)
            # Raw bits: NumPy keeps its bit streams from version to version.
            uniform = (np.random.Philox(draws[place]).random_raw(DRAWS) >> 11) * 2.0**-53
            return pixels(random_crop(picture, config.image_size, uniform, config.crop_area, config.crop_aspect))

        return np.stack(list(decoders().map(one, range(len(ids)))))


def prepare_images(config: ImageConfig, seed: int = 0) -> PreparedPictures:
    """Prepares all rows; ``seed`` draws those of ``labels_per_class``.

    Of rows with labels, ``statistics`` has their entropy in nats, such as ``eval_label_entropy``.

    Raises:
      UserError: whatever the source, the splits or the cache do not allow, or too many undecodable pictures.
    """
    cache_dir = cache_folder(config.cache_dir)
    collection = open_images(
        config.source,
        image_field=config.image_field,
        label_field=config.label_field,
        cache_dir=cache_dir,
        tfds_dir=config.tfds_dir or None,
    )

    def rows_of(role: str, source: Source) -> tuple[ImageRows, dict[str, Any]]:
        rows, broken = _rows(source, config, cache_dir, seed if role == "train" else None)
        if role == "train" and config.channels == 1 and len(rows) and _first_has_colours(source, rows):
            print(
                f"note: pictures of {config.source} have colours and are made grey; --config.data.channels=3 "
                "--config.model.channels=3 keeps the colours, from pretraining on",
                flush=True,
            )
        known = {} if rows.labels is None else {"label_entropy": entropy(np.bincount(rows.labels))}
        return rows, {"undecodable": broken} | known

    settings = [config.image_size, config.channels, config.crop]
    if config.labels_per_class:
        settings += [config.labels_per_class, seed]
    return prepare_roles(config, collection, rows_of, "images", _RECIPE, settings)


def _first_has_colours(source: Source, rows: ImageRows) -> bool:
    (record,) = source.__getitems__([int(rows.kept[0])])
    return has_colours(record["image"])


def prepare_labelled_images(config: ImageConfig, seed: int = 0) -> PreparedPictures:
    """As `prepare_images`, of pictures that can be told apart by class.

    Raises:
      UserError: also, a role has no labels, or there is one class alone.
    """
    data = prepare_images(config, seed)
    source = f"config.data.source {config.source!r}"
    for role, rows in (("train", data.train), ("eval", data.eval), ("test", data.test)):
        if rows is not None and rows.labels is None:
            raise UserError(
                f"{source} has no labels in {data.statistics[f'{role}_split']}; expected folders of classes, or a "
                "class feature (config.data.label_field)"
            )
    if len(data.label_names) < 2:
        raise UserError(f"{source} has one label, {data.label_names[0]!r}; expected at least 2")
    return data


def held_out_share(crop: str) -> float:
    """The share of the shorter side that a held-out row is the square in the middle of."""
    return CENTRE if crop == "host" else 1.0


def held_out_pixels(
    picture: bytes | np.ndarray | Image.Image, config: ImageConfig
) -> UInt8[np.ndarray, "image_size image_size channels"]:
    """A picture, as `open_picture` takes it, as a held-out row.

    Raises:
      BrokenPicture: as `open_picture`.
    """
    share = held_out_share(config.crop)
    least = 0 if config.crop == "step" else math.ceil(config.image_size / share)
    return pixels(middle(open_picture(picture, config.channels, least=least), config.image_size, share))


def abstract_image_row(config: ImageConfig, *, labelled: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one row, without the axis of rows."""
    row = {"image": jax.ShapeDtypeStruct((config.image_size, config.image_size, config.channels), np.uint8)}
    return row | ({"label": jax.ShapeDtypeStruct((), np.int32)} if labelled else {})


def _rows(source: Source, config: ImageConfig, cache_dir: Path, seed: int | None) -> tuple[ImageRows, int]:
    """The rows of one slice, and how many of its pictures cannot be decoded; ``seed`` is None where all are taken."""
    stored = config.crop == "step"
    parts = [_RECIPE, source.fingerprint, config.channels, config.image_size if stored else None]
    name = f"{'pixels' if stored else 'pictures'}-{hash_of(*parts)}"
    folder = prepare_once(cache_dir, name, functools.partial(_look, source, config))
    broken = json.loads((folder / "undecodable.json").read_text(encoding="utf8"))
    say_broken(broken, source, config.broken_share)
    kept, labels = np.load(folder / "kept.npy"), np.load(folder / "labels.npy")
    if config.labels_per_class and seed is not None:
        if (labels == HIDDEN).any():
            raise UserError(
                f"config.data.labels_per_class is {config.labels_per_class}, and split {source.split!r} of "
                f"{source.spec} has no labels"
            )
        where = f"split {source.split!r} of {source.spec}"
        drawn = of_each_class(labels, config.labels_per_class, seed, source.label_names, where, "data")
        kept, labels = kept[drawn], labels[drawn]
    if (labels == HIDDEN).any():
        labels = None  # there are none, or they are kept secret, as in the test sets of benchmarks
    if stored:
        return MappedRows(np.load(folder / "images.npy", mmap_mode="r"), kept, labels), len(broken)
    return DecodedRows(source, kept, labels, config), len(broken)


def of_each_class(labels: np.ndarray, count: int, seed: int, names: Sequence[str], where: str, part: str) -> np.ndarray:
    """Places of ``count`` rows of each class, in rising order.

    Args:
      labels: Of all rows.
      count: As ``labels_per_class`` of a part of the config says.
      seed: Draws them.
      names: Of the classes.
      where: The rows are; for an error.
      part: Of the config; for an error.

    Raises:
      UserError: a class has fewer rows.
    """
    classes, rows = np.unique(labels, return_counts=True)
    if rows.min() < count:
        raise UserError(
            f"config.{part}.labels_per_class is {count}, and class {names[classes[rows.argmin()]]!r} of {where} has "
            f"{rows.min()} pictures; expected at most that"
        )
    random = np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(labels == label))[:count] for label in classes]
    return np.sort(np.concatenate(drawn))


def _look(source: Source, config: ImageConfig, folder: Path) -> None:
    """Decodes every picture of a slice once; writes which can be, their labels and, for ``crop=step``, their pixels."""
    stored, kept, labels, broken = config.crop == "step", [], [], []
    size, images = config.image_size, None
    if stored:
        shape = (len(source), size, size, config.channels)
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)

    def decode(record: dict[str, Any]) -> np.ndarray | None:
        if stored:
            return held_out_pixels(record["image"], config)
        # Without pixels to keep, a JPEG may be decoded at an eighth: a cut off file is found all the same.
        open_picture(record["image"], config.channels, least=1)
        return None

    for i, record, found in looked_at(source, config.broken_share, decode, broken):
        if images is not None:
            images[i] = found
        kept.append(i)
        labels.append(record.get("label", HIDDEN))
    np.save(folder / "kept.npy", np.array(kept, np.int64))
    np.save(folder / "labels.npy", np.array(labels, np.int32))
    (folder / "undecodable.json").write_text(json.dumps(broken) + "\n", encoding="utf8")
