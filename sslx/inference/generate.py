"""Generates: how texts go on, sampled from a causal language model. An empty text is the start of any document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sslx.errors import UserError
from sslx.inference.loading import LoadedRun
from sslx.inference.verb import OneRow, Row
from sslx.models.generation import Sampling, generate, right_aligned
from sslx.objective import Objective, row_keys
from sslx.pretext.clm import CausalLanguageModel


@dataclasses.dataclass(frozen=True)
class Generated:
    """What follows a text; ``ended`` if the model ended the document.

    ``tokens_beyond`` is how many tokens text and continuation have beyond the rows that the model has learned from.
    """

    generated: str
    ended: bool
    tokens_beyond: int = 0


@dataclasses.dataclass(frozen=True)
class Generate(OneRow):
    """Goes on with texts. A text's continuation depends on the seed and its number, not on the texts beside it."""

    counted = "tokens_beyond"

    new_tokens: int = 64
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest
    top_p: float = 1.0  # only the likeliest that together have this probability
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.new_tokens < 1:
            raise UserError(f"new_tokens is {self.new_tokens}; expected at least 1")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed is {self.seed}; expected 0 to 2147483647")
        _ = self._sampling

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def compiled_as(self) -> Generate:
        return dataclasses.replace(self, seed=0)  # a batch brings it

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, CausalLanguageModel)

    def encode(self, run: LoadedRun, record: Mapping[str, Any]) -> Row:
        tokens, model = [run.words.cls_id, *run.tokens_of(record["text"])], run.objective.model
        longest = model.max_length if run.longest is None else run.longest  # rows of the table beyond are as at first
        if model.positions == "learned" and len(tokens) + self.new_tokens > longest:
            raise UserError(
                f"a prompt of {len(tokens)} tokens and new_tokens={self.new_tokens} are "
                f"{len(tokens) + self.new_tokens} together; expected at most {longest}, the positions that the model "
                "has learned"
            )
        return Row(tokens)

    def note(self, run: LoadedRun) -> str:
        return f"continuations go beyond the {run.longest} tokens of the rows that the model has learned from"

    def batch(self, rows: Sequence[Row], indices: Sequence[int], length: int) -> dict[str, Int[np.ndarray, "rows ..."]]:
        batch = super().batch(rows, indices, length)
        counts = np.array([len(row.tokens) for row in rows], np.int32)
        return {"tokens": batch["tokens"], "counts": counts, "row": batch["row"], "seed": np.int32(self.seed)}

    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        objective, tokens = run.objective, batch["tokens"]
        new = generate(
            objective.model,
            run.words.size,
            variables["params"]["encoder"],
            right_aligned(tokens, batch["counts"], tokens.shape[1]),
            row_keys(jax.random.key(batch["seed"]), batch["row"]),
            new_tokens=self.new_tokens,
            sampling=self._sampling,
            end_id=run.words.sep_id,
            forbidden=objective.never_drawn,
        )
        return {"new": jnp.asarray(new)}

    def result(self, run: LoadedRun, row: Row, arrays: Mapping[str, np.ndarray]) -> Generated:
        new = arrays["new"].tolist()
        ended = run.words.sep_id in new
        new = new[: new.index(run.words.sep_id)] if ended else new
        beyond = 0 if run.longest is None else max(0, len(row.tokens) + len(new) - run.longest)
        return Generated(run.tokenizer.decode(new), ended, beyond)
