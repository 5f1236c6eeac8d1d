"""Probes on labelled pictures: their rows, and raw pixels as features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils.epath import Path

from sslx.data.batches import SomeRows
from sslx.data.images import ImageConfig, PictureSet, prepare_labelled_images
from sslx.data.prepared import PreparedPictures
from sslx.inference.loading import LoadedRun
from sslx.models.vit import VitConfig
from sslx.probing.attention import attention_sheet
from sslx.probing.features import Labelled
from sslx.probing.probe import ProbeConfig, Result

ROWS_AT_ONCE = 1024
SHOWN = 12  # pictures with what is attended to


@dataclasses.dataclass(frozen=True)
class ImageProbeConfig(ProbeConfig):
    """The config of an evaluation of a run on pictures."""

    name: str = "image_probe"
    batch_size: int = 256
    raw_pixels: bool = True  # as features, beside the encoders'
    data: PictureSet = dataclasses.field(default_factory=PictureSet)  # of the size and channels of the run


class ImageProbe:
    """`Probe` on pictures."""

    config_class = ImageProbeConfig

    def open(self, config: ImageProbeConfig, folder: Path, run: LoadedRun) -> PreparedPictures:
        """Labelled rows of the size and channels that the run has learned from."""
        # By the evaluation's seed, as what is trained on the labels sees them.
        return prepare_labelled_images(ImageConfig(**self.data(config, run)), config.seed)

    def data(self, config: ImageProbeConfig, run: LoadedRun) -> dict[str, Any]:
        learned = {name: run.written["data"][name] for name in ("image_size", "channels")}
        return dataclasses.asdict(config.data) | learned

    def raw(self, config: ImageProbeConfig, rows: Mapping[str, Any], run: LoadedRun) -> dict[str, Labelled]:
        return {split: _pixels(of) for split, of in rows.items()} if config.raw_pixels else {}

    def baselines(
        self, config: ImageProbeConfig, rows: Mapping[str, Any], labels: Mapping[str, np.ndarray], run: LoadedRun
    ) -> list[Result]:
        return []

    def pictures(self, config: ImageProbeConfig, rows: Mapping[str, Any], run: LoadedRun) -> dict[str, np.ndarray]:
        """What a ViT attends to; other encoders have no such thing."""
        model = run.objective.model
        if not isinstance(model, VitConfig):
            return {}
        some = SomeRows(rows["test"], SHOWN, config.seed)
        encoder = run.objective.encoder(run.variables["params"], run.variables["state"])
        return {"attention": attention_sheet(model, encoder, some.fetch(np.arange(len(some)))["image"])}


def _pixels(rows: Any) -> Labelled:
    starts = range(0, len(rows), ROWS_AT_ONCE)
    parts = [rows.fetch(np.arange(start, min(start + ROWS_AT_ONCE, len(rows)))) for start in starts]
    images = np.concatenate([part["image"].reshape(len(part["image"]), -1) for part in parts])
    return Labelled(images.astype(np.float32) / 255, np.concatenate([part["label"] for part in parts]))
