"""What evaluations by probes of all modalities have in common: their config, and what a modality adds to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils.epath import Path

from sslx.errors import UserError
from sslx.inference.loading import LoadedRun
from sslx.probing.features import Labelled
from sslx.probing.few_shot import FewShotConfig
from sslx.probing.knn import KnnConfig
from sslx.probing.linear import LinearProbeConfig
from sslx.tasks.class_report import class_scores

SPLITS = ("train", "validation", "test")
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """The config of an evaluation by probes, without its data."""

    name: str = "probe"  # of the folder that it writes
    seed: int = 0
    batch_size: int = 64  # rows that are encoded at once
    random_encoders: int = 3  # seeds of the baseline with random parameters; 0: none
    projection: str = "tsne"  # tsne | pca: how the picture of features is made
    linear: LinearProbeConfig = dataclasses.field(default_factory=LinearProbeConfig)
    knn: KnnConfig = dataclasses.field(default_factory=KnnConfig)
    few_shot: FewShotConfig = dataclasses.field(default_factory=FewShotConfig)
    # A config of sslx.finetune, trained from random parameters for as many steps as the run was: {} none.
    supervised: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, least in {"seed": 0, "batch_size": 1, "random_encoders": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"config.{name} is {getattr(self, name)}; expected at least {least}")
        if not self.name or "/" in self.name:
            raise UserError(f"config.name is {self.name!r}; expected the name of a folder")
        if self.projection not in ("tsne", "pca"):
            raise UserError(f"config.projection is {self.projection!r}; expected tsne or pca")


class Probe(Protocol):
    """What a modality adds: its config, its rows, and a baseline that knows nothing of any encoder."""

    config_class: type[ProbeConfig]

    def open(self, config: Any, folder: Path, run: LoadedRun) -> Any:
        """Labelled rows ``train``, ``eval`` and ``test``, as an objective's ``prepare`` gives them.

        Raises:
          UserError: there are none, or the run cannot read them.
        """
        ...

    def data(self, config: Any, run: LoadedRun) -> dict[str, Any]:
        """``config.data`` of a run that is trained on the same rows."""
        ...

    def raw(self, config: Any, rows: Mapping[str, Any], run: LoadedRun) -> dict[str, Labelled]:
        """Features of the rows of each split by name, without an encoder; {} where there are none."""
        ...

    def baselines(
        self, config: Any, rows: Mapping[str, Any], labels: Mapping[str, np.ndarray], run: LoadedRun
    ) -> list[Result]:
        """Results of other models on the test rows."""
        ...

    def pictures(self, config: Any, rows: Mapping[str, Any], run: LoadedRun) -> dict[str, np.ndarray]:
        """Pictures by name, uint8[height, width, 3], of what the encoder makes of some test rows; {} for none."""
        ...


def result(features: str, probe: str, guesses: np.ndarray, labels: np.ndarray, chosen: dict[str, Any]) -> Result:
    """One line of what is written: accuracy and macro-F1 of guesses, and how the probe was chosen."""
    scores = {"accuracy": float(np.mean(guesses == labels)), **class_scores(labels, guesses)}
    return {"features": features, "probe": probe, **scores, "chosen": chosen}
