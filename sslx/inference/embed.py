"""Embeds texts: one float32 vector for a text, from the encoder of any run on text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sslx.errors import UserError, choose
from sslx.inference.loading import LoadedRun
from sslx.inference.verb import OneRow, Row, whole_document
from sslx.models.pooling import unit_vectors
from sslx.models.text import TextModelConfig, check_pool, pooled
from sslx.objective import Objective

POOLS = ("mean", "first", "last", "own")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A text's vector."""

    embedding: Float[np.ndarray, " width"]
    tokens_left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Embed(OneRow):
    """Vectors of texts."""

    pool: str = "mean"  # over tokens | first | last token | own: the features that the objective's probes are given
    normalise: bool = True  # to length 1

    def __post_init__(self):
        super().__post_init__()
        choose(self.pool, POOLS, "pool")

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return True

    def check(self, run: LoadedRun) -> None:
        model = getattr(run.objective, "model", None)
        if self.pool != "own" and not isinstance(model, TextModelConfig):
            raise UserError(f"pool is {self.pool!r}, and {run.kind} has no text model of sslx; expected 'own'")
        check_pool(model, self.pool, "pool")

    def encode(self, run: LoadedRun, record: Mapping[str, Any]) -> Row:
        return whole_document(run, record["text"])

    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        objective = run.objective
        encoder = objective.encoder(variables["params"], variables["state"])
        if self.pool == "own":
            x = objective.encode(encoder, dict(batch))
        else:
            module = objective.model.encoder(run.words.size).bind(encoder)
            x = pooled(module, dict(batch), self.pool, deterministic=True)
        if self.normalise:
            x = unit_vectors(x)
        return {"embedding": x.astype(jnp.float32)}

    def width(self, run: LoadedRun) -> int:
        """The length of its vectors."""
        shortest = self.batch([Row([run.words.cls_id, run.words.sep_id])], [0], 2)
        return jax.eval_shape(lambda batch: self.compute(run, run.variables, batch), shortest)["embedding"].shape[1]

    def result(self, run: LoadedRun, row: Row, arrays: Mapping[str, np.ndarray]) -> Embedded:
        return Embedded(arrays["embedding"], row.tokens_left_out)
