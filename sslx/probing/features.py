"""Features of labelled rows, from a frozen encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from sslx.compiler import compiler_options


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Features of rows with the label of each."""

    features: Float[np.ndarray, "rows dim"]
    labels: Int[np.ndarray, " rows"]


class Encoder:
    """Encodes rows, in batches of one shape, by a function of variables and a batch: such as ``Objective.encode``."""

    def __init__(self, encode: Callable[[Any, dict[str, Any]], Array], batch_size: int):
        self._encode = jax.jit(encode, compiler_options=compiler_options(jax.default_backend()))
        self._batch_size = batch_size

    def __call__(self, variables: Any, rows: Any) -> Labelled:
        """Features of all rows; ``variables`` as the function takes them."""
        features, labels = [], []
        for start in range(0, len(rows), self._batch_size):
            ids = np.arange(start, min(start + self._batch_size, len(rows)))
            batch = dict(rows.fetch(np.resize(ids, self._batch_size)))  # the last one is filled up with rows of its own
            labels.append(batch.pop("label")[: len(ids)])
            features.append(np.asarray(self._encode(variables, batch), np.float32)[: len(ids)])
        return Labelled(np.concatenate(features), np.concatenate(labels))
