"""Features of labelled rows, from a frozen encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from sslx.objective import Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Features of rows with the label of each."""

    features: Float[np.ndarray, "rows dim"]
    labels: Int[np.ndarray, " rows"]


class Encoder:
    """Encodes rows with an objective's frozen encoder, in batches of one shape."""

    def __init__(self, objective: Objective, batch_size: int):
        self._encode = jax.jit(objective.encode)
        self._batch_size = batch_size

    def __call__(self, variables: Any, rows: Any) -> Labelled:
        """Features of all rows; ``variables`` as ``Objective.encoder`` gives them."""
        features, labels = [], []
        for start in range(0, len(rows), self._batch_size):
            ids = np.arange(start, min(start + self._batch_size, len(rows)))
            batch = dict(rows.fetch(np.resize(ids, self._batch_size)))  # the last one is filled up with rows of its own
            labels.append(batch.pop("label")[: len(ids)])
            features.append(np.asarray(self._encode(variables, batch), np.float32)[: len(ids)])
        return Labelled(np.concatenate(features), np.concatenate(labels))
