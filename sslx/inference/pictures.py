"""Asks runs on pictures: a vector of each, or its class with probabilities.

A picture is the path of a file, one that Pillow has opened, or pixels uint8 (or uint16) [height, width] or
[height, width, 1, 3 or 4]. It is seen as held-out rows are: the square in its middle, brought to the size and channels
that the run has learned from. Files are opened before anything is computed and decoded when their batch is due, so that
a folder may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from sslx.config import build
from sslx.data.decoding import decoders
from sslx.data.images import ImageConfig, held_out_pixels
from sslx.data.pictures import BrokenPicture, check_header
from sslx.errors import UserError
from sslx.inference.classify import by_probability
from sslx.inference.loading import LoadedRun
from sslx.inference.verb import TaskRows
from sslx.models.pooling import unit_vectors
from sslx.objective import Objective
from sslx.pretext.image import ImagePretext
from sslx.pretext.joint import JointEmbedding
from sslx.tasks.image_classification import ImageClassification

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
EXPECTED = "the path of a picture, a Pillow picture, or pixels [height, width] or [height, width, 1, 3 or 4]"


def is_picture(given: Any) -> bool:
    """Whether this is one picture and no list of them.

    Raises:
      UserError: it may be either: a stack of grey pictures, or colours that do not come last.
    """
    if isinstance(given, np.ndarray):
        if given.ndim == 3 and given.shape[-1] not in (1, 3, 4):
            raise UserError(
                f"expected {EXPECTED}, or a list of these, got an array of shape {list(given.shape)}; of grey pictures "
                "in one array, give list(array)"
            )
        return given.ndim in (2, 3)
    return isinstance(given, str | os.PathLike | Image.Image)


class PictureRows:
    """Pictures as held-out rows of a run; files are decoded each time they are read."""

    def __init__(self, pictures: Sequence[str | np.ndarray], config: ImageConfig):
        self._pictures, self._config = pictures, config

    def __len__(self) -> int:
        return len(self._pictures)

    def fetch(self, ids: np.ndarray) -> dict[str, UInt8[np.ndarray, "n size size channels"]]:
        """Reads rows.

        Raises:
          UserError: a file that cannot be decoded.
        """
        return {"image": np.stack(list(decoders().map(self._pixels, ids.tolist())))}

    def _pixels(self, place: int) -> np.ndarray:
        picture = self._pictures[place]
        if isinstance(picture, np.ndarray):
            return picture
        try:
            return held_out_pixels(Path(picture).read_bytes(), self._config)
        except (BrokenPicture, OSError) as error:
            raise UserError(f"{picture} cannot be decoded: {error}") from None


class PictureVerb(TaskRows):
    """A verb on pictures."""

    fields = ("image",)
    counted = ""

    def inputs(self, run: LoadedRun, record: Mapping[str, Any]) -> str | np.ndarray:
        picture = record["image"]
        if not is_picture(picture):
            shape = f" of shape {list(picture.shape)}" if isinstance(picture, np.ndarray) else ""
            raise UserError(f"expected {EXPECTED}, got {type(picture).__name__}{shape}")
        try:
            if isinstance(picture, Image.Image):
                return held_out_pixels(picture, _data_of(run))
            if not isinstance(picture, np.ndarray):
                check_header(os.fspath(picture))
                return os.fspath(picture)
            if picture.dtype not in (np.uint8, np.uint16) or not picture.size:
                raise UserError(f"expected pixels of uint8 or uint16, got {picture.dtype}{list(picture.shape)}")
            return held_out_pixels(picture, _data_of(run))
        except BrokenPicture as error:
            raise UserError(f"{picture if isinstance(picture, str | os.PathLike) else 'pixels'}: {error}") from None

    def rows(self, run: LoadedRun, inputs: Sequence[str | np.ndarray]) -> PictureRows:
        return PictureRows(inputs, _data_of(run))


@dataclasses.dataclass(frozen=True)
class EmbeddedPicture:
    """A picture's vector."""

    embedding: Float[np.ndarray, " width"]


@dataclasses.dataclass(frozen=True)
class EmbedPictures(PictureVerb):
    """Vectors of pictures: the features that the objective's probes are given."""

    normalise: bool = True  # to length 1

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, ImagePretext | JointEmbedding | ImageClassification)

    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        encoder = run.objective.encoder(variables["params"], variables["state"])
        x = run.objective.encode(encoder, {"image": batch["image"]})
        return {"embedding": (unit_vectors(x) if self.normalise else x).astype(jnp.float32)}

    def width(self, run: LoadedRun) -> int:
        """The length of its vectors."""
        data = _data_of(run)
        one = {"image": jax.ShapeDtypeStruct((1, data.image_size, data.image_size, data.channels), np.uint8)}
        return jax.eval_shape(lambda batch: self.compute(run, run.variables, batch), one)["embedding"].shape[1]

    def results(
        self, run: LoadedRun, predictions: Mapping[str, np.ndarray], rows: Any, inputs: Sequence[Any]
    ) -> list[EmbeddedPicture]:
        return [EmbeddedPicture(vector) for vector in predictions["embedding"]]


@dataclasses.dataclass(frozen=True)
class ClassifiedPicture:
    """The likeliest label, and the probabilities of all, likeliest first."""

    label: str
    probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ClassifyPictures(PictureVerb):
    """Labels of pictures."""

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, ImageClassification)

    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        logits = run.objective.logits(variables["params"], variables["state"], {"image": batch["image"]})
        return {"probabilities": jax.nn.softmax(logits, axis=-1)}

    def results(
        self, run: LoadedRun, predictions: Mapping[str, np.ndarray], rows: Any, inputs: Sequence[Any]
    ) -> list[ClassifiedPicture]:
        ordered = [by_probability(run.objective.label_names, values) for values in predictions["probabilities"]]
        return [ClassifiedPicture(next(iter(one)), one) for one in ordered]


def _data_of(run: LoadedRun) -> ImageConfig:
    return build(ImageConfig, run.written["data"], "config.data")
